"""The small network that tells a dynamic layer, at every output pixel, what to be there."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.layers.geometry import ConvGeometry, pad_for_window

WINDOW = (3, 3)


class PixelGenerator(nn.Module):
    """1×1 convolution C → `hidden`, tanh, 3×3 convolution `hidden` → `outputs`, aligned with the replaced convolution.

    Maps the layer's input (N, C, H, W) to (N, outputs, H', W') with (H', W') the output size of the replaced convolution,
    whose stride and dilation the 3×3 convolution takes over; its window is centred where the kernel is. The second
    convolution's weight starts at zero: at birth the output is its bias everywhere. tanh bounds the hidden map: with an
    unbounded activation joint training diverges. `depth` - 1 further 3×3 convolutions, each with its tanh, may stand between
    the two: the generator then sees as many pixels further.
    """

    def __init__(self, geometry: ConvGeometry, hidden: int, outputs: int, depth: int = 1) -> None:
        super().__init__()
        self.geometry = geometry
        self.reduce = nn.Conv2d(geometry.in_channels, hidden, 1)
        self.between = nn.ModuleList(nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(depth - 1))
        self.expand = nn.Conv2d(hidden, outputs, WINDOW, stride=geometry.stride, dilation=geometry.dilation)
        nn.init.zeros_(self.expand.weight)
        self.set_static_output(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.reduce(x))
        for conv in self.between:
            hidden = torch.tanh(conv(hidden))
        hidden, padding = pad_for_window(hidden, self.geometry, WINDOW)
        expand = self.expand
        return F.conv2d(hidden, expand.weight, expand.bias, expand.stride, padding, expand.dilation)

    @property
    def static_output(self) -> Tensor:
        """What the generator gives at every pixel while its last weight is zero, (outputs,). Differentiable."""
        assert self.expand.bias is not None
        return self.expand.bias

    @torch.no_grad()
    def set_static_output(self, values: Tensor) -> None:
        """Set the bias of the last convolution, (outputs,)."""
        assert self.expand.bias is not None
        self.expand.bias.copy_(values)

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one image of this input size."""
        out_h, out_w = self.geometry.output_size(height, width)
        kernels = (p for p in (self.reduce.weight, *self.between.parameters()) if p.dim() == 4)
        per_input = sum(p.numel() for p in kernels)
        return per_input * height * width + self.expand.weight.numel() * out_h * out_w
