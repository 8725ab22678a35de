"""Dynamic layers that the papers compare against. They cannot preserve a convolution's function, so surgery does not offer them.

`CondConv2d` (Yang et al. 2019) and `DyConv2d` (Chen et al. 2020, DY-CNN) mix one kernel per image from several experts;
`DynamicFilterConv2d` (Jia et al. 2016, DFN) generates a filter for every pixel.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.layers.sekg.operator import dconv


class MixedConv2d(nn.Module, ABC):
    """A convolution whose kernel and bias are, for each image, sums of `experts` kernels weighted by `routing`.

    (N, C_in, H, W) -> (N, C_out, H', W'). All images run as groups of one convolution. Subclasses define the routing.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        experts: int = 8,
    ) -> None:
        super().__init__()
        if experts < 1 or in_channels % groups or out_channels % groups:
            raise ConfigError(
                f"{type(self).__name__} needs at least one expert and channels divisible by {groups} groups, got "
                f"{experts} experts and {in_channels} -> {out_channels} channels"
            )
        self.shape = (out_channels, in_channels // groups, kernel_size, kernel_size)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        bound = (self.shape[1] * kernel_size**2) ** -0.5
        self.kernels = nn.Parameter(torch.empty(experts, *self.shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, out_channels).uniform_(-bound, bound)) if bias else None

    @abstractmethod
    def routing(self, average: Tensor) -> Tensor:
        """(N, C_in) averages of the input -> weights (N, experts)."""

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        weights = self.routing(x.mean(dim=(2, 3)))
        kernels = (weights @ self.kernels.flatten(1)).view(-1, *self.shape[1:])
        bias = None if self.bias is None else (weights @ self.bias).flatten()
        settings = (self.stride, self.padding, self.dilation, n * self.groups)
        y = F.conv2d(x.reshape(1, n * channels, height, width), kernels, bias, *settings)
        return y.view(n, self.shape[0], *y.shape[2:])


class CondConv2d(MixedConv2d):
    """CondConv: sigmoid weights from one linear layer on the average (Yang et al. 2019, Eq. 2-3)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self.route = nn.Linear(in_channels, len(self.kernels))

    def routing(self, average: Tensor) -> Tensor:
        return torch.sigmoid(self.route(average))


class DyConv2d(MixedConv2d):
    """DY-CNN: softmax attention from two linear layers, with a quarter of the width in between (Chen et al. 2020, Figure 3).

    `temperature` starts at 30 in the paper and is annealed to 1 over the first epochs; set the attribute.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, temperature: float = 30.0, **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **({"experts": 4} | options))
        self.squeeze = nn.Linear(in_channels, max(1, in_channels // 4))
        self.excite = nn.Linear(max(1, in_channels // 4), len(self.kernels))
        self.temperature = temperature

    def routing(self, average: Tensor) -> Tensor:
        logits = self.excite(torch.relu(self.squeeze(average)))
        return torch.softmax(logits / self.temperature, dim=1)


class DynamicFilterConv2d(nn.Module):
    """DFN's dynamic local filtering: one k×k filter per pixel from a small network, shared by all channels; then a 1×1 convolution.

    (N, C_in, H, W) -> (N, C_out, H, W). The generating network is ACDA's (1×1 to 64, tanh, 3×3), for a fair comparison; the
    filters start at the identity. `filter_groups` filters per pixel serve as many groups of channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, hidden: int = 64, filter_groups: int = 1
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0 or in_channels % filter_groups:
            raise ConfigError(
                f"DynamicFilterConv2d takes odd kernels and a number of filters that divides {in_channels} channels, got "
                f"kernel size {kernel_size} and {filter_groups} filters"
            )
        self.kernel_size = kernel_size
        self.reduce = nn.Conv2d(in_channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, filter_groups * kernel_size**2, 3, padding=1)
        identity_filters(self.expand, kernel_size)
        self.mix = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        filters = self.expand(torch.tanh(self.reduce(x)))
        y: Tensor = self.mix(filter_pixels(x, filters, self.kernel_size))
        return y


def filter_pixels(x: Tensor, filters: Tensor, kernel_size: int) -> Tensor:
    """Filter x (N, C, H, W) at every pixel with its own kernels (N, G·k·k, H, W), each for C / G channels; zero padding."""
    size, padding = (kernel_size, kernel_size), (kernel_size // 2, kernel_size // 2)
    return dconv(x, filters.unflatten(1, (-1, kernel_size**2)), size, padding=padding)


def start_at_zero(conv: nn.Conv2d) -> None:
    """Make a convolution start with zero output, so that a network that corrects its input starts at the identity."""
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


@torch.no_grad()
def identity_filters(conv: nn.Conv2d, kernel_size: int) -> None:
    """Make the convolution that predicts filters start with the identity at every pixel: zero weight, bias 1 at the center."""
    assert conv.bias is not None
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    conv.bias.view(-1, kernel_size**2)[:, kernel_size**2 // 2] = 1
