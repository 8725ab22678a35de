"""Real-world super-resolution and denoising: Wang et al., "Adaptive Convolutions with Per-pixel Dynamic Filter Atom", §4.3.

"Two convolution layers and pixel shuffle downsampling layers", eight (dynamic) bottleneck blocks, two convolutions with pixel
shuffle upsampling. The paper gives no widths. Ours: convolutions 3 → 16 and 64 → 64, each followed by a 2×2 space-to-depth
step, so the blocks run on 256 channels at a quarter of the size, with a bottleneck of 128; the way back mirrors it.
The network predicts a correction of its input, which is already upscaled for super-resolution (as RealSR's is). ACDA
replaces the blocks' 3×3 convolutions; m = 6, S = 3, m' = 6.

The comparators of Tables 3, 4 and 7 are the same network with their layer in that place, or
predict a filter for every pixel of the image instead of a correction (`kpn`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.records.recipe import Rule
from surgeon.zoo.comparators import (
    CondConv2d,
    DyConv2d,
    DynamicFilterConv2d,
    filter_pixels,
    identity_filters,
    start_at_zero,
)
from surgeon.zoo.networks.ad_resnet import ACDA
from surgeon.zoo.registry import Published, register
from surgeon.zoo.surgery import operate

_SIZE = (3, 64, 64)
WIDTH, INNER, BLOCKS = 256, 128, 8
RULES = (Rule(layers="re:blocks\\..*\\.conv2$", type="acda", options=ACDA),)

_MIDDLE: dict[str, Callable[[int], nn.Module]] = {
    "conv": lambda width: nn.Conv2d(width, width, 3, padding=1),
    "condconv": lambda width: CondConv2d(width, width, 3, padding=1),
    "dyconv": lambda width: DyConv2d(width, width, 3, padding=1),
    "dfn": lambda width: DynamicFilterConv2d(width, width, 7),
}


class Bottleneck(nn.Module):
    """x + (1×1, ReLU, 3×3, ReLU, 1×1)(x), without batch norm; `middle` names the layer in place of the 3×3 convolution."""

    def __init__(self, width: int, inner: int, middle: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 1)
        self.conv2 = _MIDDLE[middle](inner)
        self.conv3 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x)))))
        return x + y


class Trunk(nn.Module):
    """(N, C, H, W) -> (N, outputs, H, W), any size: the image is padded at its border to a multiple of 4."""

    def __init__(
        self,
        channels: int = 3,
        outputs: int = 3,
        width: int = WIDTH,
        inner: int = INNER,
        blocks: int = BLOCKS,
        middle: str = "conv",
    ) -> None:
        super().__init__()
        if width % 16 or middle not in _MIDDLE:
            raise ConfigError(
                f"the restoration network has a multiple of 16 channels and one of {', '.join(_MIDDLE)} in its blocks, "
                f"got width={width!r}, middle={middle!r}"
            )
        quarter, sixteenth = width // 4, width // 16
        self.down1 = nn.Conv2d(channels, sixteenth, 3, padding=1)
        self.down2 = nn.Conv2d(quarter, quarter, 3, padding=1)
        self.blocks = nn.Sequential(*(Bottleneck(width, inner, middle) for _ in range(blocks)))
        self.up1 = nn.Conv2d(quarter, quarter, 3, padding=1)
        self.up2 = nn.Conv2d(sixteenth, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 4, 0, -height % 4), mode="replicate") if height % 4 or width % 4 else x
        y = F.pixel_unshuffle(torch.relu(self.down1(x)), 2)
        y = F.pixel_unshuffle(torch.relu(self.down2(y)), 2)
        y = F.pixel_shuffle(self.blocks(y), 2)
        y = F.pixel_shuffle(torch.relu(self.up1(y)), 2)
        out: Tensor = self.up2(y)[..., :height, :width]
        return out


class Restorer(nn.Module):
    """Degraded image (N, C, H, W) in [0, 1] -> restored image of the same shape, not clipped. Starts at the identity."""

    def __init__(self, channels: int = 3, **options: Any) -> None:
        super().__init__()
        self.trunk = Trunk(channels, channels, **options)
        start_at_zero(self.trunk.up2)

    def forward(self, x: Tensor) -> Tensor:
        correction: Tensor = self.trunk(x)
        return x + correction


class KPN(nn.Module):
    """Kernel prediction (Bako et al. 2017; Mildenhall et al. 2018): the trunk predicts a k×k filter for every pixel.

    Degraded image (N, C, H, W) -> filtered image of the same shape; the filters are shared by the colors and start at the
    identity.
    """

    def __init__(self, channels: int = 3, kernel_size: int = 5, **options: Any) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f"KPN predicts filters of an odd size, got kernel_size={kernel_size!r}")
        self.kernel_size = kernel_size
        self.trunk = Trunk(channels, kernel_size**2, **options)
        identity_filters(self.trunk.up2, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return filter_pixels(x, self.trunk(x), self.kernel_size)


_BASELINE = Published(where="ACDA Table 5", params=2.28e6)
_PLAIN: dict[str, Any] = {
    "published": _BASELINE,
    "difference": "the paper gives no widths: ours give the ACDA network 1.95 M. Eight blocks of 256-128-256 with "
    "3×3 convolutions have 1.78 M; 2.28 M would take 12.8 weights per pair of channels, between 3×3 and 5×5",
}
_ACDA: dict[str, Any] = {
    "rules": RULES,
    "published": Published(where="ACDA Table 5", params=1.97e6),
}


def _operated(model: nn.Module, channels: int, layer_options: Mapping[str, Any] | None) -> nn.Module:
    return operate(model, RULES, (channels, *_SIZE[1:]), layer_options)


@register("sidd_conv", input_size=_SIZE, **_PLAIN)
def sidd_conv(channels: int = 3, width: int = WIDTH, inner: int = INNER, blocks: int = BLOCKS) -> nn.Module:
    """The convolutional baseline of real denoising (ACDA Table 5)."""
    return Restorer(channels, width=width, inner=inner, blocks=blocks)


@register("acda_sidd", input_size=_SIZE, plain="sidd_conv", **_ACDA)
def acda_sidd(
    channels: int = 3,
    width: int = WIDTH,
    inner: int = INNER,
    blocks: int = BLOCKS,
    layer_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Real denoising with ACDA in eight bottleneck blocks (ACDA Table 5)."""
    return _operated(Restorer(channels, width=width, inner=inner, blocks=blocks), channels, layer_options)


