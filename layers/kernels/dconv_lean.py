"""DConv in plain torch without ever storing an unfolded input or a whole map of kernels.

The image is worked through tile by tile (some channels, some rows). Of a tile, the input is unfolded only along x (k_w
copies, not k_h·k_w); the taps along y are an overlapping view of those. The kernels of a tile are made by one matrix product,
applied and overwritten; the backward pass makes them again. Nothing but the arguments is needed for it.

N images, C input channels, O output channels, G kernels a pixel, T = k_h·k_w taps. Channels are seen as (P, Q, R, S): input
channel (P, Q), kernel (P, R), output channel (P, Q, R, S); Q or R is 1. The generated part is the same for all S.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_BYTES = {"cpu": 4 << 20}
TILE_BYTES_ELSEWHERE = 16 << 20
LEAST_CHANNELS = 8  # below, the matrix product that makes the kernels of a tile is too thin


@dataclass(frozen=True)
class Tile:
    """Channels [p0, p1) of P, output rows [r0, r1)."""

    p0: int
    p1: int
    r0: int
    r1: int


@dataclass(frozen=True)
class Plan:
    """Sizes of one call, how it is cut into tiles, and the tensors that a tile reads and writes."""

    split: tuple[int, int, int, int]
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    tile_channels: int
    tile_rows: int

    @classmethod
    def make(
        cls,
        x: Tensor,
        channels: tuple[int, int, int],
        kernel: Sequence[int],
        geometry: tuple[Sequence[int], Sequence[int], Sequence[int]],
        out_size: tuple[int, int],
    ) -> "Plan":
        """`channels` are C, G and O; `geometry` is stride, padding, dilation."""
        split = channel_split(*channels)
        p, q, r, _ = split
        itemsize = accumulation_dtype(x.dtype).itemsize
        row_bytes = q * r * kernel[0] * kernel[1] * out_size[1] * itemsize
        budget = TILE_BYTES.get(x.device.type, TILE_BYTES_ELSEWHERE)
        tile_channels = min(p, max(LEAST_CHANNELS, budget // (row_bytes * out_size[0])))
        tile_rows = max(1, min(out_size[0], budget // (row_bytes * tile_channels)))
        return cls(
            split,
            kernel,
            *geometry,
            in_size=(x.shape[-2], x.shape[-1]),
            out_size=out_size,
            tile_channels=_even(p, tile_channels),
            tile_rows=_even(out_size[0], tile_rows),
        )

    def bands(self) -> Iterator[tuple[int, int]]:
        """Bands of output rows."""
        for start in range(0, self.out_size[0], self.tile_rows):
            yield start, min(start + self.tile_rows, self.out_size[0])

    def tiles(self, band: tuple[int, int]) -> Iterator[Tile]:
        """Tiles of a band."""
        for start in range(0, self.split[0], self.tile_channels):
            yield Tile(start, min(start + self.tile_channels, self.split[0]), *band)

    def rows_in(self, tile: Tile) -> int:
        """Input rows (padding included) that a tile reads."""
        return (tile.r1 - tile.r0 - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] + 1

    def overlaps(self, tile: Tile) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
        """For each tap along x: its index, rows and columns in the tile's x-unfolded buffer, and those of the image they hold."""
        top = tile.r0 * self.stride[0] - self.padding[0]
        first, last = max(0, -top), min(self.rows_in(tile), self.in_size[0] - top)
        step = self.stride[1]
        for tap in range(self.kernel[1]):
            offset = tap * self.dilation[1] - self.padding[1]
            left = max(0, -(offset // step))
            right = min(self.out_size[1], (self.in_size[1] - 1 - offset) // step + 1)
            if first < last and left < right:
                columns = slice(left * step + offset, (right - 1) * step + offset + 1, step)
                inner = slice(first, last), slice(left, right)
                yield tap, inner, (slice(top + first, top + last), columns)


class Workspace:
    """Named buffers that grow to what is asked of them and are used again for every tile."""

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
    """Size of the pieces when `total` is cut into as few near-equal pieces of at most `most` as possible."""
    return math.ceil(total / math.ceil(total / most))


# --- one tile -----------------------------------------------------------------------------------------------------


def _window(plan: Plan, tile: Tile, x_PQHW: Tensor, space: Workspace) -> Tensor:
    """The inputs under every tap of every output pixel of a tile: an overlapping view (p, Q, 1, k_h, k_w, h, W')."""
    rows, width = plan.rows_in(tile), plan.out_size[1]
    p, q, (kernel_h, kernel_w) = tile.p1 - tile.p0, plan.split[1], plan.kernel
    unfolded = space.take("unfolded", p, q, kernel_w, rows, width)
    if any(plan.padding):
        unfolded.zero_()
    for tap, inner, outer in plan.overlaps(tile):
        unfolded[:, :, tap, *inner].copy_(x_PQHW[tile.p0 : tile.p1, :, *outer])
    along_y, along_x = plan.dilation[0] * width, rows * width
    return unfolded.as_strided(
        (p, q, 1, kernel_h, kernel_w, tile.r1 - tile.r0, width),
        (q * kernel_w * along_x, kernel_w * along_x, 0, along_y, along_x, plan.stride[0] * width, 1),
    )


def _filter(window: Tensor, kernels: Tensor, product: Tensor, space: Workspace) -> Tensor:
    """Σ over taps of window · kernels, (p, Q, R, h, W'). `product` is overwritten."""
    torch.mul(window, kernels, out=product)
    p, q, r, _, _, height, width = product.shape
    return torch.sum(product.flatten(3, 4), 3, out=space.take("filtered", p, q, r, height, width))


def _scatter(plan: Plan, tile: Tile, product: Tensor, grad_PQHW: Tensor, space: Workspace) -> None:
    """Add to the gradient of the input what `product`, kernels · gradient (p, Q, R, k_h, k_w, h, W'), brings to it."""
    if product.shape[2] > 1:
        product = torch.sum(product, 2, keepdim=True, out=space.take("scatter", *_with(product, 2, 1)))
    p, q, _, kernel_h, kernel_w, height, width = product.shape
    folded = space.take("folded", p, q, kernel_w, plan.rows_in(tile), width).zero_()
    for tap in range(kernel_h):
        start = tap * plan.dilation[0]
        step = plan.stride[0]
        folded[:, :, :, start : start + (height - 1) * step + 1 : step].add_(product[:, :, 0, tap])
    for tap, inner, outer in plan.overlaps(tile):
        grad_PQHW[tile.p0 : tile.p1, :, *outer].add_(folded[:, :, tap, *inner])


def _kernel_gradient(window: Tensor, grad: Tensor, space: Workspace) -> Tensor:
    """Gradient of the kernels of a tile, (p, 1, R, k_h, k_w, h, W'); `grad` is that of the output, (p, Q, R, 1, 1, h, W')."""
    p, q, _, kernel_h, kernel_w, height, width = window.shape
    product = space.take("product", p, q, grad.shape[2], kernel_h, kernel_w, height, width)
    torch.mul(window, grad, out=product)
    if q == 1:
        return product
    return torch.sum(product, 1, keepdim=True, out=space.take("grad_kernels", *_with(product, 1, 1)))


def _with(tensor: Tensor, dim: int, size: int) -> list[int]:
    return [size if d == dim else s for d, s in enumerate(tensor.shape)]


def _output_tile(plan: Plan, tile: Tile, y_OHW: Tensor) -> Tensor:
    """View (p, Q, R, S, h, W') of one image's output."""
    return y_OHW.unflatten(0, plan.split)[tile.p0 : tile.p1, :, :, :, tile.r0 : tile.r1]


def _gradient_tile(plan: Plan, tile: Tile, grad_OHW: Tensor, space: Workspace) -> Tensor:
    """Gradient of the output of a tile, summed over S, (p, Q, R, 1, 1, h, W')."""
    grad = _output_tile(plan, tile, grad_OHW)
    grad = grad[:, :, :, 0] if grad.shape[3] == 1 else grad.sum(3, dtype=space.dtype)
    return space.take("grad", *grad.shape).copy_(grad)[:, :, :, None, None]


# --- kernels given ------------------------------------------------------------------------------------------------


def _given_tile(plan: Plan, tile: Tile, kernels_GTHW: Tensor) -> Tensor:
    """View (p, 1, R, k_h, k_w, h, W') of one image's kernels."""
    p, _, r, _ = plan.split
    kernels = kernels_GTHW.unflatten(1, tuple(plan.kernel)).unflatten(0, (p, 1, r))
    return kernels[tile.p0 : tile.p1, :, :, :, :, tile.r0 : tile.r1]


def _apply_plan(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], geometry: tuple[Sequence[int], ...]) -> Plan:
    stride, padding, dilation = geometry
    channels, groups = x.shape[1], kernels.shape[1]
    out_size = (kernels.shape[-2], kernels.shape[-1])
    return Plan.make(x, (channels, groups, max(channels, groups)), kernel_size, (stride, padding, dilation), out_size)


def apply_forward(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], *geometry: Sequence[int]) -> Tensor:
    """Forward of `dconv`; `geometry` is stride, padding, dilation."""
    plan = _apply_plan(x, kernels, kernel_size, geometry)
    space = Workspace(x)
    y = x.new_empty((x.shape[0], math.prod(plan.split), *plan.out_size))
    for image in range(x.shape[0]):
        x_PQHW = x[image].unflatten(0, plan.split[:2])
        for band in plan.bands():
            for tile in plan.tiles(band):
                window = _window(plan, tile, x_PQHW, space)
                given = _given_tile(plan, tile, kernels[image])
                product = space.take("product", *_with(window, 2, plan.split[2]))
                filtered = _filter(window, given, product, space)
                _output_tile(plan, tile, y[image]).copy_(filtered[:, :, :, None])
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
    plan = _apply_plan(x, kernels, kernel_size, geometry)
    space = Workspace(x)
    grad_x = x.new_zeros(x.shape if needs[0] else 0)
    grad_kernels = kernels.new_empty(kernels.shape if needs[1] else 0)
    for image in range(x.shape[0]):
        x_PQHW = x[image].unflatten(0, plan.split[:2])
        target = _image_gradient(grad_x, image, space) if needs[0] else None
        for band in plan.bands():
            for tile in plan.tiles(band):
                grad_tile = _gradient_tile(plan, tile, grad[image], space)
                if needs[1]:
                    window = _window(plan, tile, x_PQHW, space)
                    part = _kernel_gradient(window, grad_tile, space)
                    _given_tile(plan, tile, grad_kernels[image]).copy_(part)
                if target is not None:
                    given = _given_tile(plan, tile, kernels[image])
                    shape = (*grad_tile.shape[:3], *given.shape[3:])
                    product = torch.mul(given, grad_tile, out=space.take("product", *shape))
                    _scatter(plan, tile, product, target.unflatten(0, plan.split[:2]), space)
        if target is not None:
            _keep_image_gradient(grad_x, image, target)
    return grad_x, grad_kernels


def _image_gradient(grad_x: Tensor, image: int, space: Workspace) -> Tensor:
    """Where one image's gradient is summed: in its place, or in float32 beside it for half precision."""
    if grad_x.dtype == space.dtype:
        return grad_x[image]
    return space.take("image", *grad_x.shape[1:]).copy_(grad_x[image])


def _keep_image_gradient(grad_x: Tensor, image: int, target: Tensor) -> None:
    if target.dtype != grad_x.dtype:
        grad_x[image].copy_(target)


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


def _weight_rows(plan: Plan, tile: Tile) -> slice:
    each = plan.split[2] * plan.kernel[0] * plan.kernel[1]
    return slice(tile.p0 * each, tile.p1 * each)


def _generate(plan: Plan, tile: Tile, weight: Tensor, features: Tensor, space: Workspace) -> Tensor:
    """Kernels of a tile, (p, 1, R, k_h, k_w, h, W'); `features` are those of the band, (Cf, h·W')."""
    rows = weight[_weight_rows(plan, tile)]
    flat = torch.mm(rows, features, out=space.take("kernels", rows.shape[0], features.shape[1]))
    return flat.view(tile.p1 - tile.p0, 1, plan.split[2], *plan.kernel, tile.r1 - tile.r0, plan.out_size[1])


def _band_features(plan: Plan, features_CHW: Tensor, band: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(Cf, h·W') of one image's features."""
    return features_CHW[:, band[0] : band[1]].flatten(1).to(dtype)


def layer_forward(given: LayerInputs) -> Tensor:
    """Forward of `dconv_layer`: the static part is one depthwise convolution, to which the tiles are added."""
    plan, space, x = given.plan(), Workspace(given.x), given.x
    y = F.conv2d(x, given.static, given.bias, given.stride, given.padding, given.dilation, x.shape[1])
    weight = given.weight.to(space.dtype)
    for image in range(x.shape[0]):
        x_PQHW = x[image].unflatten(0, plan.split[:2])
        for band in plan.bands():
            features = _band_features(plan, given.features[image], band, space.dtype)
            for tile in plan.tiles(band):
                window = _window(plan, tile, x_PQHW, space)
                kernels = _generate(plan, tile, weight, features, space)
                in_place = plan.split[1] == 1
                product = kernels if in_place else space.take("product", *_with(window, 2, plan.split[2]))
                filtered = _filter(window, kernels, product, space)
                _output_tile(plan, tile, y[image]).add_(filtered[:, :, :, None])
    return y


def static_backward(
    grad: Tensor, given: LayerInputs, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the static depthwise convolution for x, its weight and its bias."""
    outputs = given.static.shape[0]
    grad_x, grad_static, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        given.x,
        given.static,
        None if given.bias is None else [outputs],
        given.stride,
        given.padding,
        given.dilation,
        False,
        [0, 0],
        given.x.shape[1],
        [needs[0], needs[3], needs[4]],
    )
    return grad_x, grad_static, grad_bias


def layer_backward(grad: Tensor, given: LayerInputs, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients of `dconv_layer` for x, features, weight, static and bias, empty where `needs` says no."""
    plan, space, x = given.plan(), Workspace(given.x), given.x
    grad_x, grad_static, grad_bias = static_backward(grad, given, needs)
    grad_features = torch.empty_like(given.features) if needs[1] else None
    weight = given.weight.to(space.dtype)
    grad_weight = torch.zeros_like(weight) if needs[2] else None
    for image in range(x.shape[0]):
        x_PQHW = x[image].unflatten(0, plan.split[:2])
        target = None if grad_x is None else _image_gradient(grad_x, image, space)
        for band in plan.bands():
            features = _band_features(plan, given.features[image], band, space.dtype)
            grad_band = space.take("grad_features", *features.shape).zero_() if needs[1] else None
            for tile in plan.tiles(band):
                grad_tile = _gradient_tile(plan, tile, grad[image], space)
                rows = _weight_rows(plan, tile)
                if grad_band is not None or grad_weight is not None:
                    part = _kernel_gradient(_window(plan, tile, x_PQHW, space), grad_tile, space)
                    part = part.view(-1, features.shape[1])
                    if grad_weight is not None:
                        grad_weight[rows].addmm_(part, features.t())
                    if grad_band is not None:
                        grad_band.addmm_(weight[rows].t(), part)
                if target is not None:
                    kernels = _generate(plan, tile, weight, features, space)
                    shape = (*grad_tile.shape[:3], *kernels.shape[3:])
                    in_place = plan.split[1] == 1
                    product = kernels if in_place else space.take("product", *shape)
                    torch.mul(kernels, grad_tile, out=product)
                    _scatter(plan, tile, product, target.unflatten(0, plan.split[:2]), space)
            if grad_features is not None and grad_band is not None:
                grad_features[image, :, band[0] : band[1]].copy_(grad_band.unflatten(1, (-1, plan.out_size[1])))
        if target is not None and grad_x is not None:
            _keep_image_gradient(grad_x, image, target)
    if grad_weight is not None:
        grad_weight = grad_weight.to(given.weight.dtype)
    return filled(x, grad_x, grad_features, grad_weight, grad_static, grad_bias)


def filled(x: Tensor, *parts: Tensor | None) -> tuple[Tensor, ...]:
    """The parts, with an empty tensor for each that is None: operators return tensors only."""
    return tuple(x.new_empty(0) if part is None else part for part in parts)
