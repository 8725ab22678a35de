"""DConv with given kernels on CUDA: one pass over the input, the kernels and the output, forward and backward.

Input channels are indexed (P, Q), kernels (P, R), outputs (P, Q, R, S), as in `ops.tiles`; Q or R is 1. Programs own tiles
of channels by pixels of one image; the compiler derives contiguity from the strides. The gradient of x is
gathered: every input pixel reads the output pixels that read it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon.layers.ops.library import memory_format_of
from surgeon.layers.ops.tiles import channel_split
from surgeon.layers.ops.triton.launch import Geometry, blocks, config, launch, tuned

CONFIGS = [
    config(C=4, P=128),
    config(C=1, P=512),
    config(C=16, P=32),
    config(C=32, P=8),
    config(C=1, P=1024, warps=8),
]


@triton.jit
def read(x, channel, row, column, inside, strides, g):
    """x at (channel, row, column), zero outside the image."""
    inside = inside & (row >= 0) & (row < g.height) & (column >= 0) & (column < g.width)
    return tl.load(x + channel * strides[1] + row * strides[2] + column * strides[3], mask=inside, other=0.0)


@triton.jit
def source(row, column, ty, tx, g):
    """The output pixel that reads the input pixel (row, column) with tap (ty, tx), and whether there is one."""
    down = row + g.pad_h - ty * g.dilation_h
    right = column + g.pad_w - tx * g.dilation_w
    there = (down >= 0) & (right >= 0) & (down % g.stride_h == 0) & (right % g.stride_w == 0)
    i = down // g.stride_h
    j = right // g.stride_w
    return i, j, there & (i < g.out_height) & (j < g.out_width)


@triton.jit
def tile(channels, pixels, C: tl.constexpr, P: tl.constexpr):
    """This program's image (64 bits), channels (C, 1) and pixels (1, P)."""
    pixel_blocks = tl.cdiv(pixels, P)
    program = tl.program_id(0)
    rest = program // pixel_blocks
    channel_blocks = tl.cdiv(channels, C)
    c = (rest % channel_blocks) * C + tl.arange(0, C)
    p = (program % pixel_blocks) * P + tl.arange(0, P)
    return (rest // channel_blocks).to(tl.int64), c[:, None], p[None, :]


@tuned(CONFIGS, ["KH", "KW", "outputs", "Q", "R", "S", "LAST"])
@triton.jit
def forward_kernel(
    x, kernels, bias, y, xs, ks, ys, g, outputs, Q, R, S,
    KH: tl.constexpr, KW: tl.constexpr, LAST: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """y = bias + Σ over taps of kernels · x; with ADD, added to the values in y."""
    n, o, p = tile(outputs, g.out_height * g.out_width, C, P)
    inside = (o < outputs) & (p < g.out_height * g.out_width)
    i, j = p // g.out_width, p % g.out_width
    kernel = (o // (Q * R * S)) * R + (o // S) % R
    x += n * xs[0]
    kernels += n * ks[0] + kernel * ks[1] + i * ks[3] + j * ks[4]
    total = tl.zeros([C, P], tl.float32)
    for ty in range(KH):
        for tx in tl.static_range(KW):
            row, column = i * g.stride_h + ty * g.dilation_h - g.pad_h, j * g.stride_w + tx * g.dilation_w - g.pad_w
            weight = tl.load(kernels + (ty * KW + tx) * ks[2], mask=inside, other=0.0)
            total += weight.to(tl.float32) * read(x, o // (R * S), row, column, inside, xs, g).to(tl.float32)
    if BIAS:
        total += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)
    at = y + n * ys[0] + o * ys[1] + i * ys[2] + j * ys[3]
    if ADD:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@tuned(CONFIGS, ["KH", "KW", "groups", "Q", "R", "S", "LAST"])
@triton.jit
def grad_kernels_kernel(
    grad, x, out, gs, xs, os, g, groups, Q, R, S,
    KH: tl.constexpr, KW: tl.constexpr, LAST: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of the kernels, summed over the outputs that a kernel serves."""
    n, k, p = tile(groups, g.out_height * g.out_width, C, P)
    inside = (k < groups) & (p < g.out_height * g.out_width)
    i, j = p // g.out_width, p % g.out_width
    x += n * xs[0]
    grad += n * gs[0] + i * gs[2] + j * gs[3]
    out += n * os[0] + k * os[1] + i * os[3] + j * os[4]
    for ty in range(KH):
        for tx in tl.static_range(KW):
            row, column = i * g.stride_h + ty * g.dilation_h - g.pad_h, j * g.stride_w + tx * g.dilation_w - g.pad_w
            total = tl.zeros([C, P], tl.float32)
            for q in range(Q):
                channel = (k // R) * Q + q
                seen = read(x, channel, row, column, inside, xs, g).to(tl.float32)
                for s in range(S):
                    of_y = tl.load(grad + ((channel * R + k % R) * S + s) * gs[1], mask=inside, other=0.0)
                    total += of_y.to(tl.float32) * seen
            tl.store(out + (ty * KW + tx) * os[2], total.to(out.dtype.element_ty), mask=inside)


@tuned(CONFIGS, ["KH", "KW", "channels", "Q", "R", "S", "LAST"])
@triton.jit
def grad_x_kernel(
    grad, kernels, out, gs, ks, os, g, channels, Q, R, S,
    KH: tl.constexpr, KW: tl.constexpr, LAST: tl.constexpr, ADD: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The gradient of x; with ADD, added to the values in `out`."""
    n, c, p = tile(channels, g.height * g.width, C, P)
    inside = (c < channels) & (p < g.height * g.width)
    row, column = p // g.width, p % g.width
    grad += n * gs[0]
    kernels += n * ks[0] + (c // Q) * R * ks[1]
    total = tl.zeros([C, P], tl.float32)
    for ty in range(KH):
        for tx in tl.static_range(KW):
            i, j, there = source(row, column, ty, tx, g)
            there = there & inside
            for r in range(R):
                at = r * ks[1] + (ty * KW + tx) * ks[2] + i * ks[3] + j * ks[4]
                weight = tl.load(kernels + at, mask=there, other=0.0).to(tl.float32)
                for s in range(S):
                    at_y = grad + ((c * R + r) * S + s) * gs[1] + i * gs[2] + j * gs[3]
                    total += tl.load(at_y, mask=there, other=0.0).to(tl.float32) * weight
    at = out + n * os[0] + c * os[1] + row * os[2] + column * os[3]
    if ADD:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Filtering:
    """Launches of the three kernels for one geometry: x (N, C, H, W), kernels (N, G, T, H', W') and O outputs, any strides."""

    g: Geometry
    channels: int
    groups: int
    outputs: int
    window: Sequence[int]

    @property
    def split(self) -> tuple[int, int, int]:
        """Q, R and S."""
        _, q, r, s = channel_split(self.channels, self.groups, self.outputs)
        return q, r, s

    def constants(self, x: Tensor) -> dict[str, Any]:
        """Compile-time constants; LAST, whether channels are adjacent in memory, is part of the tuning key."""
        return {"KH": self.window[0], "KW": self.window[1], "LAST": x.stride(1) == 1}

    def apply(self, x: Tensor, kernels: Tensor, y: Tensor, bias: Tensor | None = None, *, add: bool = False) -> None:
        """Fill y (N, O, H', W'), or add to it."""
        launch(
            forward_kernel,
            _programs(y.shape[0], self.outputs, self.g.out_height * self.g.out_width),
            *(x, kernels, x if bias is None else bias, y, x.stride(), kernels.stride(), y.stride(), self.g),
            *(self.outputs, *self.split),
            **self.constants(x),
            BIAS=bias is not None,
            ADD=add,
            tune=not add,
        )

    def grad_kernels(self, grad: Tensor, x: Tensor, out: Tensor) -> None:
        """Fill `out`, which has the shape of the kernels."""
        launch(
            grad_kernels_kernel,
            _programs(out.shape[0], self.groups, self.g.out_height * self.g.out_width),
            *(grad, x, out, grad.stride(), x.stride(), out.stride(), self.g),
            *(self.groups, *self.split),
            **self.constants(x),
        )

    def grad_x(self, grad: Tensor, kernels: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Fill `out`, which has the shape of x, or add to it."""
        launch(
            grad_x_kernel,
            _programs(out.shape[0], self.channels, self.g.height * self.g.width),
            *(grad, kernels, out, grad.stride(), kernels.stride(), out.stride(), self.g),
            *(self.channels, *self.split),
            **self.constants(out),
            ADD=add,
            tune=not add,
        )


def forward(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], *geometry: Sequence[int]) -> Tensor:
    """Forward of `dconv`; `geometry` is stride, padding, dilation."""
    filtering = _filtering(x, kernels, kernel_size, geometry)
    shape = (x.shape[0], filtering.outputs, *kernels.shape[-2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    if y.numel():
        filtering.apply(x, kernels, y)
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    kernel_size: Sequence[int],
    needs: Sequence[bool],
    *geometry: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradients of `dconv` for x and the kernels; empty if not in `needs`."""
    filtering = _filtering(x, kernels, kernel_size, geometry)
    grad_x = torch.empty_like(x) if needs[0] else x.new_empty(0)
    grad_kernels = torch.empty_like(kernels) if needs[1] else kernels.new_empty(0)
    if grad_x.numel():
        filtering.grad_x(grad, kernels, grad_x)
    if grad_kernels.numel():
        filtering.grad_kernels(grad, x, grad_kernels)
    return grad_x, grad_kernels


def _filtering(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], geometry: Sequence[Sequence[int]]) -> Filtering:
    channels, groups = x.shape[1], kernels.shape[1]
    g = Geometry.of(x, kernels.shape[-2:], *geometry)
    return Filtering(g, channels, groups, max(channels, groups), kernel_size)


def _programs(images: int, channels: int, pixels: int) -> Callable[[Mapping[str, int]], int]:
    return lambda meta: images * blocks(channels, meta["C"]) * blocks(pixels, meta["P"])
