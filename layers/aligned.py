"""A convolution inside a dynamic layer, aligned with the convolution that the layer replaces."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.layers.geometry import ConvGeometry, Pair, pad_for_window


class AlignedConv2d(nn.Conv2d):
    """Convolution with its own window and the stride, dilation and padding of a geometry, centered on the geometry's kernel.

    Called as a module, so hooks, pruning, adapters and sharding work on it as on any convolution. `padding` is for adapters to
    read; if no symmetric padding is equivalent, it is 0 and the input is padded here.
    """

    def __init__(self, geometry: ConvGeometry, inputs: int, outputs: int, window: Pair, **options: Any) -> None:
        super().__init__(inputs, outputs, window, stride=geometry.stride, dilation=geometry.dilation, **options)
        self.geometry = geometry
        if geometry.padding_mode == "zeros" and geometry.padding != "tf_same":
            left, right, top, bottom = geometry.padding
            extra = [d * (w - k) for w, k, d in zip(window, geometry.kernel_size, geometry.dilation, strict=True)]
            vertical, horizontal = top + extra[0] // 2, left + extra[1] // 2
            if (left, top) == (right, bottom) and not any(e % 2 for e in extra) and min(vertical, horizontal) >= 0:
                self.padding = (vertical, horizontal)

    def forward(self, input: Tensor, geometry: ConvGeometry | None = None) -> Tensor:
        """`geometry` overrides the layer's own if the input is a band of the image (`ConvGeometry.band`)."""
        window = (self.kernel_size[0], self.kernel_size[1])
        padded, padding = pad_for_window(input, geometry or self.geometry, window)
        return F.conv2d(padded, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
