"""Residual networks for CIFAR: He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2 and table 6.

A 3x3 convolution, then three stages of n blocks with 16, 32 and 64 channels at 32, 16 and 8 pixels, global average pooling
and one linear layer: 6n + 2 layers. Shortcuts have no parameters (option A): where the size halves, every other pixel is
sampled and the new channels are zero.
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.records.recipe import Rule
from surgeon.zoo.classifiers import SmallClassifier, classifier
from surgeon.zoo.registry import Published

_WIDTHS = (16, 32, 64)
_NOTE: dict[str, Any] = {"difference": "the table rounds 1.73 M to 1.7 M"}


class BasicBlock(nn.Module):
    """conv 3x3, batch norm, ReLU, conv 3x3, batch norm, plus the shortcut, ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride = stride
        self.grown = c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every `stride`-th pixel; the new channels are zero, half of them on either side of the old ones."""
        if self.grown == 0 and self.stride == 1:
            return x
        before = self.grown // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.grown - before))


class CifarResNet(SmallClassifier):
    """(N, 3, 32, 32) -> (N, classes) logits. `depth` is 6n + 2."""

    body = ("conv1", "bn1", "act1", "layer1", "layer2", "layer3")
    stages = ("layer1", "layer2", "layer3")
    head_name = "linear"

    def __init__(
        self, depth: int, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0, global_pool: str = "avg"
    ) -> None:
        super().__init__(drop_rate, global_pool)
        if depth < 8 or (depth - 2) % 6:
            raise ConfigError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, …), got depth {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_chans, _WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.act1 = nn.ReLU()
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], blocks, stride=2)
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": name}
            for i, (width, name) in enumerate(zip(_WIDTHS, self.stages, strict=True))
        ]
        self.set_head(_WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)


def _stage(c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(c_in, c_out, stride)
    return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)))


_LAYOUT = ((r"^fc\.", "linear."), (r"^classifier\.", "linear."))
_ABOUT: dict[str, Any] = {
    "input_size": (3, 32, 32),
    "num_classes": 10,
    "head": "linear",
    "stages": (0, 1, 2),
    "source": __doc__,
}
_PARAMS = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6, 110: 1.7e6}

for _depth, _params in _PARAMS.items():
    classifier(
        f"resnet{_depth}_cifar",
        partial(CifarResNet, _depth),
        f"CIFAR ResNet-{_depth}, {_params / 1e6:.2g} M parameters (He et al. 2016, table 6).",
        layout=_LAYOUT,
        published=Published(where="He et al. (2016), Table 6", params=_params),
        **_ABOUT,
        **(_NOTE if _depth == 110 else {}),
    )

# PAFU §5.3: a unit in the first convolution of each of the three stacks, 16 kernels.
RULES = (Rule(layers="re:layer[123]\\.0\\.conv1$", type="pafu", options={"group_size": 16}),)

for _name, _classes in (("pafu_resnet110_cifar", 10), ("pafu_resnet110_cifar100", 100)):
    classifier(
        _name,
        partial(CifarResNet, 110),
        f"CIFAR ResNet-110 with a PAFU of 16 kernels in the first convolution of each stack, {_classes} classes (PAFU Table 5).",
        plain="resnet110_cifar",
        rules=RULES,
        **(_ABOUT | {"num_classes": _classes}),
    )
