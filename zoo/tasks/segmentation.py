"""Semantic segmentation: a class per pixel."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from surgeon.errors import ConfigError, InputError
from surgeon.layers.base import DynamicConv2d
from surgeon.records.preprocessing import tell_timm
from surgeon.records.recipe import get_recipe
from surgeon.zoo.tasks.base import Batch, Sample, Split, Task, TaskConfig, TaskDataset
from surgeon.zoo.tasks.data.datasets import ItemDataset
from surgeon.zoo.tasks.data.draws import integer, uniform
from surgeon.zoo.tasks.data.files import FolderConfig, check_images, chosen, find_roots, look_through
from surgeon.zoo.tasks.data.images import Reader, by_size, collate_padded, on_multiple, to_tensor, unpadded
from surgeon.zoo.tasks.data.masks import Pair, bad_pair, check_labels, mask_folders, mask_pairs, read_mask
from surgeon.zoo.tasks.data.transforms import ImageFormat
from surgeon.zoo.tasks.registry import register
from surgeon.zoo.tasks.support.class_weights import checked_weights
from surgeon.zoo.tasks.support.pictures import labels_image, sheet, to_image
from surgeon.zoo.tasks.support.probe import describe, outputs_of, replace_module, trial, with_outputs

if TYPE_CHECKING:
    from torchmetrics import Metric

logger = logging.getLogger(__name__)

PICTURES = 4
_AUXILIARY = 0.4  # weight of the loss of an auxiliary classifier (Zhao et al. 2017, PSPNet, section 4.1)


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(FolderConfig):
    """`classes`: their number; by default one more than the largest label of the masks. `ignore_index`: label that is not a class.

    Training crops have the size `input_size`, by default 256x256: images are scaled by a factor between `scale_min` and
    `scale_max`, cropped and mirrored. Whole images are padded to a multiple of `multiple` pixels. `class_weights`
    weight the loss of the pixels of each class. In evaluation, the class probabilities are averaged over the
    image at each of `test_scales` (multi-scale testing). A model with a trained head keeps it, also if the largest labels do not
    occur; other labels need `new_head`, an untrained head.
    """

    least: ClassVar[Mapping[str, float]] = {"classes": 2, "multiple": 1}
    above: ClassVar[Mapping[str, float]] = {"scale_min": 0, "scale_max": 0}

    classes: int | None = None
    ignore_index: int = 255
    augment: bool = True
    scale_min: float = 0.5
    scale_max: float = 2.0
    multiple: int = 1
    new_head: bool = False
    class_weights: tuple[float, ...] | None = None
    test_scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_min > self.scale_max:
            raise ConfigError(f"scale_min={self.scale_min!r} must not be above scale_max={self.scale_max!r}")
        if not self.test_scales or not all(scale > 0 for scale in self.test_scales):
            raise ConfigError(f"test_scales must be positive factors, as 0.75,1,1.25, got {self.test_scales!r}")
        if self.input_size is not None and self.input_size[0] != 3:
            raise ConfigError(f"segmentation takes RGB pictures, not input_size={self.input_size!r}")


@register
class Segmentation(Task):
    """Images in `images/`, masks in `masks/` (or `labels/`, `annotations/`) with the same names.

    A mask is a single-channel image whose values are classes. Models return logits (N, classes, h, w), or torchvision's
    dictionary of them, which are resized to the image's size. The loss is the mean over images of the mean cross-entropy
    over the labeled pixels of an image. Metrics over all pixels of the set: `miou` (excluding classes that occur neither in
    the masks nor in the predictions) and `pixel_accuracy`, both fractions.
    """

    name: ClassVar[str] = "segmentation"
    other_outputs: ClassVar[str] = "ignore_index=LABEL leaves a label of the masks out"
    config_class: ClassVar[type[TaskConfig]] = SegmentationConfig
    primary: ClassVar[str] = "miou"
    higher_is_better: ClassVar[bool] = True
    config: SegmentationConfig

    def __init__(self, config: SegmentationConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self._classes = config.classes
        self._labels: set[int] = set()  # of the masks, once they were looked at
        self._read = Reader("RGB")
        self._set_format(None)

    def _set_format(self, model: nn.Module | None) -> None:
        form = ImageFormat.of(model, side=256)
        self.mean, self.std = self.config.mean or form.mean, self.config.std or form.std
        self.models_own = form.own
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ConfigError(f"task {self.name}: mean={self.mean} and std={self.std} must have 3 values each")

    def preprocessing(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}

    @property
    def piece(self) -> tuple[int, int]:
        """(height, width) of a training sample."""
        return self.config.input_size[1:] if self.config.input_size else (256, 256)

    @property
    def classes(self) -> int:
        """Number of classes; read from the masks unless the options set it. Raises `DataError`."""
        if self._classes is None:
            self._classes = self._look_at_masks()
        return self._classes

    # --- data -----------------------------------------------------------------------------------------------------

    def items(self, split: Split) -> list[tuple[int, Pair]]:
        """(number, (image, mask)) of a split."""
        roots = find_roots(self.name, self.config)
        folder = roots.of(split)
        return chosen(mask_pairs(self.name, folder), split, self.config, roots.divided)

    def check(self) -> None:
        for split in self._splits():
            check_images(self.name, [picture for _, (picture, _) in self.items(split)])
        roots = find_roots(self.name, self.config)
        for folder in dict.fromkeys(roots.of(split) for split in self._splits()):
            used, *others = map(str, mask_folders(folder))
            if others:
                logger.warning("task %s: the masks are those of %s, not of %s", self.name, used, ", ".join(others))
        self._classes = self._look_at_masks()

    def _splits(self) -> tuple[Split, ...]:
        return ("val",) if find_roots(self.name, self.config).train is None else ("train", "val")

    def _look_at_masks(self) -> int:
        """The number of classes; raises `DataError` for unusable masks."""
        config = self.config
        labels: dict[str, dict[int, Path]] = {split: {} for split in self._splits()}
        for split in self._splits():
            pairs = [pair for _, pair in self.items(split)]
            what = f"task {self.name}: masks that cannot be used"
            look_through(
                what, pairs, partial(bad_pair, classes=config.classes, ignore=config.ignore_index, labels=labels[split])
            )
        self._labels = set().union(*labels.values())
        return check_labels(self.name, labels, config.classes, config.ignore_index)

    def _normalized(self, image: Image.Image) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (to_tensor(image) - mean) / std

    def train_sample(self, pair: Pair, generator: torch.Generator) -> Sample:
        image, mask = self._read(pair[0]), read_mask(pair[1])
        config, (height, width) = self.config, self.piece
        if config.augment:
            factor = uniform(config.scale_min, config.scale_max, generator)
            size = max(round(image.width * factor), 1), max(round(image.height * factor), 1)
            image = image.resize(size, Image.Resampling.BILINEAR)
            mask = F.interpolate(mask[None, None].float(), size[::-1], mode="nearest-exact")[0, 0].long()
        x = self._normalized(image)
        bottom, right = max(height - x.shape[1], 0), max(width - x.shape[2], 0)
        x = F.pad(x, (0, right, 0, bottom))
        mask = F.pad(mask, (0, right, 0, bottom), value=config.ignore_index)
        top = integer(0, x.shape[1] - height, generator)
        left = integer(0, x.shape[2] - width, generator)
        x, mask = x[:, top : top + height, left : left + width], mask[top : top + height, left : left + width]
        if config.augment and integer(0, 1, generator):
            x, mask = x.flip(-1), mask.flip(-1)
        return {"input": x.contiguous(), "target": mask.contiguous()}

    def val_sample(self, pair: Pair, generator: torch.Generator) -> Sample:
        return {"input": self._normalized(self._read(pair[0])), "target": read_mask(pair[1])}

    def dataset(self, split: Split) -> TaskDataset:
        items = self.items(split)
        if split == "train":
            return ItemDataset(items, self.train_sample, seed=self.seed, fixed=False)
        return ItemDataset(items, self.val_sample, seed=self.config.val_stream, fixed=True)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return collate_padded(samples, {"target": self.config.ignore_index})

    # --- model ----------------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module) -> nn.Module:
        self._set_format(model)
        size = (3, *self.piece)
        logits = self._logits(trial(self.name, model, model, *size))
        if logits.shape[1] != self.classes and not self.config.new_head and _has_trained_head(model, self.name):
            self._keep_head(int(logits.shape[1]))
        checked_weights(self.name, self.config.class_weights, self.classes)
        if logits.shape[1] != self.classes:
            for name in _heads(self.name, model, int(logits.shape[1]), self.classes):
                replace_module(model, name, with_outputs(model.get_submodule(name), self.classes, self.seed))
            logits = self._logits(trial(self.name, model, model, *size))
        if logits.shape[1] != self.classes:
            raise InputError(f"task {self.name}: the model returns {describe(logits)}, not {self.classes} classes")
        tell_timm(model, self.preprocessing())
        return model

    def _keep_head(self, outputs: int) -> None:
        """Take the classes of a trained head, of which the largest may be absent from the masks; `InputError` if it lacks some."""
        given = self.config.classes
        if given is None and self.classes <= outputs:
            logger.warning(
                "task %s: the masks have labels up to %d, and the model keeps its trained head of %d classes (new_head=true "
                "starts with an untrained one)",
                *(self.name, self.classes - 1, outputs),
            )
            self._classes = outputs
            return
        more = sorted(label for label in self._labels if label >= outputs)
        shown = ", ".join(map(str, more[:5])) + (", ..." if len(more) > 5 else "")
        told = f"the masks also have label{'s' * (len(more) > 1)} {shown}" if more else f"the task classes={given}"
        void = f"ignore_index={more[0]} leaves it out, as what is no class; " if len(more) == 1 else ""
        raise InputError(
            f"task {self.name}: the model has a trained head of {outputs} classes, and {told}: {void}new_head=true starts with an "
            f"untrained head of {self.classes}"
        )

    def _logits(self, output: Any) -> Tensor:
        logits = _all_logits(output).get("out")
        if logits is None or logits.dim() != 4:
            raise InputError(f"task {self.name}: the model returns {describe(output)}, not logits (N, classes, H, W)")
        return logits

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """Logits (N, classes, H, W) at the image's size; with several `test_scales`, the logarithms of the mean probabilities."""

        def run(x: Tensor) -> Tensor:
            return _enlarged(self._logits(model(x)), x.shape[-2:])

        def whole(x: Tensor) -> Tensor:
            return on_multiple(run, x, self.multiple)

        def at_all_scales(x: Tensor) -> Tensor:
            if self.config.test_scales == (1.0,):
                return whole(x)
            size = x.shape[-2:]
            sizes = [tuple(max(round(side * factor), 1) for side in size) for factor in self.config.test_scales]
            shares = [_enlarged(whole(_enlarged(x, scaled)), size).softmax(1) for scaled in sizes]
            return torch.stack(shares).mean(0).log()

        return by_size(at_all_scales, batch["input"], batch.get("input_size"))

    def loss(self, output: Any, batch: Batch) -> Tensor:
        target = batch["target"]
        parts = _all_logits(output)
        loss = self._cross_entropy(self._logits(output), target)
        return loss + _AUXILIARY * sum(self._cross_entropy(x, target) for key, x in parts.items() if key != "out")

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        ignore = self.config.ignore_index
        weight = checked_weights(self.name, self.config.class_weights, self.classes, logits.device)
        values = F.cross_entropy(
            _enlarged(logits.float(), target.shape[-2:]), target, weight, ignore_index=ignore, reduction="none"
        )
        counted = (target != ignore).sum((1, 2)).clamp(min=1)
        return (values.sum((1, 2)) / counted).mean()

    def distillation_loss(self, output: Any, teacher: Any) -> Tensor:
        """Divergence of each pixel's classes from the teacher's, averaged over pixels and images."""
        student, teacher = self._logits(output).float(), self._logits(teacher).float()
        divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none")
        return divergence.sum(1).mean()

    # --- metrics and pictures -------------------------------------------------------------------------------------

    def metrics(self) -> "dict[str, Metric]":
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        count, ignore = self.classes, self.config.ignore_index
        return {
            "miou": MulticlassJaccardIndex(num_classes=count, average="macro", ignore_index=ignore),
            "pixel_accuracy": MulticlassAccuracy(num_classes=count, average="micro", ignore_index=ignore),
        }

    def update(self, metrics: "Mapping[str, Metric]", output: Any, batch: Batch) -> None:
        target = batch["target"]
        guess = _enlarged(self._logits(output), target.shape[-2:]).argmax(1)
        for metric in metrics.values():
            metric.update(guess, target)

    def picture(self, batch: Batch, output: Any) -> Image.Image:
        ignore, target, sizes = self.config.ignore_index, batch["target"], batch.get("target_size")
        guesses = unpadded(_enlarged(self._logits(output).detach(), target.shape[-2:]).argmax(1), sizes)
        images = unpadded(batch["input"], batch.get("input_size"))
        mean, std = (torch.tensor(v, device=target.device).view(3, 1, 1) for v in (self.mean, self.std))
        rows = []
        for image, guess, true in list(zip(images, guesses, unpadded(target, sizes), strict=True))[:PICTURES]:
            rows.append(
                [to_image(image[0] * std + mean), labels_image(guess[0]), labels_image(true[0], ignore)],
            )
        return sheet(rows, ("input", "output", "target"))


