"""DConv's tiling: bands of rows and pieces of channels, so that no whole image is ever unfolded.

An image is processed in bands of rows. The input of a band is unfolded only along x (k_w copies, not k_h·k_w); the taps
along y are an overlapping view of those. The band's channels are processed one piece at a time: one matrix product generates
the kernels of a piece, which are applied and overwritten; the backward pass recomputes them. It saves only the arguments.

N images, C input channels, O output channels, G kernels per pixel, T = k_h·k_w taps. Channels are indexed (P, Q, R, S): input
channel (P, Q), kernel (P, R), output channel (P, Q, R, S); Q or R is 1. The generated part is the same for all S. A piece
is a slice p of P, a band has h output rows of width W'.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PIECE_BYTES = {"cpu": 4 << 20}  # the kernels of a piece
PIECE_BYTES_ELSEWHERE = 12 << 20
BAND_BYTES = 3 << 20  # the x-unfolded input of a band
LEAST_CHANNELS = 4  # with fewer, the matrix product for the kernels of a piece is too thin

Band = tuple[int, int]


@dataclass(frozen=True)
class BandPlan:
    """Sizes of one call and its division into bands and pieces."""

    split: tuple[int, int, int, int]
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    piece: int
    rows: int

    @classmethod
    def make(
        cls,
        x: Tensor,
        channels: tuple[int, int, int],
        kernel: Sequence[int],
        geometry: Sequence[Sequence[int]],
        out_size: tuple[int, int],
    ) -> "BandPlan":
        """`channels` are C, G and O; `geometry` is stride, padding, dilation."""
        stride, padding, dilation = geometry
        split = p, q, r, _ = channel_split(*channels)
        height, width = out_size
        row_bytes = width * accumulation_dtype(x.dtype).itemsize
        channel_bytes = q * r * kernel[0] * kernel[1] * row_bytes
        budget = PIECE_BYTES.get(x.device.type, PIECE_BYTES_ELSEWHERE)
        halo = (kernel[0] - 1) * dilation[0]
        unfolded = (BAND_BYTES // (p * q * kernel[1] * row_bytes) - halo) // stride[0]
        rows = min(height, budget // (min(p, LEAST_CHANNELS) * channel_bytes), max(unfolded, halo))
        rows = _even(height, max(1, rows))
        piece = _even(p, max(1, budget // (rows * channel_bytes)))
        return cls(
            split, kernel, stride, padding, dilation, (x.shape[-2], x.shape[-1]), out_size, piece=piece, rows=rows
        )

    def bands(self) -> Iterator[Band]:
        """Bands of output rows, [first, last)."""
        for start in range(0, self.out_size[0], self.rows):
            yield start, min(start + self.rows, self.out_size[0])

    def pieces(self) -> Iterator[slice]:
        """Pieces of P."""
        for start in range(0, self.split[0], self.piece):
            yield slice(start, min(start + self.piece, self.split[0]))

    def weight_rows(self, piece: slice) -> slice:
        """Rows of the (G·T, Cf) weight that generate the kernels of a piece."""
        each = self.split[2] * self.kernel[0] * self.kernel[1]
        return slice(piece.start * each, piece.stop * each)

    def rows_in(self, band: Band) -> int:
        """Number of input rows (including padding) that a band reads."""
        return (band[1] - band[0] - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] + 1

    def overlaps(self, band: Band) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
        """For each tap along x: index, rows and columns in the band's unfolded input, and the matching ones in the image."""
        top = band[0] * self.stride[0] - self.padding[0]
        first, last = max(0, -top), min(self.rows_in(band), self.in_size[0] - top)
        step = self.stride[1]
        for tap in range(self.kernel[1]):
            offset = tap * self.dilation[1] - self.padding[1]
            left = max(0, -(offset // step))
            right = min(self.out_size[1], (self.in_size[1] - 1 - offset) // step + 1)
            if first < last and left < right:
                columns = slice(left * step + offset, (right - 1) * step + offset + 1, step)
                yield tap, (slice(first, last), slice(left, right)), (slice(top + first, top + last), columns)


class Workspace:
    """Named buffers that grow on demand and are reused for every piece."""

    def __init__(self, like: Tensor) -> None:
        self.device = like.device
        self.dtype = accumulation_dtype(like.dtype)
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A contiguous buffer of this shape; the contents are arbitrary."""
        size = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._flat[name][:size].view(shape)


def channel_split(channels: int, groups: int, outputs: int) -> tuple[int, int, int, int]:
    """(P, Q, R, S) for C input channels, G kernels and O output channels."""
    if channels % groups == 0:
        return groups, channels // groups, 1, outputs // channels
    return channels, 1, groups // channels, outputs // groups


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32 for half precision, otherwise the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _even(total: int, most: int) -> int:
    """Size of the parts when `total` is cut into as few near-equal parts of at most `most` as possible."""
    return math.ceil(total / math.ceil(total / most))


# --- one band, one piece ------------------------------------------------------------------------------------------


def unfold(plan: BandPlan, band: Band, x_CHW: Tensor, space: Workspace) -> Tensor:
    """The inputs under every tap of every output pixel of a band: an overlapping view (P, Q, 1, k_h, k_w, h, W')."""
    rows, width = plan.rows_in(band), plan.out_size[1]
    (p, q, _, _), (kernel_h, kernel_w) = plan.split, plan.kernel
    unfolded = space.take("unfolded", x_CHW.shape[0], kernel_w, rows, width)
    if any(plan.padding):
        unfolded.zero_()
    for tap, inner, outer in plan.overlaps(band):
        unfolded[:, tap, *inner].copy_(x_CHW[:, *outer])
    along_y, along_x = plan.dilation[0] * width, rows * width
    return unfolded.as_strided(
        (p, q, 1, kernel_h, kernel_w, band[1] - band[0], width),
        (q * kernel_w * along_x, kernel_w * along_x, 0, along_y, along_x, plan.stride[0] * width, 1),
    )


def product_of(left: Tensor, right: Tensor, space: Workspace) -> Tensor:
    """left · right, (p, Q, R, k_h, k_w, h, W'), in the buffer "product", which may contain a factor of that shape."""
    shape = [max(sizes) for sizes in zip(left.shape, right.shape, strict=True)]
    return torch.mul(left, right, out=space.take("product", *shape))


def filter_with(window: Tensor, kernels: Tensor, space: Workspace) -> Tensor:
    """Σ over taps of window · kernels, (p, Q, R, 1, h, W')."""
    product = product_of(window, kernels, space).flatten(3, 4)
    return sum_over(product, 3, "filtered", space)


def sum_over(x: Tensor, dim: int, name: str, space: Workspace) -> Tensor:
    """x summed over a dimension, which is kept, in the named buffer; x itself if there is nothing to sum."""
    if x.shape[dim] == 1:
        return x
    shape = [1 if d == dim else size for d, size in enumerate(x.shape)]
    return torch.sum(x, dim, keepdim=True, out=space.take(name, *shape))


def fold(plan: BandPlan, product: Tensor, folded: Tensor, space: Workspace) -> None:
    """Add kernels · gradient of a piece, (p, Q, R, k_h, k_w, h, W'), along y to `folded`, (p·Q, k_w, rows, W')."""
    product = sum_over(product, 2, "shared", space).flatten(0, 2)
    for tap in range(plan.kernel[0]):
        start = tap * plan.dilation[0]
        last = start + (product.shape[-2] - 1) * plan.stride[0] + 1
        folded[:, :, start : last : plan.stride[0]].add_(product[:, tap])


def spread(plan: BandPlan, band: Band, folded: Tensor, grad_CHW: Tensor) -> None:
    """Add `folded`, (C, k_w, rows, W'), along x to the gradient of one image."""
    for tap, inner, outer in plan.overlaps(band):
        grad_CHW[:, *outer].add_(folded[:, tap, *inner])


def outputs_of(plan: BandPlan, band: Band, piece: slice, y_OHW: Tensor) -> Tensor:
    """View (p, Q, R, S, h, W') of one image's output."""
    return y_OHW.view(*plan.split, *plan.out_size)[piece, :, :, :, band[0] : band[1]]


def output_gradient(plan: BandPlan, band: Band, piece: slice, grad_OHW: Tensor, space: Workspace) -> Tensor:
    """Gradient of the output of a piece, summed over S, (p, Q, R, 1, 1, h, W')."""
    grad = outputs_of(plan, band, piece, grad_OHW)
    grad = grad[:, :, :, 0] if grad.shape[3] == 1 else grad.sum(3, dtype=space.dtype)
    return space.take("grad", *grad.shape).copy_(grad)[:, :, :, None, None]


def empty_fold(plan: BandPlan, band: Band, channels: int, space: Workspace) -> Tensor:
    return space.take("folded", channels, plan.kernel[1], plan.rows_in(band), plan.out_size[1]).zero_()


def channels_of(plan: BandPlan, piece: slice) -> slice:
    """Input channels of a piece."""
    return slice(piece.start * plan.split[1], piece.stop * plan.split[1])


class ImageGradient:
    """Accumulator for the gradient of one image: the gradient itself, or a float32 copy for half precision."""

    def __init__(self, grad_x: Tensor, image: int, space: Workspace) -> None:
        self.final = grad_x[image]
        self.sums = self.final
        if grad_x.dtype != space.dtype:
            self.sums = space.take("image", *self.final.shape).copy_(self.final)

    def keep(self) -> None:
        """Write the sums to the gradient."""
        if self.sums is not self.final:
            self.final.copy_(self.sums)
