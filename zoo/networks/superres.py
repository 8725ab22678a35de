"""Small super-resolution networks and their PAFU variants: Kokkinos et al., "Pixel Adaptive Filtering Units", §4.2, §5.2.

SRCNN (Dong et al. 2014, the 9-5-5 network) sharpens an image that is already upscaled; ESPCN (Shi et al. 2016) works at the
small size and ends with a pixel shuffle. Both are for RGB, as in the paper. PAFU replaces the
last convolution, with 16 kernels. The linear networks consist of one such layer; `support` 7 adds 7×7 kernels to the
5×5 ones. The paper leaves their number of kernels to its supplement: 16 here, as everywhere else in it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.records.recipe import Rule
from surgeon.zoo.registry import register
from surgeon.zoo.surgery import operate

_SIZE = (3, 48, 48)
PAFU = {"group_size": 16}
BOTH = {"group_size": 16, "supports": [7, 5]}


class SRCNN(nn.Module):
    """Upscaled image (N, C, H, W) in [0, 1] -> sharper image of the same shape, not clipped."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 9, padding=4)
        self.conv2 = nn.Conv2d(64, 32, 5, padding=2)
        self.output = nn.Conv2d(32, channels, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.output(torch.relu(self.conv2(torch.relu(self.conv1(x)))))
        return image


class ESPCN(nn.Module):
    """Image (N, C, H, W) in [0, 1] -> (N, C, scale*H, scale*W), not clipped."""

    def __init__(self, scale: int = 3, channels: int = 3) -> None:
        super().__init__()
        _check_scale(scale)
        self.conv1 = nn.Conv2d(channels, 64, 5, padding=2)
        self.conv2 = nn.Conv2d(64, 32, 3, padding=1)
        self.output = nn.Conv2d(32, channels * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.shuffle(self.output(torch.tanh(self.conv2(torch.tanh(self.conv1(x))))))
        return image


class LinearSR(nn.Module):
    """Image (N, C, H, W) -> (N, C, scale*H, scale*W): one 5×5 convolution without bias at the small size."""

    def __init__(self, scale: int = 2, channels: int = 3) -> None:
        super().__init__()
        _check_scale(scale)
        self.output = nn.Conv2d(channels, channels * scale**2, 5, padding=2, bias=False)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = self.shuffle(self.output(x))
        return image


class LinearDemosaic(nn.Module):
    """Mosaic (N, 3, H, W), zero where a color was not measured -> image (N, 3, H, W): one 5×5 convolution without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Conv2d(3, 3, 5, padding=2, bias=False)

    def forward(self, mosaic: Tensor) -> Tensor:
        image: Tensor = self.output(mosaic)
        return image


class SelfEnsemble(nn.Module):
    """The mean of a network's outputs for the eight flips and rotations of an image, turned back (the "+" of Table 2).

    The network maps images to images whose sides are a fixed multiple of the input's.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for turns in range(4):
            for flip in (False, True):
                seen = torch.rot90(x.flip(3) if flip else x, turns, (2, 3))
                made = torch.rot90(self.network(seen), -turns, (2, 3))
                made = made.flip(3) if flip else made
                total = made if total is None else total + made
        assert total is not None
        return total / 8


def _check_scale(scale: int) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
        raise ConfigError(f"a super-resolution network enlarges by a whole number, got scale={scale!r}")


def _rule(options: dict[str, Any]) -> tuple[Rule, ...]:
    return (Rule(layers="output", type="pafu", options=options),)


@register("srcnn", input_size=_SIZE)
def srcnn(channels: int = 3) -> nn.Module:
    """SRCNN 9-5-5 for RGB; works on the upscaled image, 69 k parameters."""
    return SRCNN(channels)


@register("pafu_srcnn", input_size=_SIZE, plain="srcnn", rules=_rule(PAFU))
def pafu_srcnn(channels: int = 3, layer_options: Mapping[str, Any] | None = None) -> nn.Module:
    """SRCNN with a PAFU of 16 kernels as its output layer (PAFU Table 4)."""
    return operate(SRCNN(channels), _rule(PAFU), (channels, *_SIZE[1:]), layer_options)


@register("espcnn", input_size=_SIZE)
def espcnn(scale: int = 3, channels: int = 3) -> nn.Module:
    """ESPCN for RGB, ×2, ×3 or ×4 (`scale`), 31 k parameters at ×3."""
    return ESPCN(scale, channels)


@register("pafu_espcnn", input_size=_SIZE, plain="espcnn", rules=_rule(PAFU))
def pafu_espcnn(scale: int = 3, channels: int = 3, layer_options: Mapping[str, Any] | None = None) -> nn.Module:
    """ESPCN with a PAFU of 16 kernels as its output layer (PAFU Table 4)."""
    return operate(ESPCN(scale, channels), _rule(PAFU), (channels, *_SIZE[1:]), layer_options)


def _linear(
    model: nn.Module, rules: tuple[Rule, ...], ensemble: bool, layer_options: Mapping[str, Any] | None
) -> nn.Module:
    model = operate(model, rules, _SIZE, layer_options) if rules else model
    return SelfEnsemble(model) if ensemble else model


for _scale in (2, 3, 4):
    for _name, _options, _told in (
        ("linear_sr", None, "a plain 5×5 convolution"),
        ("pafu_linear_sr", PAFU, "a PAFU of 16 5×5 kernels"),
        ("pafu_linear_sr_7x7", BOTH, "a PAFU of 16 kernels, 5×5 and 7×7"),
    ):
        _rules = () if _options is None else _rule(_options)

        def _sr(
            scale: int = _scale,
            ensemble: bool = False,
            rules: tuple[Rule, ...] = _rules,
            layer_options: Mapping[str, Any] | None = None,
        ) -> nn.Module:
            return _linear(LinearSR(scale), rules, ensemble, layer_options)

        _sr.__doc__ = (
            f"Linear super-resolution ×{_scale} with {_told} (PAFU Table 2); `ensemble`: its self-ensemble variant."
        )
        _plain: dict[str, Any] = {} if _options is None else {"plain": f"linear_sr_x{_scale}", "rules": _rules}
        register(f"{_name}_x{_scale}", input_size=_SIZE, **_plain)(_sr)


@register("linear_demosaic", input_size=_SIZE)
def linear_demosaic() -> nn.Module:
    """Linear demosaicking with a plain 5×5 convolution."""
    return LinearDemosaic()


@register("pafu_linear_demosaic", input_size=_SIZE, plain="linear_demosaic", rules=_rule(PAFU))
def pafu_linear_demosaic(layer_options: Mapping[str, Any] | None = None) -> nn.Module:
    """Linear demosaicking with a PAFU of 16 5×5 kernels (PAFU Table 1)."""
    return operate(LinearDemosaic(), _rule(PAFU), _SIZE, layer_options)


@register("pafu_linear_demosaic_7x7", input_size=_SIZE, plain="linear_demosaic", rules=_rule(BOTH))
def pafu_linear_demosaic_7x7(layer_options: Mapping[str, Any] | None = None) -> nn.Module:
    """Linear demosaicking with a PAFU of 16 kernels, 5×5 and 7×7 (PAFU Table 1)."""
    return operate(LinearDemosaic(), _rule(BOTH), _SIZE, layer_options)
