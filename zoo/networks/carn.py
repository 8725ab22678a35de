"""CARN-M: Ahn et al., "Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network" (2018), figures 2-3.

Cascading blocks of efficient residual blocks (two grouped 3x3 convolutions and a 1x1), which share their weights within a
cascading block (the recursive scheme of section 3.3). One set of weights serves the factors 2, 3 and 4, which differ only in
the sub-pixel upsampling behind the shared trunk.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.zoo.registry import register, zero_based

_MEAN = (0.4488, 0.4371, 0.4040)  # of the RGB values of DIV2K


class EfficientBlock(nn.Module):
    """x + (grouped 3x3, ReLU, grouped 3x3, ReLU, 1x1)(x), ReLU."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return torch.relu(x + self.mix(out))


class Fuse(nn.Module):
    """1x1 convolution of everything so far to `width` channels, ReLU."""

    def __init__(self, maps: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(maps * width, width, 1)

    def forward(self, *maps: Tensor) -> Tensor:
        return torch.relu(self.conv(torch.cat(maps, dim=1)))


def cascade(x: Tensor, blocks: Iterable[nn.Module], fuses: Iterable[nn.Module]) -> Tensor:
    """Figure 2: each block processes the last fused map; its result is fused with x and all earlier results."""
    maps = [x]
    for block, fuse in zip(blocks, fuses, strict=True):
        maps.append(block(x))
        x = fuse(*maps)
    return x


class CascadingBlock(nn.Module):
    """A cascade of one efficient block that is applied three times."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block = EfficientBlock(width, groups)
        self.fuse = nn.ModuleList(Fuse(count, width) for count in (2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return cascade(x, [self.block] * len(self.fuse), self.fuse)


class Upsample(nn.Module):
    """Sub-pixel convolutions to `scale` times the size; 4 is done as 2 times 2."""

    def __init__(self, scale: int, width: int, groups: int) -> None:
        super().__init__()
        factors = (2, 2) if scale == 4 else (scale,)
        self.convs = nn.ModuleList(nn.Conv2d(width, width * f * f, 3, padding=1, groups=groups) for f in factors)
        self.shuffles = nn.ModuleList(nn.PixelShuffle(f) for f in factors)

    def forward(self, x: Tensor) -> Tensor:
        for conv, shuffle in zip(self.convs, self.shuffles, strict=True):
            x = shuffle(torch.relu(conv(x)))
        return x


class CARNM(nn.Module):
    """RGB image (N, 3, H, W) in [0, 1] -> (N, 3, scale*H, scale*W), not clipped.

    `scale` is the default factor of `forward`.
    """

    mean: Tensor

    def __init__(self, scale: int = 4, scales: tuple[int, ...] = (2, 3, 4), width: int = 64, groups: int = 4) -> None:
        super().__init__()
        if not scales or not set(scales) <= {2, 3, 4} or scale not in scales:
            raise ConfigError(f"CARN-M enlarges 2, 3 or 4 times, got scale={scale!r} out of scales={scales!r}")
        self.scale = scale
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.entry = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(CascadingBlock(width, groups) for _ in range(3))
        self.fuse = nn.ModuleList(Fuse(count, width) for count in (2, 3, 4))
        self.upsample = nn.ModuleDict({f"x{factor}": Upsample(factor, width, groups) for factor in scales})
        self.exit = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, scale: int | None = None) -> Tensor:
        factor = scale or self.scale
        if f"x{factor}" not in self.upsample:
            raise ConfigError(f"this CARN-M enlarges by {', '.join(self.upsample)}, not x{factor}")
        x = self.entry(x - self.mean)
        x = cascade(x, self.blocks, self.fuse)
        x = self.upsample[f"x{factor}"](x)
        image: Tensor = self.exit(x) + self.mean
        return image


# Public weights: the mean of DIV2K as frozen 1x1 convolutions (dropped, it is a constant here), blocks b1..b3, fusions c1..c3.
_LAYOUT = (
    (r"^(sub|add)_mean\..*", ""),
    (r"^b(\d)\.b1\.body\.0\.", zero_based("blocks.{}.block.conv1.")),
    (r"^b(\d)\.b1\.body\.2\.", zero_based("blocks.{}.block.conv2.")),
    (r"^b(\d)\.b1\.body\.4\.", zero_based("blocks.{}.block.mix.")),
    (r"^b(\d)\.c(\d)\.body\.0\.", zero_based("blocks.{}.fuse.{}.conv.")),
    (r"^c(\d)\.body\.0\.", zero_based("fuse.{}.conv.")),
    (r"^upsample\.up(\d)\.body\.0\.", r"upsample.x\1.convs.0."),
    (r"^upsample\.up(\d)\.body\.3\.", r"upsample.x\1.convs.1."),
)


@register("carn_m", input_size=(3, 48, 48), layout=_LAYOUT)
def carn_m(scale: int = 4, scales: tuple[int, ...] = (2, 3, 4), width: int = 64, groups: int = 4) -> nn.Module:
    """CARN-M super-resolution x2, x3, x4 with one trunk, 0.41 M parameters."""
    return CARNM(scale, scales, width, groups)
