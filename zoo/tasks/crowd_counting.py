"""Crowd counting: a density map whose sum is the number of people."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from surgeon.errors import ConfigError, DataError, InputError
from surgeon.zoo.tasks.base import Batch, Sample, Split, Task, TaskConfig, TaskDataset
from surgeon.zoo.tasks.data.datasets import ItemDataset
from surgeon.zoo.tasks.data.draws import integer
from surgeon.zoo.tasks.data.files import FolderConfig, check_images, chosen, find_roots, image_size, look_through
from surgeon.zoo.tasks.data.images import (
    Box,
    Reader,
    by_size,
    collate_padded,
    continued,
    cut,
    random_box,
    to_tensor,
    unpadded,
)
from surgeon.zoo.tasks.data.points import point_files, read_points
from surgeon.zoo.tasks.data.transforms import ImageFormat
from surgeon.zoo.tasks.registry import register
from surgeon.zoo.tasks.support.density import adaptive_sigmas, density_map
from surgeon.zoo.tasks.support.pictures import heat, sheet, to_image
from surgeon.zoo.tasks.support.probe import describe, first_channels, trial
from surgeon.zoo.tasks.support.restoration import size_check

if TYPE_CHECKING:
    from torchmetrics import Metric

Pair = tuple[Path, Path]
PICTURES = 3
_TOLERANCE = 2.0  # pixels by which a point may be outside (annotations that count from 1 and round up)
_GREY: tuple[tuple[float, ...], ...] = (127.5 / 255,), (128 / 255,)  # mean and deviation of the zoo's MCNN


@dataclass(frozen=True, kw_only=True)
class CrowdConfig(FolderConfig):
    """`sigma`: spread of a head in pixels of the image, or "adaptive", 0.3 of the mean distance to its 3 nearest neighbors.

    `stride`: pixels of the image per cell of the density map, in each direction; None: the model's. `patch`: side of
    training crops. `outside`: how to treat points outside the image: error, clip (to the border) or drop.
    `density_scale`: the model outputs the density times this number.
    """

    least: ClassVar[Mapping[str, float]] = {"stride": 1, "patch": 1}
    above: ClassVar[Mapping[str, float]] = {"sigma": 0, "density_scale": 0}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"outside": ("error", "clip", "drop")}

    sigma: float | str = 4.0
    stride: int | None = None
    patch: int | None = None
    augment: bool = True
    color: bool | None = None
    outside: str = "error"
    density_scale: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.sigma, str) and self.sigma != "adaptive":
            try:
                object.__setattr__(self, "sigma", float(self.sigma))
            except ValueError:
                raise ConfigError(f"sigma must be a number of pixels or adaptive, got {self.sigma!r}") from None
        super().__post_init__()
        self.check_square()


@register
class CrowdCounting(Task):
    """Heads marked by points.

    Data: images, and for each one a file of points (x, y) of the same name (.npy, .json or .mat; also `GT_NAME` and `NAME_ann`),
    next to it or in a sibling folder `ground_truth/`. Trains on crops, counts whole images. The loss is the squared error
    summed over the density map, averaged over images (Zhang et al. 2016, equation 2, without its factor 1/2). `mae` is the mean
    absolute error of the count; `mse` is what crowd papers call by that name: the ROOT of the mean squared error.
    """

    name: ClassVar[str] = "crowd-counting"
    config_class: ClassVar[type[TaskConfig]] = CrowdConfig
    primary: ClassVar[str] = "mae"
    higher_is_better: ClassVar[bool] = False
    config: CrowdConfig

    def __init__(self, config: CrowdConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.stride = config.stride or 4
        self._multiple = 1  # whole images are padded to a multiple of this many pixels
        channels = config.input_size[0] if config.input_size else 3
        self._set_format(None, channels if config.color is None else 3 if config.color else 1)

    def _set_format(self, model: nn.Module | None, channels: int) -> None:
        form = ImageFormat.of(model, side=256).with_channels(channels)
        gray = channels == 1 and not isinstance(getattr(model, "pretrained_cfg", None), dict)
        mean, std = _GREY if gray else (form.mean, form.std)
        self.mean, self.std = self.config.mean or mean, self.config.std or std
        if len(self.mean) != channels or len(self.std) != channels:
            raise ConfigError(f"task {self.name}: mean={self.mean} and std={self.std} must have {channels} values each")
        self.channels, self.models_own = channels, form.own
        self.read_image = Reader("L" if channels == 1 else "RGB")

    def preprocessing(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}

    @property
    def multiple(self) -> int:
        return self._multiple

    @property
    def patch(self) -> int:
        """Side of a training crop in pixels, a multiple of the stride."""
        side = self.config.patch or (self.config.input_size[1] if self.config.input_size else 256)
        return max(side // self.stride, 1) * self.stride

    # --- data -----------------------------------------------------------------------------------------------------

    def items(self, split: Split) -> list[tuple[int, Pair]]:
        """(number, (picture, file of points)) of a split."""
        roots = find_roots(self.name, self.config)
        folder = roots.of(split)
        return chosen(point_files(folder), split, self.config, roots.divided)

    def check(self) -> None:
        splits: list[tuple[Split, int]] = [("train", self.patch), ("val", 1)]
        for split, least in splits if find_roots(self.name, self.config).train is not None else splits[1:]:
            pairs = [pair for _, pair in self.items(split)]
            check_images(self.name, [picture for picture, _ in pairs], size_check(least))
            look_through(f"task {self.name}: points that cannot be used", pairs, self._bad_points)

    def _bad_points(self, pair: Pair) -> str | None:
        try:
            self._points(pair, *image_size(pair[0]))
        except DataError as error:
            return str(error)
        return None

    def _points(self, pair: Pair, height: int, width: int) -> np.ndarray:
        """Points inside the image."""
        points = read_points(pair[1], (height, width))
        low, high = np.zeros(2), np.array([width - 1, height - 1])
        outside = ((points < low - _TOLERANCE) | (points > high + _TOLERANCE)).any(1)
        if outside.any():
            if self.config.outside == "error":
                x, y = points[outside][0]
                raise DataError(
                    f"{pair[1]}: {int(outside.sum())} of {len(points)} points are outside {pair[0].name} ({width}x{height}), "
                    f"the first at ({x:g}, {y:g}); use outside=clip or outside=drop to continue"
                )
            if self.config.outside == "drop":
                points = points[~outside]
        inside: np.ndarray = np.clip(points, low, high)
        return inside

    def _sigmas(self, points: np.ndarray, height: int, width: int) -> np.ndarray:
        if self.config.sigma == "adaptive":
            return adaptive_sigmas(points, height, width)
        return np.full(len(points), float(self.config.sigma))

    def sample(self, pair: Pair, place: Callable[[int, int], Box]) -> Sample:
        """The box `place(height, width)` of an image: input, density (target) and its number of people (count)."""
        image = self.read_image(pair[0])
        height, width = image.height, image.width
        box = place(height, width)
        points = self._points(pair, height, width)
        target = density_map(points, self._sigmas(points, height, width), height, width, self.stride, box)
        mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        x = (to_tensor(cut(image, box)) - mean) / std
        count = float(len(points)) if box[2:] == (height, width) else float(target.sum())
        return {"input": x, "target": target, "count": torch.tensor(count)}

    def train_sample(self, pair: Pair, generator: torch.Generator) -> Sample:
        sample = self.sample(pair, lambda h, w: random_box(h, w, self.patch, generator, step=self.stride))
        if self.config.augment and integer(0, 1, generator):
            sample |= {key: sample[key].flip(-1) for key in ("input", "target")}
        return sample

    def val_sample(self, pair: Pair, generator: torch.Generator) -> Sample:
        return self.sample(pair, lambda h, w: (0, 0, h, w))

    def dataset(self, split: Split) -> TaskDataset:
        items = self.items(split)
        if split == "train":
            return ItemDataset(items, self.train_sample, seed=self.seed, fixed=False)
        return ItemDataset(items, self.val_sample, seed=self.config.val_stream, fixed=True)

    # --- model ----------------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module) -> nn.Module:
        channels = self.channels
        if self.config.color is None and self.config.input_size is None:
            channels = 1 if first_channels(model) == 1 else 3
        self._set_format(model, channels)
        side = max(self.patch, 64) // 64 * 64
        output = trial(self.name, model, model, channels, side, side)
        if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[1] != 1:
            raise InputError(f"task {self.name}: the model returns {describe(output)}, not a density map (N, 1, H, W)")
        found = round(side / output.shape[-1])
        if -(-side // found) != output.shape[-1] or output.shape[-1] != output.shape[-2]:
            raise InputError(f"task {self.name}: a map of {describe(output)} for {side} pixels has no whole stride")
        if self.config.stride is not None and self.config.stride != found:
            raise InputError(
                f"task {self.name}: the model's stride is {found}, the option says stride={self.config.stride}"
            )
        self.stride = found
        odd = trial(self.name, model, model, channels, side + 1, side + 1)
        # models that round down lose a border
        self._multiple = 1 if odd.shape[-1] == -(-(side + 1) // found) else found
        return model

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return collate_padded(samples)

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        def whole(x: Tensor) -> Tensor:
            density: Tensor = model(x)
            return density

        return by_size(lambda x: continued(whole, x, self.multiple), batch["input"], batch.get("input_size"))

    def loss(self, output: Any, batch: Batch) -> Tensor:
        difference: Tensor = output.float() - batch["target"] * self.config.density_scale
        return difference.square().sum((1, 2, 3)).mean()

    def distillation_loss(self, output: Any, teacher: Any) -> Tensor:
        """Summed over the map, like the loss."""
        difference: Tensor = output.float() - teacher.float()
        return difference.square().sum((1, 2, 3)).mean()

    def metrics(self) -> "dict[str, Metric]":
        from torchmetrics import MeanAbsoluteError, MeanSquaredError

        return {"mae": MeanAbsoluteError(), "mse": MeanSquaredError(squared=False)}

    def counts(self, output: Tensor) -> Tensor:
        """Number of people per image (N)."""
        people: Tensor = output.float().sum((1, 2, 3)) / self.config.density_scale
        return people

    def update(self, metrics: "Mapping[str, Metric]", output: Any, batch: Batch) -> None:
        for metric in metrics.values():
            metric.update(self.counts(output), batch["count"])

    def picture(self, batch: Batch, output: Any) -> Image.Image:
        rows, captions = [], []
        images = unpadded(batch["input"], batch.get("input_size"))
        maps = unpadded(output / self.config.density_scale, batch.get("target_size"))
        targets = unpadded(batch["target"], batch.get("target_size"))
        mean, std = (torch.tensor(v, device=output.device).view(-1, 1, 1) for v in (self.mean, self.std))
        for index in range(min(PICTURES, len(images))):
            top = float(targets[index].max())
            rows.append(
                [to_image(images[index][0] * std + mean), *(heat(m[index][0, 0], top) for m in (maps, targets))]
            )
            counts = float(self.counts(output)[index].detach()), float(batch["count"][index])
            captions.append(["", *(f"{count:.1f}" for count in counts)])
        return sheet(rows, ("input", "output", "target"), captions)
