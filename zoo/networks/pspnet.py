"""PSPNet with a PAFU pyramid module: Kokkinos et al., "Pixel Adaptive Filtering Units", §5.4 and Table 6.

PSPNet (Zhao et al. 2017): a ResNet-50 whose last two stages are dilated (output stride 8), its map pooled to 1, 2, 3 and 6
cells, each reduced to a quarter of the channels by a 1×1 convolution, upsampled and concatenated with the map; a 3×3 convolution
fuses them and a 1×1 convolution outputs the classes. PAFU replaces the 3×3 convolution, with 8 kernels.
"""

from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.records.recipe import Rule
from surgeon.zoo.registry import register
from surgeon.zoo.surgery import operate

_SIZE = (3, 128, 128)
RULES = (Rule(layers="fuse.0", type="pafu", options={"group_size": 8}),)


class PSPNet(nn.Module):
    """Image (N, 3, H, W), normalized as for ImageNet -> logits (N, classes, H, W).

    In training with `auxiliary` the result is a pair: the logits, and those of a small head on the third stage.
    `width` is that of the fusing convolution and `backbone` any timm network that takes `features_only` and `output_stride`.
    """

    def __init__(
        self,
        num_classes: int = 150,
        backbone: str = "resnet50",
        width: int = 512,
        bins: tuple[int, ...] = (1, 2, 3, 6),
        auxiliary: bool = False,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        features: Any = timm.create_model(
            backbone, features_only=True, output_stride=8, out_indices=(-2, -1), in_chans=in_chans
        )
        before, last = features.feature_info.channels()
        self.backbone: nn.Module = features
        self.bins = tuple(bins)
        each = last // len(bins)
        self.pyramid = nn.ModuleList(_unit(last, each, 1) for _ in bins)
        self.fuse = _unit(last + each * len(bins), width, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classes = nn.Conv2d(width, num_classes, 1)
        self.auxiliary = (
            nn.Sequential(_unit(before, before // 4, 3), nn.Dropout2d(0.1), nn.Conv2d(before // 4, num_classes, 1))
            if auxiliary
            else None
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        size = (x.shape[2], x.shape[3])
        before, y = self.backbone(x)
        maps = [y]
        for bins, unit in zip(self.bins, self.pyramid, strict=True):
            maps.append(_resized(unit(F.adaptive_avg_pool2d(y, bins)), (y.shape[2], y.shape[3])))
        logits = _resized(self.classes(self.dropout(self.fuse(torch.cat(maps, dim=1)))), size)
        if self.auxiliary is not None and self.training:
            return logits, _resized(self.auxiliary(before), size)
        return logits


def _unit(c_in: int, c_out: int, k: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, k, padding=k // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


@register("pspnet", input_size=_SIZE)
def pspnet(
    num_classes: int = 150, backbone: str = "resnet50", width: int = 512, auxiliary: bool = False, in_chans: int = 3
) -> nn.Module:
    """PSPNet with a dilated ResNet-50, 150 classes of ADE20K, 46.7 M parameters."""
    return PSPNet(num_classes, backbone, width, auxiliary=auxiliary, in_chans=in_chans)


@register("pafu_pspnet", input_size=_SIZE, plain="pspnet", rules=RULES)
def pafu_pspnet(
    num_classes: int = 150,
    backbone: str = "resnet50",
    width: int = 512,
    auxiliary: bool = False,
    in_chans: int = 3,
    layer_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """PSPNet with a PAFU of 8 kernels after the pyramid (PAFU Table 6)."""
    model = PSPNet(num_classes, backbone, width, auxiliary=auxiliary, in_chans=in_chans)
    return operate(model, RULES, (in_chans, *_SIZE[1:]), layer_options)
