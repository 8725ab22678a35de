"""Iterative residual demosaicking: Kokkinos & Lefkimmatis, "Iterative Joint Image Demosaicking and Denoising Using a Residual
Denoising Network" (2019), as used in PAFU's Table 3.

A majorization-minimization scheme of K steps. Each extrapolates from the last two images, restores the measured values, and
has one residual denoiser (shared by all steps) predict what to subtract, a residual whose norm is bounded by that of noise
at this level. Differences from the authors' network: no weight normalization and no subtraction of the filters' mean,
which affect training but not the class of functions; the noise level is given (`noise`, 1/255 by default),
while theirs is estimated from each mosaic (median of the finest wavelet coefficients, WMAD); the bilinear start reflects at
the border, while theirs pads with zeros. PAFU replaces the denoiser's input convolution, with 16 kernels.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import ConfigError, InputError
from surgeon.records.recipe import Rule
from surgeon.zoo.bayer import bayer_cell
from surgeon.zoo.registry import register
from surgeon.zoo.surgery import operate

_SIZE = (3, 48, 48)
_NOISE = 1 / 255
RULES = (Rule(layers="denoiser.entry", type="pafu", options={"group_size": 16}),)


class ResidualBlock(nn.Module):
    """PReLU, 3×3 convolution, PReLU, 3×3 convolution, each reflecting at the border; plus the input if `shortcut`."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.act1 = nn.PReLU(width, init=0.1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.act2 = nn.PReLU(width, init=0.1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.act2(self.conv1(self.act1(x))))
        return x + y if self.shortcut else y


class ResDNet(nn.Module):
    """Image (N, C, H, W) and noise bound (N) -> residual (N, C, H, W) whose norm is at most the bound times sqrt(C·H·W - 1)."""

    def __init__(self, channels: int = 3, depth: int = 5, width: int = 64) -> None:
        super().__init__()
        self.entry = nn.Conv2d(channels, width, 5, padding=2, padding_mode="reflect")
        self.blocks = nn.Sequential(*(ResidualBlock(width, shortcut=i > 0) for i in range(depth)))
        self.exit = nn.ConvTranspose2d(width, channels, 5, padding=2)

    def forward(self, x: Tensor, bound: Tensor) -> Tensor:
        residual = self.exit(self.blocks(self.entry(x)))
        # Of a tensor: exporters turn the square root of a symbolic size into a constant.
        root = torch.scalar_tensor(x[0].numel() - 1, dtype=torch.float64, device=bound.device).sqrt()
        most = bound.view(-1, 1, 1, 1) * root.to(bound.dtype)
        norm = residual.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        bounded: Tensor = residual * (most / torch.maximum(norm, most))
        return bounded


class IterativeDemosaic(nn.Module):
    """Mosaic (N, 3, H, W) in [0, 1], zero where a color was not measured -> image (N, 3, H, W) in [0, 1].

    The measured values are restored where the sensor has them: `pattern` is its 2x2 cell, row by row. By default it is the
    task's once the two are bound (`use_pattern`), and RGGB until then. It is saved with the weights.
    `noise` is the standard deviation of the mosaic's noise, a number or one per image; the default is 1/255.
    """

    cell: Tensor

    def __init__(self, steps: int = 10, depth: int = 5, width: int = 64, pattern: str | None = None) -> None:
        super().__init__()
        if steps < 1 or depth < 1:
            raise ConfigError(f"iterative demosaicking has at least one step and one block, got {steps} and {depth}")
        self.pattern = pattern
        self.register_buffer("cell", bayer_cell(pattern or "RGGB"))
        self.denoiser = ResDNet(3, depth, width)
        self.bounds = nn.Parameter(torch.linspace(math.log(2), 0, steps))  # log of the bound in units of the noise
        start = [k / (k + 3) for k in range(1, steps)]  # Nesterov's extrapolation
        self.extrapolation = nn.Parameter(torch.tensor(start).log())

    def use_pattern(self, pattern: str) -> None:
        """Work on mosaics of this sensor. Raises `InputError` if the network was built for another."""
        if self.pattern not in (None, pattern):
            raise InputError(
                f"the network restores the values of a {self.pattern} sensor, but the mosaics are {pattern}; build the network "
                f"with pattern={pattern}, or without a pattern, or give the task pattern={self.pattern}"
            )
        self.cell.copy_(bayer_cell(pattern))

    def forward(self, mosaic: Tensor, noise: Tensor | float = _NOISE) -> Tensor:
        height, width = mosaic.shape[-2:]
        mask = self.cell.repeat(1, (height + 1) // 2, (width + 1) // 2)[:, :height, :width]
        level = torch.as_tensor(noise, dtype=mosaic.dtype, device=mosaic.device).expand(mosaic.shape[0])
        before = now = _bilinear(mosaic)
        for step, bound in enumerate(self.bounds):
            guess = now if step == 0 else now + self.extrapolation[step - 1].exp() * (now - before)
            measured = guess - (mask * guess - mosaic)
            before, now = now, (measured - self.denoiser(measured, bound.exp() * level)).clamp(0, 1)
        return now


def _bilinear(mosaic: Tensor) -> Tensor:
    """Every color interpolated from its measured neighbors."""
    corner = mosaic.new_tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4
    cross = mosaic.new_tensor([[0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 4
    kernels = torch.stack([corner, cross, corner])[:, None]
    padded = nn.functional.pad(mosaic, (1, 1, 1, 1), mode="reflect")
    return nn.functional.conv2d(padded, kernels, groups=3)


@register("iterative_demosaic", input_size=_SIZE)
def iterative_demosaic(steps: int = 10, depth: int = 5, width: int = 64, pattern: str | None = None) -> nn.Module:
    """Iterative residual demosaicking, 10 steps of one residual denoiser, 0.38 M parameters."""
    return IterativeDemosaic(steps, depth, width, pattern)


@register("pafu_iterative_demosaic", input_size=_SIZE, plain="iterative_demosaic", rules=RULES)
def pafu_iterative_demosaic(
    steps: int = 10,
    depth: int = 5,
    width: int = 64,
    pattern: str | None = None,
    layer_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Iterative residual demosaicking with a PAFU of 16 kernels as the denoiser's input layer (PAFU Table 3)."""
    return operate(IterativeDemosaic(steps, depth, width, pattern), RULES, _SIZE, layer_options)