def _all_logits(output: Any) -> dict[str, Tensor]:
    """Logits by name; the main ones are "out". In a tuple, the first are the main ones."""
    if isinstance(output, Tensor):
        return {"out": output}
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items() if isinstance(value, Tensor)}
    if isinstance(output, Sequence) and output and all(isinstance(part, Tensor) for part in output):
        return {"out" if index == 0 else f"aux{index}": part for index, part in enumerate(output)}
    return {}


def _enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def _has_trained_head(model: nn.Module, task: str) -> bool:
    """Whether the model was trained on this task, or has weights of the user's own."""
    recipe = get_recipe(model)
    if recipe is None:
        return False
    own = recipe.base is not None and recipe.base.weights.kind == "file"
    return own or (recipe.task is not None and recipe.task.name == task)


def _heads(task: str, model: nn.Module, old: int, classes: int) -> list[str]:
    """Names of the convolutions that output the logits: in torchvision's classifiers, otherwise the last one."""
    convs = [name for name, module in model.named_modules() if type(module) is nn.Conv2d and outputs_of(module) == old]
    main = [name for name in convs if name.split(".")[0] == "classifier"]
    auxiliary = [name for name in convs if "aux" in name.split(".")[0]]
    others = [name for name in convs if name not in auxiliary]
    if not others:
        dynamic = [n for n, m in model.named_modules() if isinstance(m, DynamicConv2d) and m.out_channels == old]
        why = f"; {dynamic[-1]} was converted: leave the classifier out of the conversion" if dynamic else ""
        raise InputError(
            f"task {task}: the model has {old} classes, the data {classes}, and no last convolution with {old} outputs was "
            f"found to replace{why}"
        )
    return (main or others[-1:]) + auxiliary
