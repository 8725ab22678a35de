"""Image classification on CIFAR-10, CIFAR-100 or folders of images, one folder per class."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from surgeon.errors import ConfigError, DataError, InputError
from surgeon.records.preprocessing import tell_timm
from surgeon.records.recipe import get_recipe
from surgeon.zoo.tasks.base import Batch, Sample, Split, Task, TaskConfig, TaskDataset
from surgeon.zoo.tasks.data.datasets import ItemDataset
from surgeon.zoo.tasks.data.draws import global_seed
from surgeon.zoo.tasks.data.files import FolderConfig, check_images, chosen, divide, open_image
from surgeon.zoo.tasks.data.images import as_mode
from surgeon.zoo.tasks.data.labeled import Labeled, find_dataset, has_train, read_split
from surgeon.zoo.tasks.data.transforms import ImageFormat, make_transform
from surgeon.zoo.tasks.registry import register
from surgeon.zoo.tasks.support.class_weights import checked_weights
from surgeon.zoo.tasks.support.classifier import fit_classifier
from surgeon.zoo.tasks.support.metrics import image_mean
from surgeon.zoo.tasks.support.pictures import sheet, to_image
from surgeon.zoo.tasks.support.probe import first_channels

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torchmetrics import Metric

PICTURES = 16
_AUXILIARY = 0.3  # weight of the losses of auxiliary classifiers (GoogLeNet, section 5)
_TEMPERATURE = 4.0  # of distillation


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig(FolderConfig):
    """`dataset`: cifar10, cifar100 or folder; auto detects it. `download` lets torchvision download CIFAR into `data`.

    `crop_scale`, `color_jitter`, `auto_augment`, `erase`, `interpolation` and `crop_pct` go to timm's transforms; images of at
    most 64 pixels are padded by an eighth, cropped and mirrored instead of randomly resized. `mixup` and `cutmix` are their
    alphas (0: off), `mix_probability` is the share of batches that are mixed. `label_smoothing` applies in training.

    A fine-tuned model knows the names of its classes: the data's classes are put in that order, and some of them may be
    absent. Data with other classes need `new_head`, an untrained classifier. `class_weights` weight the loss of
    the samples of each class.
    """

    least: ClassVar[Mapping[str, float]] = {
        "mixup": 0,
        "cutmix": 0,
        "color_jitter": 0,
        "mix_probability": 0,
        "erase": 0,
        "label_smoothing": 0,
    }
    most: ClassVar[Mapping[str, float]] = {"mix_probability": 1, "erase": 1, "label_smoothing": 1}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"dataset": ("auto", "cifar10", "cifar100", "folder")}

    dataset: str = "auto"
    download: bool = False
    augment: bool = True
    crop_scale: tuple[float, float] = (0.08, 1.0)
    color_jitter: float = 0.0
    auto_augment: str | None = None
    erase: float = 0.0
    interpolation: str | None = None
    crop_pct: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    label_smoothing: float = 0.0
    new_head: bool = False
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"crop_scale must be two shares of the area in order, got {self.crop_scale!r}")


@register
class Classification(Task):
    """Single-label classification.

    Data: the folder that torchvision downloads CIFAR into (`cifar-10-batches-py/`, `cifar-100-python/`), or `train/` and `val/`
    with one folder per class, or such folders without a split, with a stratified `val_fraction` for validation. Image size,
    normalization, interpolation and crop are those of a timm model; other models get ImageNet's normalization and the size of
    the images (CIFAR) or 224. Metrics: top1, top5 (fractions; top5 from six classes on), loss (cross-entropy).
    """

    name: ClassVar[str] = "classification"
    at_models_size: ClassVar[bool] = True
    config_class: ClassVar[type[TaskConfig]] = ClassificationConfig
    primary: ClassVar[str] = "top1"
    higher_is_better: ClassVar[bool] = True
    config: ClassificationConfig

    def __init__(self, config: ClassificationConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self._read: dict[str, Labeled] = {}
        self._names: list[str] | None = None  # of the bound model's outputs
        self._format: ImageFormat | None = None

    # --- data -----------------------------------------------------------------------------------------------------

    def labeled(self, split: Split) -> Labeled:
        """All images and classes from which a split is taken."""
        if split not in self._read:
            self._read[split] = read_split(self.name, self.config, split, self.config.dataset, self.config.download)
        return self._read[split]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, ordered by class number: the bound model's, otherwise the data's."""
        return self._names or self.data_classes

    @property
    def data_classes(self) -> list[str]:
        """Names of the classes in the data."""
        return self.labeled("val").classes

    def preprocessing(self) -> dict[str, Any]:
        return self.format().values()

    def outputs(self) -> tuple[str, ...] | None:
        return tuple(self.classes)

    def check(self) -> None:
        val = self.labeled("val")
        both = has_train(self.name, self.config, self.config.dataset)
        train = self.labeled("train") if both else None
        if train is not None and train.classes != val.classes:
            missing, extra = (
                sorted(set(train.classes) - set(val.classes)),
                sorted(set(val.classes) - set(train.classes)),
            )
            raise DataError(
                f"task {self.name}: train and val have different classes; only in train: {_some(missing)}; "
                f"only in val: {_some(extra)}"
            )
        if val.divided:
            self._check_share(val)
        paths = {item for part in (train, val) if part is not None for item in part.items if isinstance(item, Path)}
        check_images(self.name, sorted(paths))

    def _check_share(self, data: Labeled) -> None:
        """Warn if some classes have no validation images."""
        config = self.config
        labels = [
            data.labels[i] for i in divide(len(data.items), "val", config.val_fraction, config.val_seed, data.labels)
        ]
        absent = [name for label, name in enumerate(data.classes) if label not in set(labels)]
        if absent:
            _warn(
                f"task {self.name}: val_fraction={config.val_fraction:g} leaves {len(labels)} of {len(data.items)} images for "
                f"validation, none of the class{'es' * (len(absent) > 1)} {_some(absent)}: a larger val_fraction=, or a val/ of "
                "its own"
            )

    def dataset(self, split: Split) -> TaskDataset:
        data = self.labeled(split)
        numbers = [self.classes.index(name) for name in data.classes]
        items = [(item, numbers[label]) for item, label in zip(data.items, data.labels, strict=True)]
        config = self.config
        samples = chosen(items, split, config, data.divided, data.labels)
        make = SampleMaker(self.format(), self.config, split == "train")
        if split == "train":
            return ItemDataset(samples, make, seed=self.seed, fixed=False)
        return ItemDataset(samples, make, seed=self.config.val_stream, fixed=True)

    def format(self) -> ImageFormat:
        """Size and normalization of the images: from the options, the bound model, or the data, in this order."""
        if self._format is None:
            self._format = self._format_for(None)
        return self._format

    def _format_for(self, model: nn.Module | None) -> ImageFormat:
        kind = find_dataset(self.name, self.config, self.config.dataset)
        found = ImageFormat.of(model, side=32 if kind.startswith("cifar") else 224)
        if model is not None and (channels := first_channels(model)) in (1, 3):
            found = found.with_channels(channels)
        if self.config.input_size is not None:
            found = replace(found.with_channels(self.config.input_size[0]), size=self.config.input_size)
        if self.config.mean is not None:
            found = replace(found, mean=self.config.mean)
        if self.config.std is not None:
            found = replace(found, std=self.config.std)
        if found.small:
            found = found.without_crop()
        found = replace(
            found,
            interpolation=self.config.interpolation or found.interpolation,
            crop_pct=self.config.crop_pct or found.crop_pct,
        )
        return found.checked(self.name)

    # --- model ----------------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module) -> nn.Module:
        self._format = self._format_for(model)
        self.models_own = self._format.own
        if len(self.data_classes) < 2:
            raise DataError(
                f"task {self.name}: the data have only one class ({self.data_classes[0]}), and classification needs two or "
                "more: one folder per class"
            )
        fitting = self._fitted(model, self._format)
        checked_weights(self.name, self.config.class_weights, len(self.classes))
        tell_timm(fitting, self.preprocessing())
        return fitting

    def _fitted(self, model: nn.Module, form: ImageFormat) -> nn.Module:
        """The model with the data's classes, in the order that the model knows."""
        recipe = get_recipe(model)
        known = recipe.classes if recipe is not None else None
        if known is None:
            return fit_classifier(self.name, model, len(self.classes), form.size, self.seed)
        if self.config.new_head:
            self._names = None
            fresh = set(known) != set(self.data_classes)
            return fit_classifier(self.name, model, len(self.classes), form.size, self.seed, fresh=fresh)
        unknown = sorted(set(self.data_classes) - set(known))
        if unknown:
            raise InputError(
                f"task {self.name}: the model was trained on the classes {_some(list(known))}, and the data have others: "
                f"{_some(unknown)}; new_head=true starts with an untrained classifier for them"
            )
        self._names = list(known)
        return fit_classifier(self.name, model, len(known), form.size, self.seed)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        if not (self.config.mixup or self.config.cutmix):
            return batch
        from timm.data import Mixup

        mix = Mixup(
            mixup_alpha=self.config.mixup,
            cutmix_alpha=self.config.cutmix,
            prob=self.config.mix_probability,
            label_smoothing=self.config.label_smoothing,
            num_classes=len(self.classes),
        )
        x, y = batch["input"], batch["target"]
        even = len(y) // 2 * 2  # an odd last sample is its own partner
        with global_seed(generator):
            mixed = [mix(x[:even].clone(), y[:even])] if even else []
            mix.mixup_enabled = False
            if even < len(y):
                twice, target = mix(x[-1:].repeat(2, 1, 1, 1), y[-1:].repeat(2))
                mixed.append((twice[:1], target[:1]))
        return {**batch, "input": torch.cat([a for a, _ in mixed]), "target": torch.cat([b for _, b in mixed])}

    def loss(self, output: Any, batch: Batch) -> Tensor:
        logits, *auxiliary = _all_logits(output)
        return self._cross_entropy(logits, batch) + sum(_AUXILIARY * self._cross_entropy(a, batch) for a in auxiliary)

    def _cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        target = batch["target"]
        # mixed labels are already smoothed
        smoothing = 0.0 if target.is_floating_point() else self.config.label_smoothing
        weight = checked_weights(self.name, self.config.class_weights, len(self.classes), logits.device)
        if weight is not None:  # a plain mean of weighted values: equal parts of a batch average to it
            return F.cross_entropy(logits.float(), target, weight, reduction="none", label_smoothing=smoothing).mean()
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)

    def distillation_loss(self, output: Any, teacher: Any) -> Tensor:
        """Hinton et al. (2015): divergence between the softened classes, times the squared temperature."""
        student, teacher = (_all_logits(x)[0].float() / _TEMPERATURE for x in (output, teacher))
        divergence = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")
        return divergence * _TEMPERATURE**2

    # --- metrics and pictures -------------------------------------------------------------------------------------

    def metrics(self) -> "dict[str, Metric]":
        from torchmetrics.classification import MulticlassAccuracy

        count = len(self.classes)

        def top(k: int) -> "Metric":
            metric: Metric = MulticlassAccuracy(num_classes=count, top_k=min(k, count), average="micro")
            return metric

        fives = {"top5": top(5)} if count > 5 else {}  # among five all are
        return {"top1": top(1), **fives, "loss": image_mean()}

    def update(self, metrics: "Mapping[str, Metric]", output: Any, batch: Batch) -> None:
        logits, target = _all_logits(output)[0].float(), batch["target"]
        metrics["top1"].update(logits, target)
        if "top5" in metrics:
            metrics["top5"].update(logits, target)
        metrics["loss"].update(F.cross_entropy(logits, target, reduction="none"))

    def picture(self, batch: Batch, output: Any) -> Image.Image:
        logits, target = _all_logits(output)[0].float(), batch["target"]
        truth = target.argmax(1) if target.is_floating_point() else target
        cells, captions = [], []
        shares, guesses = logits.softmax(1).max(1)
        for index in range(min(PICTURES, len(truth))):
            cells.append(to_image(self.format().shown(batch["input"][index])))
            guess, true = self.classes[int(guesses[index])], self.classes[int(truth[index])]
            wrong = "" if guess == true else f" (is {true})"
            captions.append(f"{guess}{wrong} {100 * float(shares[index]):.0f} %")
        rows = [slice(start, start + 4) for start in range(0, len(cells), 4)]
        return sheet([cells[row] for row in rows], captions=[captions[row] for row in rows])