@register("realsr_conv", input_size=_SIZE)
def realsr_conv(channels: int = 3, width: int = WIDTH, inner: int = INNER, blocks: int = BLOCKS) -> nn.Module:
    """The convolutional counterpart of acda_realsr; works on the upscaled image."""
    return Restorer(channels, width=width, inner=inner, blocks=blocks)


@register("acda_realsr", input_size=_SIZE, plain="realsr_conv", rules=RULES)
def acda_realsr(
    channels: int = 3,
    width: int = WIDTH,
    inner: int = INNER,
    blocks: int = BLOCKS,
    layer_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Real super-resolution with ACDA in eight bottleneck blocks (ACDA Table 4); works on the upscaled image."""
    return _operated(Restorer(channels, width=width, inner=inner, blocks=blocks), channels, layer_options)


def _comparator(name: str, middle: str, doc: str) -> None:
    def build(channels: int = 3, width: int = WIDTH, inner: int = INNER, blocks: int = BLOCKS) -> nn.Module:
        return Restorer(channels, width=width, inner=inner, blocks=blocks, middle=middle)

    build.__doc__ = doc
    register(name, input_size=_SIZE)(build)


_comparator(
    "dfn_realsr", "dfn", "Comparator: the restoration network with one 7×7 filter per pixel (DFN) in its blocks."
)
_comparator(
    "condconv_realsr", "condconv", "Comparator: the restoration network with CondConv of 8 experts in its blocks."
)
_comparator(
    "dyconv_realsr",
    "dyconv",
    "Comparator: the restoration network with DY-CNN's convolution of 4 kernels in its blocks.",
)


@register("kpn", input_size=_SIZE)
def kpn(
    channels: int = 3, kernel_size: int = 5, width: int = WIDTH, inner: int = INNER, blocks: int = BLOCKS
) -> nn.Module:
    """Comparator: kernel prediction with 5×5 filters (ACDA Table 4, "KPN, l = 5")."""
    return KPN(channels, kernel_size, width=width, inner=inner, blocks=blocks)


@register("kpn_l19", input_size=_SIZE)
def kpn_l19(
    channels: int = 3, kernel_size: int = 19, width: int = WIDTH, inner: int = INNER, blocks: int = BLOCKS
) -> nn.Module:
    """Comparator: kernel prediction with 19×19 filters (ACDA Table 4, "KPN, l = 19")."""
    return KPN(channels, kernel_size, width=width, inner=inner, blocks=blocks)
