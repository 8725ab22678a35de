"""Gaussian denoising, gray and color, with a fixed or an unknown noise level."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgeon.errors import ConfigError
from surgeon.util.parse import number_range
from surgeon.zoo.tasks.base import Batch, Sample, TaskConfig
from surgeon.zoo.tasks.data.draws import turned, uniform
from surgeon.zoo.tasks.data.images import cut, random_box, to_tensor
from surgeon.zoo.tasks.registry import register
from surgeon.zoo.tasks.support.noise import gaussian
from surgeon.zoo.tasks.support.restoration import RestorationConfig, RestorationTask


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig(RestorationConfig):
    """`sigma` in gray levels of 255: a number, or a range such as "0-55", from which every training patch draws its own (blind).

    `val_sigma` is the level for validation; by default `sigma`, or for a range 25 if it contains 25, otherwise its middle.
    `predicts`: whether the model outputs the image or the noise.
    """

    least: ClassVar[Mapping[str, float]] = {"sigma": 0, "val_sigma": 0}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"predicts": ("image", "noise")}
    ranges: ClassVar[tuple[str, ...]] = ("sigma", "val_sigma")

    sigma: float | str = 25.0
    val_sigma: float | None = None
    predicts: str = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sigma", "val_sigma"):
            value = getattr(self, name)
            if value is not None and 0 < (most := number_range(name, value)[1]) < 1:
                raise ConfigError(f"{name} is in gray levels of 255: {value!r} is less than one; write {255 * most:g}")


@register
class Denoising(RestorationTask):
    """White Gaussian noise on clean images, not clipped (Zhang et al. 2017, DnCNN).

    Data: folders of images. Trains on patches with fresh noise; evaluates whole images, each with its own noise, the same
    in every run. PSNR and SSIM are means over images.
    """

    name: ClassVar[str] = "denoising"
    config_class: ClassVar[type[TaskConfig]] = DenoisingConfig
    config: DenoisingConfig

    def val_sigma(self) -> float:
        """Noise level of validation images, gray levels."""
        if self.config.val_sigma is not None:
            return float(self.config.val_sigma)
        low, high = number_range("sigma", self.config.sigma)
        return 25.0 if low <= 25 <= high else (low + high) / 2

    def train_sample(self, item: Path, generator: torch.Generator) -> Sample:
        image = self.read(item)
        box = random_box(image.height, image.width, self.patch_side(), generator)
        target = turned(to_tensor(cut(image, box)), self.turn(generator)).contiguous()
        sigma = uniform(*number_range("sigma", self.config.sigma), generator)
        return {"input": gaussian(target, sigma / 255, generator), "target": target}

    def val_sample(self, item: Path, generator: torch.Generator) -> Sample:
        target = to_tensor(self.read(item))
        return {"input": gaussian(target, self.val_sigma() / 255, generator), "target": target}

    def restored(self, output: Any, batch: Batch) -> Tensor:
        image: Tensor = batch["input"] - output if self.config.predicts == "noise" else output
        return image

    def hint(self, factor: float | None = None) -> str:
        return "; color=true or color=false chooses between RGB and gray"
