"""Ad-ResNets: Wang et al., "Adaptive Convolutions with Per-pixel Dynamic Filter Atom" (ICCV 2021), appendix A.4 and Table A.

ResNets whose last two stages have dynamic bottleneck blocks: 1×1 convolution, ACDA with kernel size 7 (stage 3) or 5 (stage 4),
1×1 convolution that doubles the channels. Surgery makes them from their convolutional counterparts (`…_conv`), whose blocks
have 7×7 and 5×5 convolutions. m = 6 atoms over m' = 6 elements at each of S = 3 scales, so the largest window is 7×7 in
both stages: appendix A.4 says that every generator has 6·18 outputs.
"""

from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from surgeon.records.recipe import Rule
from surgeon.zoo.classifiers import classifier
from surgeon.zoo.registry import Published

ACDA = {"atoms": 6, "scales": 3, "basis_size": 6, "hidden": 64, "static_atoms": 0, "extra_elements": 0}
RULES = (Rule(layers="re:layer[34]\\..*conv2$", type="acda", options=ACDA),)


class WideBottleneck(nn.Module):
    """1×1, k×k, 1×1 to twice the width, each with batch norm, plus the shortcut, ReLU. Interface of a timm ResNet block."""

    expansion = 2
    kernel_size = 7

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        dilation: int = 1,
        first_dilation: int | None = None,
        drop_path: nn.Module | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        **unused: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": unused.get("device"), "dtype": unused.get("dtype")}
        given = first_dilation or dilation
        k, padding = self.kernel_size, given * (self.kernel_size // 2)
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False, **dd)
        self.bn1 = norm_layer(planes, **dd)
        self.conv2 = nn.Conv2d(planes, planes, k, stride, padding, given, bias=False, **dd)
        self.bn2 = norm_layer(planes, **dd)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False, **dd)
        self.bn3 = norm_layer(planes * self.expansion, **dd)
        self.act = act_layer()
        self.downsample = downsample
        self.drop_path = drop_path

    def zero_init_last(self) -> None:
        """The block starts as its shortcut."""
        if isinstance(self.bn3.weight, Tensor):
            nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.drop_path is not None:
            y = self.drop_path(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.act(y + shortcut)
        return out


class WideBottleneck5(WideBottleneck):
    """With a 5×5 convolution."""

    kernel_size = 5


class WideBottleneck3(WideBottleneck):
    """With a 3×3 convolution: the baseline of crowd counting."""

    kernel_size = 3


# block types, blocks, widths of the four stages
_SHAPES: dict[str, dict[str, Any]] = {
    "s": {
        "block": (BasicBlock, BasicBlock, WideBottleneck, WideBottleneck5),
        "layers": (2, 2, 2, 2),
        "channels": (64, 128, 128, 256),
    },
    "m": {
        "block": (Bottleneck, Bottleneck, WideBottleneck, WideBottleneck5),
        "layers": (2, 2, 2, 2),
        "channels": (64, 128, 256, 512),
    },
    "l": {
        "block": (Bottleneck, Bottleneck, WideBottleneck, WideBottleneck5),
        "layers": (2, 3, 8, 3),
        "channels": (64, 128, 256, 512),
    },
}


def trunk(size: str, wide: type[nn.Module] | None = None, **options: Any) -> ResNet:
    """The convolutional counterpart of Ad-ResNet-s, -m or -l; `wide` replaces the 7×7 and 5×5 blocks of the last two stages."""
    shape = _SHAPES[size]
    block = shape["block"] if wide is None else (*shape["block"][:2], wide, wide)
    return ResNet(**(shape | {"block": block} | options))


_DIFFERENCE = {
    "s": "the published number is 0.63 M higher, 157 k for each of the 4 ACDA layers, see ad_resnet_l",
    "m": "the published number is 0.55 M higher, 137 k for each of the 4 ACDA layers, see ad_resnet_l",
    "l": "the published numbers of -m and -l differ by 8.36 M; without the static layers of these blocks, 197 k remain for what a "
    "generator has besides its 1×1 convolution, that is a 3×3 convolution from 64 to 342 channels, where A.4 says 6·18 = 108. "
    "None of these fits all three: other numbers of atoms (3-12), of outputs (6-700), hidden widths (32-256), up to three "
    "additional 64-channel layers, shortcuts with and without projection. A 3×3, a 5×5 and a 7×7 head of 36 outputs in each "
    "generator, which A.3 does not have, would give 3.74, 9.80 and 18.12 M; a 3×3 first convolution in the generator, as a public "
    "reimplementation has, -7.1, +2.0 and +1.6 % instead of -16.3, -5.6 and -8.2 %: ours follows A.3 literally",
}
_PARAMS = {"s": 3.85e6, "m": 9.83e6, "l": 18.19e6}
_LAYERS = {"s": 4, "m": 4, "l": 11}

for _size in _SHAPES:

    def _build(size: str = _size, **options: Any) -> nn.Module:
        return trunk(size, **options)

    classifier(
        f"ad_resnet_{_size}_conv",
        _build,
        f"Ad-ResNet-{_size} with 7×7 and 5×5 convolutions in place of ACDA.",
        source=__doc__,
    )
    classifier(
        f"ad_resnet_{_size}",
        _build,
        f"Ad-ResNet-{_size}: a ResNet with {_LAYERS[_size]} ACDA layers in its last two stages, for ImageNet.",
        rules=RULES,
        source=__doc__,
        plain=f"ad_resnet_{_size}_conv",
        published=Published(where="ACDA Table 2", params=_PARAMS[_size]),
        difference=_DIFFERENCE[_size],
    )
