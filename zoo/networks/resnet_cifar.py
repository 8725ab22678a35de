"""Residual networks for CIFAR: He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2 and table 6.

A 3x3 convolution, then three stages of n blocks with 16, 32 and 64 channels at 32, 16 and 8 pixels, global average pooling
and one linear layer: 6n + 2 layers. Shortcuts have no parameters (option A): where the size halves, every other pixel is
taken and the new channels are zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.zoo.registry import register

_WIDTHS = (16, 32, 64)


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
        """Option A: every `stride`-th pixel, the new channels zero, half of them on either side of the old ones."""
        if self.grown == 0 and self.stride == 1:
            return x
        before = self.grown // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.grown - before))


class CifarResNet(nn.Module):
    """(N, 3, 32, 32) -> (N, classes) logits. `depth` is 6n + 2."""

    def __init__(self, depth: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ConfigError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, …), got depth {depth}")
        blocks = (depth - 2) // 6
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, _WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], blocks, stride=2)
        self.linear = nn.Linear(_WIDTHS[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 64, H/4, W/4)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(torch.mean(self.forward_features(x), dim=(2, 3)))
        return logits


def _stage(c_in: int, c_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(c_in, c_out, stride)
    return nn.Sequential(first, *(BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)))


_LAYOUT = ((r"^fc\.", "linear."), (r"^classifier\.", "linear."))
_SIZE = (3, 32, 32)


@register("resnet20_cifar", input_size=_SIZE, layout=_LAYOUT)
def resnet20_cifar(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """CIFAR ResNet-20, 0.27 M parameters (He et al. 2016, table 6)."""
    return CifarResNet(20, num_classes, in_chans)


@register("resnet32_cifar", input_size=_SIZE, layout=_LAYOUT)
def resnet32_cifar(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """CIFAR ResNet-32, 0.46 M parameters (He et al. 2016, table 6)."""
    return CifarResNet(32, num_classes, in_chans)


@register("resnet44_cifar", input_size=_SIZE, layout=_LAYOUT)
def resnet44_cifar(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """CIFAR ResNet-44, 0.66 M parameters (He et al. 2016, table 6)."""
    return CifarResNet(44, num_classes, in_chans)


@register("resnet56_cifar", input_size=_SIZE, layout=_LAYOUT)
def resnet56_cifar(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """CIFAR ResNet-56, 0.85 M parameters (He et al. 2016, table 6)."""
    return CifarResNet(56, num_classes, in_chans)


@register("resnet110_cifar", input_size=_SIZE, layout=_LAYOUT)
def resnet110_cifar(num_classes: int = 10, in_chans: int = 3) -> nn.Module:
    """CIFAR ResNet-110, 1.7 M parameters (He et al. 2016, table 6)."""
    return CifarResNet(110, num_classes, in_chans)
