"""Demosaicking: a full-color image from the one color that a Bayer sensor measures per pixel, with or without sensor noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from surgeon.errors import ConfigError
from surgeon.util.parse import number_range
from surgeon.zoo.bayer import PATTERNS, bayer_mask, tell_pattern
from surgeon.zoo.tasks.base import Batch, Sample, TaskConfig
from surgeon.zoo.tasks.data.draws import turned
from surgeon.zoo.tasks.data.images import cut, random_box, to_tensor, unpadded
from surgeon.zoo.tasks.registry import register
from surgeon.zoo.tasks.support.noise import heteroskedastic, log_uniform
from surgeon.zoo.tasks.support.pictures import to_image
from surgeon.zoo.tasks.support.restoration import RestorationConfig, RestorationTask

_CHANNELS = {"mosaic3": 3, "packed4": 4, "mosaic1": 1}


def arranged(mosaic: Tensor, layout: str) -> Tensor:
    """A mosaic (3, H, W), zero where nothing is measured, in a network's input layout.

    mosaic3: unchanged. mosaic1: (1, H, W), the measured value of each pixel. packed4: (4, H/2, W/2), the 2x2 cells row by row.
    """
    if layout == "mosaic3":
        return mosaic
    single = mosaic.sum(0, keepdim=True)
    return single if layout == "mosaic1" else torch.nn.functional.pixel_unshuffle(single, 2)


@dataclass(frozen=True, kw_only=True)
class DemosaickingConfig(RestorationConfig):
    """`pattern`: the sensor's 2x2 cell. `input`: mosaic3, packed4 or mosaic1 (see `arranged`).

    `shot` and `read` add noise of variance shot * x + read² for values x in [0, 1]; each is a number, or a range such as
    "1e-4-1e-2", from which every training patch draws its own value (log-uniform); validation uses the geometric mean.
    `border`: pixels on each side that the metrics ignore.
    """

    least: ClassVar[Mapping[str, float]] = {"shot": 0, "read": 0, "border": 0}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"input": ("mosaic3", "packed4", "mosaic1")}
    ranges: ClassVar[tuple[str, ...]] = ("shot", "read")

    pattern: str = "RGGB"
    input: str = "mosaic3"
    shot: float | str = 0.0
    read: float | str = 0.0
    border: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pattern", self.pattern.upper())
        if self.pattern not in PATTERNS:
            raise ConfigError(f"pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}")
        if self.color is False:
            raise ConfigError("demosaicking produces color images; color=false does not apply")
        if self.patch is not None and self.patch % 2:
            raise ConfigError(f"patch must be even, got {self.patch!r}")


@register
class Demosaicking(RestorationTask):
    """Color images sampled by a Bayer pattern, noise-free or with heteroskedastic noise (shot and read).

    Images are cropped to even sizes and patches start at even pixels. Networks without padding may return a frame less on all
    sides: the target is center-cropped. PSNR is over all pixels and channels of an image (CPSNR), averaged over images.
    """

    name: ClassVar[str] = "demosaicking"
    config_class: ClassVar[type[TaskConfig]] = DemosaickingConfig
    config: DemosaickingConfig
    patch: ClassVar[int] = 96

    def __init__(self, config: DemosaickingConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self.color = True

    def bind(self, model: torch.nn.Module) -> torch.nn.Module:
        model = super().bind(model)
        self.color = True
        tell_pattern(model, self.config.pattern)
        return model

    def target_channels(self) -> int:
        return 3

    def patch_side(self) -> int:
        if self.config.patch is None and self.config.input_size and self.config.input == "packed4":
            return self.config.input_size[1] * 2
        return super().patch_side() // 2 * 2

    def input_channels(self) -> int:
        return _CHANNELS[self.config.input]

    def input_side(self) -> int:
        return self.patch_side() // (2 if self.config.input == "packed4" else 1)

    def hint(self, factor: float | None = None) -> str:
        return f"; input={self.config.input} can be {', '.join(_CHANNELS)}"

    def train_sample(self, item: Path, generator: torch.Generator) -> Sample:
        image = self.read(item)
        box = random_box(image.height, image.width, self.patch_side(), generator, step=2)
        target = turned(to_tensor(cut(image, box)), self.turn(generator)).contiguous()
        shot = log_uniform(number_range("shot", self.config.shot), generator)
        read = log_uniform(number_range("read", self.config.read), generator)
        return {"input": self._sensed(target, shot, read, generator), "target": target}

    def val_sample(self, item: Path, generator: torch.Generator) -> Sample:
        image = self.read(item)
        target = to_tensor(image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2)))
        shot, read = (_middle(number_range(n, getattr(self.config, n))) for n in ("shot", "read"))
        return {"input": self._sensed(target, shot, read, generator), "target": target}

    def _sensed(self, image: Tensor, shot: float, read: float, generator: torch.Generator) -> Tensor:
        noisy = heteroskedastic(image, shot, read, generator) if shot or read else image
        mosaic = noisy * bayer_mask(self.config.pattern, *image.shape[1:])
        return arranged(mosaic, self.config.input)

    def measured(self, image: Tensor) -> Tensor:
        b = self.config.border
        return image[..., b:-b, b:-b] if b else image

    def shown_input(self, index: int, batch: Batch) -> Image.Image:
        x = unpadded(batch["input"], batch.get("input_size"))[index]
        return to_image((torch.nn.functional.pixel_shuffle(x, 2) if self.config.input == "packed4" else x)[0])


def _middle(bounds: tuple[float, float]) -> float:
    low, high = bounds
    return float((low * high) ** 0.5) if low > 0 else (low + high) / 2
