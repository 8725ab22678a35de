"""ResNets for ImageNet with PAFU: Kokkinos et al., "Pixel Adaptive Filtering Units", §5.3 and Table 5.

timm's ResNet-50 and -101 with a PAFU of 16 kernels in each stage. The paper puts it into "the first convolutional unit in each
of the three residual stacks" of CIFAR networks; here that is the first 3×3 convolution of each of the four stages, because the
first convolution of a bottleneck is 1×1.
"""

from functools import partial
from typing import Any

from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from surgeon.records.recipe import Rule
from surgeon.zoo.classifiers import classifier

RULES = (Rule(layers="first-of-stage", type="pafu", options={"group_size": 16}),)


def _resnet(layers: tuple[int, ...], **options: Any) -> nn.Module:
    block: Any = Bottleneck
    return ResNet(block, layers, **options)


for _depth, _layers in ((50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))):
    classifier(
        f"pafu_resnet{_depth}",
        partial(_resnet, _layers),
        f"ResNet-{_depth} with a PAFU of 16 kernels in the first 3×3 convolution of each stage (PAFU Table 5).",
        plain=f"resnet{_depth}",
        rules=RULES,
        source=__doc__,
    )
