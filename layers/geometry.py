"""The geometry of a 2-D convolution, and the alignment of other windows with it.

Tensors are (N, C, H, W). Padding amounts follow `torch.nn.functional.pad`: (left, right, top, bottom).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from surgeon.errors import GeometryError

Pair = tuple[int, int]
Quad = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class ConvGeometry:
    """Everything about a convolution except its weights.

    `padding` is explicit, or "tf_same": TensorFlow's SAME, where the amount depends on the input size (timm's `Conv2dSame`).
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Quad | Literal["tf_same"] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = True

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the convolution's weight, (C_out, C_in / groups, k_h, k_w)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def is_depthwise(self) -> bool:
        """Whether every input channel is filtered separately (C_out may be a multiple of C_in)."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def is_pointwise(self) -> bool:
        return self.kernel_size == (1, 1)

    def explicit_padding(self, height: int, width: int) -> Quad:
        """Padding for an input of this size, (left, right, top, bottom)."""
        if self.padding != "tf_same":
            return self.padding
        (top, bottom), (left, right) = (
            _tf_same(size, k, s, d)
            for size, k, s, d in zip((height, width), self.kernel_size, self.stride, self.dilation, strict=True)
        )
        return (left, right, top, bottom)

    def output_size(self, height: int, width: int) -> Pair:
        """Spatial size of the output; raises `GeometryError` if it would be empty."""
        left, right, top, bottom = self.explicit_padding(height, width)
        padded = (height + top + bottom, width + left + right)
        out = tuple(
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(padded, self.kernel_size, self.stride, self.dilation, strict=True)
        )
        if min(out) < 1:
            raise GeometryError(
                f"an input of {height}x{width} is too small for a {self.kernel_size[0]}x{self.kernel_size[1]} convolution "
                f"(stride {self.stride}, padding {self.padding}, dilation {self.dilation}): the output would be {out[0]}x{out[1]}"
            )
        return (out[0], out[1])

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates of the plain convolution for one image of this input size."""
        out_h, out_w = self.output_size(height, width)
        return math.prod(self.weight_shape) * out_h * out_w

    def band(self, rows: slice, windows: Sequence[Pair], height: int, width: int) -> "tuple[slice, ConvGeometry]":
        """The input rows that the output rows `rows` need, and the geometry that computes exactly these rows from them.

        For an input of this size with zero padding; `windows` (h, w) are all windows aligned with the kernel by
        `pad_for_window`. The geometry's vertical padding may be negative: a crop, if another window reads farther.
        """
        left, right, top, _ = self.explicit_padding(height, width)
        stride, dilation, kernel = self.stride[0], self.dilation[0], self.kernel_size[0]
        start = rows.start * stride - top
        stop = (rows.stop - 1) * stride - top + dilation * (kernel - 1) + 1
        extras = [dilation * (window[0] - kernel) for window in windows]
        first = min(max(min(start - extra // 2 for extra in extras), 0), height)
        last = max(min(max(stop + extra - extra // 2 for extra in extras), height), first)
        return slice(first, last), replace(self, padding=(left, right, first - start, stop - last))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ConvGeometry":
        """Inverse of `to_dict`."""
        typed: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**typed)


def _tf_same(size: int, k: int, s: int, d: int) -> Pair:
    total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def pad_for_window(x: Tensor, geometry: ConvGeometry, window: Pair) -> tuple[Tensor, Pair]:
    """Pad x so that a `window` (h, w) applied with the geometry's stride and dilation is centered on the geometry's kernel.

    Returns the tensor and the symmetric zero padding (vertical, horizontal) that the operator has to add itself. As much
    as possible is left to the operator: in the common case x is returned as is. The convolution's own padding follows its
    `padding_mode`; a larger window pads the rest with zeros, and a smaller window crops. For windows whose parity differs
    from the kernel's, the center is rounded up-left.
    """
    own = geometry.explicit_padding(x.shape[-2], x.shape[-1])
    extra_h, extra_w = (d * (w - k) for w, k, d in zip(window, geometry.kernel_size, geometry.dilation, strict=True))
    extra = (extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2)
    if geometry.padding_mode != "zeros" and any(own):
        x = F.pad(x, own, mode=geometry.padding_mode)
        own = (0, 0, 0, 0)
    left, right, top, bottom = (a + b for a, b in zip(own, extra, strict=True))
    if left == right >= 0 and top == bottom >= 0:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)
