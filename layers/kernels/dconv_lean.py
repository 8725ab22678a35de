"""DConv in plain torch without ever storing an unfolded input or a whole map of kernels.

An image is worked through in bands of rows. The input of a band is unfolded only along x (k_w copies, not k_h·k_w); the taps
along y are an overlapping view of those. The band's channels are taken a piece at a time: the kernels of a piece are made by
one matrix product, applied and overwritten; the backward pass makes them again. Nothing but the arguments is saved for it.

N images, C input channels, O output channels, G kernels a pixel, T = k_h·k_w taps. Channels are seen as (P, Q, R, S): input
channel (P, Q), kernel (P, R), output channel (P, Q, R, S); Q or R is 1. The generated part is the same for all S. A piece
is a slice p of P, a band has h output rows of width W'.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE_BYTES = {"cpu": 2 << 20}  # the kernels of a piece; should stay in a core's share of the cache
PIECE_BYTES_ELSEWHERE = 12 << 20
BAND_BYTES = 8 << 20  # the x-unfolded input of a band
LEAST_CHANNELS = 4  # below, the matrix product that makes the kernels of a piece is too thin

Band = tuple[int, int]
LayerGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """Sizes of one call and how it is cut into bands and pieces."""

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
    ) -> "Plan":
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
        """Rows of the (G·T, Cf) weight that make the kernels of a piece."""
        each = self.split[2] * self.kernel[0] * self.kernel[1]
        return slice(piece.start * each, piece.stop * each)

    def rows_in(self, band: Band) -> int:
        """Input rows (padding included) that a band reads."""
        return (band[1] - band[0] - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] + 1

    def overlaps(self, band: Band) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
        """For each tap along x: its index, rows and columns in the band's unfolded input, and those of the image they hold."""
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
    """Named buffers that grow to what is asked of them and are used again for every piece."""

    def __init__(self, like: Tensor) -> None:
        self.device = like.device
        self.dtype = accumulation_dtype(like.dtype)
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A contiguous buffer of this shape with any content."""
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
    """Sums are taken in float32 for half precision, else in the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _even(total: int, most: int) -> int:
    """Size of the parts when `total` is cut into as few near-equal parts of at most `most` as possible."""
    return math.ceil(total / math.ceil(total / most))


# --- one band, one piece ------------------------------------------------------------------------------------------


def _unfold(plan: Plan, band: Band, x_CHW: Tensor, space: Workspace) -> Tensor:
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


def _product(left: Tensor, right: Tensor, space: Workspace) -> Tensor:
    """left · right, (p, Q, R, k_h, k_w, h, W'), in the buffer "product", which may hold a factor of that shape."""
    shape = [max(sizes) for sizes in zip(left.shape, right.shape, strict=True)]
    return torch.mul(left, right, out=space.take("product", *shape))


def _filter(window: Tensor, kernels: Tensor, space: Workspace) -> Tensor:
    """Σ over taps of window · kernels, (p, Q, R, 1, h, W')."""
    product = _product(window, kernels, space).flatten(3, 4)
    return _sum(product, 3, "filtered", space)


def _sum(x: Tensor, dim: int, name: str, space: Workspace) -> Tensor:
    """x summed over a dimension, which is kept, in the named buffer; x itself where there is nothing to sum."""
    if x.shape[dim] == 1:
        return x
    shape = [1 if d == dim else size for d, size in enumerate(x.shape)]
    return torch.sum(x, dim, keepdim=True, out=space.take(name, *shape))


def _fold(plan: Plan, product: Tensor, folded: Tensor, space: Workspace) -> None:
    """Add kernels · gradient of a piece, (p, Q, R, k_h, k_w, h, W'), along y to `folded`, (p·Q, k_w, rows, W')."""
    product = _sum(product, 2, "shared", space).flatten(0, 2)
    for tap in range(plan.kernel[0]):
        start = tap * plan.dilation[0]
        last = start + (product.shape[-2] - 1) * plan.stride[0] + 1
        folded[:, :, start : last : plan.stride[0]].add_(product[:, tap])


def _spread(plan: Plan, band: Band, folded: Tensor, grad_CHW: Tensor) -> None:
    """Add `folded`, (C, k_w, rows, W'), along x to the gradient of one image."""
    for tap, inner, outer in plan.overlaps(band):
        grad_CHW[:, *outer].add_(folded[:, tap, *inner])


def _outputs(plan: Plan, band: Band, piece: slice, y_OHW: Tensor) -> Tensor:
    """View (p, Q, R, S, h, W') of one image's output."""
    return y_OHW.view(*plan.split, *plan.out_size)[piece, :, :, :, band[0] : band[1]]