class SampleMaker:
    """(image, class) -> sample."""

    def __init__(self, image_format: ImageFormat, config: ClassificationConfig, train: bool) -> None:
        self.mode = "L" if image_format.size[0] == 1 else "RGB"
        self.transform: Callable[[Image.Image], Tensor] = make_transform(
            image_format,
            train=train and config.augment,
            crop_scale=config.crop_scale,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            erase=config.erase,
        )

    def __call__(self, item: tuple[Any, int], generator: torch.Generator) -> Sample:
        picture, label = item
        image = open_image(picture) if isinstance(picture, Path) else Image.fromarray(picture)
        with global_seed(generator):  # timm and torchvision draw from global state
            x = self.transform(as_mode(image, self.mode))
        return {"input": x, "target": torch.tensor(label)}


def _all_logits(output: Any) -> list[Tensor]:
    """Logits, followed by those of auxiliary classifiers (torchvision's GoogLeNet and Inception in training)."""
    parts = [output] if isinstance(output, Tensor) else list(output) if isinstance(output, Sequence) else []
    found = [part for part in parts if isinstance(part, Tensor)]
    if not found or found[0].dim() != 2:
        raise InputError(
            f"task classification: the model must return logits (N, classes), got a {type(output).__name__}"
        )
    return found


@cache
def _warn(text: str) -> None:
    logger.warning("%s", text)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
