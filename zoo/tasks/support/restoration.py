"""Base of the tasks that output an image: trained on patches, evaluated on whole images by PSNR and SSIM."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from surgeon.errors import ConfigError, InputError
from surgeon.zoo.tasks.base import Batch, Sample, Split, Task, TaskDataset
from surgeon.zoo.tasks.data.datasets import ItemDataset
from surgeon.zoo.tasks.data.draws import integer
from surgeon.zoo.tasks.data.files import (
    FolderConfig,
    check_images,
    chosen,
    find_roots,
    image_size,
    list_images,
    refuse_reduced,
)
from surgeon.zoo.tasks.data.images import Reader, by_size, center, collate_padded, in_tiles, on_multiple, unpadded
from surgeon.zoo.tasks.support.metrics import image_mean, pixel_loss, psnr, ssim
from surgeon.zoo.tasks.support.pictures import sheet, to_image
from surgeon.zoo.tasks.support.probe import describe, first_channels, trial

if TYPE_CHECKING:
    from torchmetrics import Metric

PICTURES = 4  # samples shown by `picture`
SMALLEST = 16  # smallest side in pixels for SSIM


@dataclass(frozen=True, kw_only=True)
class RestorationConfig(FolderConfig):
    """Options of restoration tasks, in addition to those of folders.

    `patch` is the side of a training sample in pixels of the target; it defaults to `input_size`, if given, otherwise to the
    task's own. `patches_per_image` is how often a pass over the set uses each image. `augment` draws one of the 8 symmetries of the
    square. `color`: RGB or gray; by default as the model's first convolution. `multiple`: whole images are padded
    to a multiple of this many pixels and the result cropped, for networks that downsample several times. `tile`: whole images run
    in tiles of this many input pixels, which see `tile_overlap` pixels of their neighbors; multiples of 8.
    """

    choices: ClassVar[Mapping[str, tuple[int | str, ...]]] = {"loss": ("l1", "mse", "charbonnier")}
    least: ClassVar[Mapping[str, float]] = {"patch": 1, "patches_per_image": 1, "multiple": 1, "tile_overlap": 0}

    patch: int | None = None
    patches_per_image: int = 1
    augment: bool = True
    color: bool | None = None
    loss: str = "l1"
    multiple: int = 1
    tile: int | None = None
    tile_overlap: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_square()
        if self.tile_overlap % 8 or (self.tile or 0) % 8:
            raise ConfigError(
                f"tile and tile_overlap must be multiples of 8, got {self.tile!r} and {self.tile_overlap!r}"
            )
        if self.tile is not None and self.tile <= 2 * self.tile_overlap:
            raise ConfigError(f"tile must be more than twice tile_overlap={self.tile_overlap}, got {self.tile!r}")


class RestorationTask(Task):
    """A task whose target is an image. Subclasses define what is read and how an input is made from it."""

    config: RestorationConfig
    primary: ClassVar[str] = "psnr"
    higher_is_better: ClassVar[bool] = True
    patch: ClassVar[int] = 64

    def __init__(self, config: RestorationConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        given = config.input_size[0] != 1 if config.input_size else True
        self.color = given if config.color is None else config.color
        self._readers: dict[str, Reader] = {}

    # --- defined by subclasses ------------------------------------------------------------------------------------

    @abstractmethod
    def train_sample(self, item: Any, generator: torch.Generator) -> Sample:
        """A patch, augmented."""

    @abstractmethod
    def val_sample(self, item: Any, generator: torch.Generator) -> Sample:
        """A whole image."""

    def restored(self, output: Any, batch: Batch) -> Tensor:
        """The image represented by a model's output."""
        image: Tensor = output
        return image

    def measured(self, image: Tensor) -> Tensor:
        """The part of an image that the metrics use, in their color space."""
        return image

    def input_channels(self) -> int:
        return self.target_channels()

    def input_side(self) -> int:
        """Side of a training input in pixels."""
        return self.patch_side()

    # --- shared by all --------------------------------------------------------------------------------------------

    def target_channels(self) -> int:
        return 3 if self.color else 1

    def patch_side(self) -> int:
        """Side of a training target in pixels."""
        if self.config.patch is not None:
            return self.config.patch
        return self.config.input_size[1] if self.config.input_size else self.patch

    def read(self, path: Path) -> Image.Image:
        """An image in the task's mode, from memory if it was read before."""
        mode = "RGB" if self.color else "L"
        return self._readers.setdefault(mode, Reader(mode))(path)

    def turn(self, generator: torch.Generator) -> int:
        """The symmetry of a training sample, for `turned`."""
        return integer(0, 7, generator) if self.config.augment else 0

    def items(self, split: Split) -> Sequence[tuple[int, Any]]:
        """(number, source of a sample) of a split."""
        roots = find_roots(self.name, self.config)
        folder = roots.of(split)
        return chosen(self.list_items(folder), split, self.config, roots.divided)

    def list_items(self, folder: Path) -> Sequence[Any]:
        """All samples of a folder."""
        refuse_reduced(self.name, folder)
        return list_images(folder)

    def check(self) -> None:
        check_splits(self, lambda items, least: check_images(self.name, items, size_check(least)), self.patch_side())

    def dataset(self, split: Split) -> TaskDataset:
        items = self.items(split)
        if split == "train":
            repeats = self.config.patches_per_image
            return ItemDataset(items, self.train_sample, seed=self.seed, fixed=False, repeats=repeats)
        return ItemDataset(items, self.val_sample, seed=self.config.val_stream, fixed=True)

    def bind(self, model: nn.Module) -> nn.Module:
        if self.config.color is None and self.config.input_size is None:
            self.color = first_channels(model) != 1
        frame = self._frame(model, 1)
        if frame and (other := self._frame(model, 2)) != frame:
            side, out = self.input_side(), self.patch_side()
            found = (out - frame, 2 * out - other)
            sizes = [f"{one}x{one}" for one in (side, 2 * side, *found, out, 2 * out)]
            raise InputError(
                f"task {self.name}: for inputs of {sizes[0]} and {sizes[1]} the model returns {sizes[2]} and {sizes[3]}, but "
                f"the task needs {sizes[4]} and {sizes[5]} (or the same frame less){self.hint((found[1] - found[0]) / side)}"
            )
        return model

    def _frame(self, model: nn.Module, times: int) -> int:
        """Pixels missing from the output in each direction, for an input `times` as large as in training; always even."""
        side, out = times * self.input_side(), times * self.patch_side()
        size = (self.input_channels(), side, side)
        output = trial(self.name, model, lambda x: self.forward(model, {"input": x}), *size, hint=self.hint())
        wanted = (2, self.target_channels(), out, out)
        fits = isinstance(output, Tensor) and output.dim() == 4 and output.shape[:2] == wanted[:2]
        if not fits or output.shape[2] != output.shape[3] or output.shape[2] > out or (out - output.shape[2]) % 2:
            hint = "; this is no image: the task takes networks that return one, not classifiers"
            if isinstance(output, Tensor) and output.dim() == 4:
                height, width = output.shape[2:]
                hint = self.hint(height / side if height == width != out else None)
            raise InputError(
                f"task {self.name}: the model returns {describe(output)} for an input of {(2, *size)}, "
                f"but the task needs {wanted} (or a frame less on all four sides){hint}"
            )
        return out - int(output.shape[2])

    def hint(self, factor: float | None = None) -> str:
        """Suggestion for a model that does not fit; `factor` is how much it enlarges, if that is known."""
        return ""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return collate_padded(samples)

    def run_whole(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's output for whole images of one size."""

        def run(x: Tensor) -> Tensor:
            out: Tensor = self.forward(model, {"input": x})
            return out

        scale, tile = self.patch_side() // self.input_side(), self.config.tile

        def whole(x: Tensor) -> Tensor:
            return on_multiple(run, x, self.multiple, scale)

        return whole(x) if tile is None else in_tiles(whole, x, tile, self.config.tile_overlap, scale)

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        return by_size(lambda x: self.run_whole(model, x), batch["input"], batch.get("input_size"))

    def pairs(self, output: Any, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """(image, target) of every sample, (1, C, H, W), of the same size."""
        images, targets = self.restored(output, batch), batch["target"]
        frame = [targets.shape[dim] - images.shape[dim] for dim in (2, 3)]
        sizes = batch.get("target_size")
        inner = None if sizes is None else sizes - torch.tensor(frame, device=sizes.device)
        cut = unpadded(images, inner)
        return [(a, center(b, *a.shape[-2:])) for a, b in zip(cut, unpadded(targets, sizes), strict=True)]

    def loss(self, output: Any, batch: Batch) -> Tensor:
        if "target_size" in batch:  # every image counts the same regardless of its size
            return torch.stack([pixel_loss(self.config.loss, *pair) for pair in self.pairs(output, batch)]).mean()
        image = self.restored(output, batch)
        return pixel_loss(self.config.loss, image, center(batch["target"], *image.shape[-2:]))

    def metrics(self) -> "dict[str, Metric]":
        return {"psnr": image_mean(), "ssim": image_mean()}

    def update(self, metrics: "Mapping[str, Metric]", output: Any, batch: Batch) -> None:
        for image, target in self.pairs(output, batch):
            image, target = self.measured(image), self.measured(target)
            metrics["psnr"].update(psnr(image, target))
            metrics["ssim"].update(ssim(image, target))

    def shown_input(self, index: int, batch: Batch) -> Image.Image:
        """Picture of an input."""
        return to_image(unpadded(batch["input"], batch.get("input_size"))[index][0])

    def picture(self, batch: Batch, output: Any) -> Image.Image:
        rows, captions = [], []
        for index, (image, target) in enumerate(self.pairs(output, batch)[:PICTURES]):
            value = float(psnr(self.measured(image), self.measured(target)))
            rows.append([self.shown_input(index, batch), to_image(image[0]), to_image(target[0])])
            captions.append(["", f"{value:.2f} dB", ""])
        return sheet(rows, ("input", "output", "target"), captions)


def size_check(least: int) -> Callable[[Path], str | None]:
    """Check for `check_images`: the problem with an image smaller than `least` pixels in one direction."""

    def also(path: Path) -> str | None:
        height, width = image_size(path)
        if min(height, width) < least:
            hint = "; give a smaller patch=" if least > SMALLEST else ""
            return f"{path}: {width}x{height} pixels, smaller than {least}x{least}{hint}"
        return None

    return also


def check_splits(task: RestorationTask, check: Callable[[Sequence[Any], int], None], patch: int) -> None:
    """`check(items, smallest side)` for both splits, or only for "val" if there is no other."""
    roots = find_roots(task.name, task.config)
    if roots.train is not None:
        check([item for _, item in task.items("train")], patch)
    check([item for _, item in task.items("val")], SMALLEST)
