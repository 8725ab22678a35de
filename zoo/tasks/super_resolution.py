"""Single-image super-resolution x2, x3, x4 from bicubic downsampling."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.zoo.tasks.base import Batch, Sample, TaskConfig
from surgeon.zoo.tasks.data.draws import turned, turned_back
from surgeon.zoo.tasks.data.images import Box, luma, random_box, to_tensor
from surgeon.zoo.tasks.registry import register
from surgeon.zoo.tasks.support.metrics import eight_bit
from surgeon.zoo.tasks.support.probe import takes
from surgeon.zoo.tasks.support.restoration import RestorationConfig, RestorationTask

_MARGIN = 8  # low-resolution pixels around a patch within reach of bicubic down- and upsampling (2 each)


@dataclass(frozen=True, kw_only=True)
class SuperResolutionConfig(RestorationConfig):
    """`patch` is in pixels of the large image and is a multiple of `scale`.

    `input`: "lr", the small image, or "bicubic", upsampled to the target's size before the network sees it (SRCNN).
    `color=false` uses only the luma Y. `self_ensemble`: predictions are means over the 8 symmetries of the square.
    """

    choices: ClassVar[Mapping[str, tuple[int | str, ...]]] = {"scale": (2, 3, 4), "input": ("lr", "bicubic")}

    scale: int = 2
    input: str = "lr"
    self_ensemble: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch is not None and self.patch % self.scale:
            raise ConfigError(f"patch must be a multiple of scale {self.scale}, got {self.patch!r}")


@register
class SuperResolution(RestorationTask):
    """Upscale what a bicubic filter has downsampled.

    Images are cropped to a multiple of `scale` and downsampled by PIL's bicubic filter: the kernel of MATLAB's imresize (a = -0.5,
    widened against aliasing), except that results of the horizontal pass are rounded to 8 bits and that
    the filter is truncated, not mirrored, at the borders. PSNR and SSIM are computed on the luma Y of BT.601 of 8-bit images,
    without a border of `scale` pixels, means over images.
    """

    name: ClassVar[str] = "super-resolution"
    config_class: ClassVar[type[TaskConfig]] = SuperResolutionConfig
    config: SuperResolutionConfig
    patch: ClassVar[int] = 96

    def __init__(self, config: SuperResolutionConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self._takes_scale = False

    def patch_side(self) -> int:
        if self.config.patch is None and self.config.input_size and self.config.input == "lr":
            return self.config.input_size[1] * self.config.scale
        return super().patch_side() // self.config.scale * self.config.scale

    def input_side(self) -> int:
        return self.patch_side() // (self.config.scale if self.config.input == "lr" else 1)

    def read(self, path: Path) -> Image.Image:
        """RGB even for luma: the downsampling is done on the color image."""
        color, self.color = self.color, True
        try:
            return super().read(path)
        finally:
            self.color = color

    def bind(self, model: nn.Module) -> nn.Module:
        self._takes_scale = takes(model, "scale")
        return super().bind(model)

    def hint(self, factor: float | None = None) -> str:
        text = "; input=bicubic is for networks that do not upscale, color=false for those that take luma"
        if factor == 1 and self.config.input == "lr":
            text = "; this network does not upscale: input=bicubic"
        elif factor is not None and factor > 1 and factor.is_integer():
            text = f"; this network enlarges by {factor:g}: scale={factor:g} input=lr"
            text += f", or for a zoo network --model-args scale={self.config.scale}"
        return f"{text}; this task has scale={self.config.scale}"

    # --- samples --------------------------------------------------------------------------------------------------

    def train_sample(self, item: Path, generator: torch.Generator) -> Sample:
        image, scale, side = self.read(item), self.config.scale, self.patch_side()
        height, width = (length // scale * scale for length in (image.height, image.width))
        box = random_box(height, width, side, generator, step=scale)
        x, y = self._degraded(image.crop((0, 0, width, height)), box)
        turn = self.turn(generator)
        return {"input": turned(x, turn).contiguous(), "target": turned(y, turn).contiguous()}

    def val_sample(self, item: Path, generator: torch.Generator) -> Sample:
        image, scale = self.read(item), self.config.scale
        height, width = (length // scale * scale for length in (image.height, image.width))
        x, y = self._degraded(image.crop((0, 0, width, height)), (0, 0, height, width))
        return {"input": x, "target": y}

    def _degraded(self, image: Image.Image, box: Box) -> tuple[Tensor, Tensor]:
        """(input, target) in a box, cropped from the degraded whole image."""
        top, left, height, width = box
        scale, margin = self.config.scale, _MARGIN * self.config.scale
        y0, x0 = max(top - margin, 0), max(left - margin, 0)
        y1, x1 = min(top + height + margin, image.height), min(left + width + margin, image.width)
        region = image.crop((x0, y0, x1, y1))
        small = region.resize((region.width // scale, region.height // scale), Image.Resampling.BICUBIC)
        factor = scale
        if self.config.input == "bicubic":
            small, factor = small.resize(region.size, Image.Resampling.BICUBIC), 1
        a, b = (top - y0) // factor, (left - x0) // factor
        x = to_tensor(small)[:, a : a + height // factor, b : b + width // factor]
        y = to_tensor(image.crop((left, top, left + width, top + height)))
        return (x, y) if self.color else (luma(x), luma(y))

    # --- prediction -----------------------------------------------------------------------------------------------

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(batch["input"], scale=self.config.scale) if self._takes_scale else model(batch["input"])

    def run_whole(self, model: nn.Module, x: Tensor) -> Tensor:
        if not self.config.self_ensemble:
            return super().run_whole(model, x)
        outputs = [
            turned_back(super(SuperResolution, self).run_whole(model, turned(x, turn)), turn) for turn in range(8)
        ]
        return torch.stack(outputs).mean(0)

    def measured(self, image: Tensor) -> Tensor:
        scale = self.config.scale
        image = eight_bit(image)
        return (luma(image) if self.color else image)[..., scale:-scale, scale:-scale]