def _output_gradient(plan: Plan, band: Band, piece: slice, grad_OHW: Tensor, space: Workspace) -> Tensor:
    """Gradient of the output of a piece, summed over S, (p, Q, R, 1, 1, h, W')."""
    grad = _outputs(plan, band, piece, grad_OHW)
    grad = grad[:, :, :, 0] if grad.shape[3] == 1 else grad.sum(3, dtype=space.dtype)
    return space.take("grad", *grad.shape).copy_(grad)[:, :, :, None, None]


def _folded(plan: Plan, band: Band, channels: int, space: Workspace) -> Tensor:
    return space.take("folded", channels, plan.kernel[1], plan.rows_in(band), plan.out_size[1]).zero_()


def _channels(plan: Plan, piece: slice) -> slice:
    """Input channels of a piece."""
    return slice(piece.start * plan.split[1], piece.stop * plan.split[1])


class _ImageGradient:
    """Where the gradient of one image is summed: in its place, or in float32 beside it for half precision."""

    def __init__(self, grad_x: Tensor, image: int, space: Workspace) -> None:
        self.final = grad_x[image]
        self.sums = self.final
        if grad_x.dtype != space.dtype:
            self.sums = space.take("image", *self.final.shape).copy_(self.final)

    def keep(self) -> None:
        """Write the sums to their place."""
        if self.sums is not self.final:
            self.final.copy_(self.sums)


# --- kernels given ------------------------------------------------------------------------------------------------


def _apply_plan(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], geometry: Sequence[Sequence[int]]) -> Plan:
    channels, groups = x.shape[1], kernels.shape[1]
    out_size = (kernels.shape[-2], kernels.shape[-1])
    return Plan.make(x, (channels, groups, max(channels, groups)), kernel_size, geometry, out_size)


def _given(plan: Plan, band: Band, piece: slice, kernels_GTHW: Tensor) -> Tensor:
    """View (p, 1, R, k_h, k_w, h, W') of one image's kernels."""
    p, _, r, _ = plan.split
    kernels = kernels_GTHW.view(p, 1, r, *plan.kernel, *plan.out_size)
    return kernels[piece, :, :, :, :, band[0] : band[1]]


def apply_forward(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], *geometry: Sequence[int]) -> Tensor:
    """Forward of `dconv`; `geometry` is stride, padding, dilation."""
    plan, space = _apply_plan(x, kernels, kernel_size, geometry), Workspace(x)
    y = x.new_empty((x.shape[0], math.prod(plan.split), *plan.out_size))
    for image in range(x.shape[0]):
        for band in plan.bands():
            window = _unfold(plan, band, x[image], space)
            for piece in plan.pieces():
                filtered = _filter(window[piece], _given(plan, band, piece, kernels[image]), space)
                _outputs(plan, band, piece, y[image]).copy_(filtered)
    return y


def apply_backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    kernel_size: Sequence[int],
    needs: Sequence[bool],
    *geometry: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradients of `dconv` for x and the kernels, empty where `needs` says no."""
    plan, space = _apply_plan(x, kernels, kernel_size, geometry), Workspace(x)
    grad_x = x.new_zeros(x.shape) if needs[0] else None
    grad_kernels = kernels.new_empty(kernels.shape) if needs[1] else None
    for image in range(x.shape[0]):
        sums = None if grad_x is None else _ImageGradient(grad_x, image, space)
        for band in plan.bands():
            window = None if grad_kernels is None else _unfold(plan, band, x[image], space)
            folded = None if sums is None else _folded(plan, band, x.shape[1], space)
            for piece in plan.pieces():
                grad_y = _output_gradient(plan, band, piece, grad[image], space)
                if window is not None and grad_kernels is not None:
                    part = _sum(_product(window[piece], grad_y, space), 1, "grad_kernels", space)
                    _given(plan, band, piece, grad_kernels[image]).copy_(part)
                if folded is not None:
                    product = _product(_given(plan, band, piece, kernels[image]), grad_y, space)
                    _fold(plan, product, folded[_channels(plan, piece)], space)
            if sums is not None and folded is not None:
                _spread(plan, band, folded, sums.sums)
        if sums is not None:
            sums.keep()
    return filled(x, grad_x), filled(x, grad_kernels)


def filled(like: Tensor, part: Tensor | None) -> Tensor:
    """The part, or an empty tensor where it is None: operators return tensors only."""
    return like.new_empty(0) if part is None else part


# --- kernels generated --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerInputs:
    """What the fused layer reads; shapes as in `dconv_layer_reference`."""

    x: Tensor
    features: Tensor
    weight: Tensor
    static: Tensor
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def plan(self) -> Plan:
        kernel = (self.static.shape[2], self.static.shape[3])
        groups = self.weight.shape[0] // (kernel[0] * kernel[1])
        channels = (self.x.shape[1], groups, self.static.shape[0])
        out_size = (self.features.shape[-2], self.features.shape[-1])
        return Plan.make(self.x, channels, kernel, (self.stride, self.padding, self.dilation), out_size)


def _generate(plan: Plan, piece: slice, weight: Tensor, features: Tensor, space: Workspace) -> Tensor:
    """Kernels of a piece, (p, 1, R, k_h, k_w, h, W'); `features` are those of the band, (Cf, h·W').

    Where a kernel serves one input channel they lie in the buffer "product", and are multiplied in their place.
    """
    rows = weight[plan.weight_rows(piece)]
    buffer = "product" if plan.split[1] == 1 else "kernels"
    flat = torch.mm(rows, features, out=space.take(buffer, rows.shape[0], features.shape[1]))
    return flat.view(piece.stop - piece.start, 1, plan.split[2], *plan.kernel, -1, plan.out_size[1])


def _band_features(features_CHW: Tensor, band: Band, dtype: torch.dtype) -> Tensor:
    """(Cf, h·W') of one image's features."""
    return features_CHW[:, band[0] : band[1]].flatten(1).to(dtype)


def layer_forward(given: LayerInputs) -> Tensor:
    """Forward of `dconv_layer`: the static part is one depthwise convolution, to which the rest is added."""
    plan, space, x = given.plan(), Workspace(given.x), given.x
    y = F.conv2d(x, given.static, given.bias, given.stride, given.padding, given.dilation, x.shape[1])
    weight = given.weight.to(space.dtype)
    for image in range(x.shape[0]):
        for band in plan.bands():
            window = _unfold(plan, band, x[image], space)
            features = _band_features(given.features[image], band, space.dtype)
            for piece in plan.pieces():
                kernels = _generate(plan, piece, weight, features, space)
                _outputs(plan, band, piece, y[image]).add_(_filter(window[piece], kernels, space))
    return y


def static_backward(
    grad: Tensor, given: LayerInputs, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the static depthwise convolution for x, its weight and its bias; `needs` is as in `layer_backward`."""
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad,
        given.x,
        given.static,
        None if given.bias is None else [given.static.shape[0]],
        given.stride,
        given.padding,
        given.dilation,
        False,
        [0, 0],
        given.x.shape[1],
        [needs[0], needs[3], needs[4]],
    )
    return found


def layer_backward(grad: Tensor, given: LayerInputs, needs: Sequence[bool]) -> LayerGradients:
    """Gradients of `dconv_layer` for x, features, weight, static and bias, empty where `needs` says no."""
    plan, space, x = given.plan(), Workspace(given.x), given.x
    grad_x, grad_static, grad_bias = static_backward(grad, given, needs)
    grad_features = torch.empty_like(given.features) if needs[1] else None
    weight = given.weight.to(space.dtype)
    grad_weight = torch.zeros_like(weight) if needs[2] else None
    for image in range(x.shape[0]):
        sums = None if grad_x is None else _ImageGradient(grad_x, image, space)
        for band in plan.bands():
            features = _band_features(given.features[image], band, space.dtype)
            grad_band = space.take("grad_features", *features.shape).zero_() if needs[1] else None
            if needs[1] or needs[2]:
                window = _unfold(plan, band, x[image], space)
            folded = None if sums is None else _folded(plan, band, x.shape[1], space)
            for piece in plan.pieces():
                grad_y = _output_gradient(plan, band, piece, grad[image], space)
                rows = plan.weight_rows(piece)
                if needs[1] or needs[2]:
                    part = _sum(_product(window[piece], grad_y, space), 1, "grad_kernels", space)
                    part = part.view(-1, features.shape[1])
                    if grad_weight is not None:
                        grad_weight[rows].addmm_(part, features.t())
                    if grad_band is not None:
                        grad_band.addmm_(weight[rows].t(), part)
                if folded is not None:
                    product = _product(_generate(plan, piece, weight, features, space), grad_y, space)
                    _fold(plan, product, folded[_channels(plan, piece)], space)
            if sums is not None and folded is not None:
                _spread(plan, band, folded, sums.sums)
            if grad_features is not None and grad_band is not None:
                grad_features[image, :, band[0] : band[1]].copy_(
                    grad_band.view(grad_band.shape[0], -1, plan.out_size[1])
                )
        if sums is not None:
            sums.keep()
    grad_weight = None if grad_weight is None else grad_weight.to(given.weight.dtype)
    found = filled(x, grad_x), filled(x, grad_features), filled(x, grad_weight)
    return (*found, filled(x, grad_static), filled(x, grad_bias))
