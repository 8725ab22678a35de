"""DConv with given kernels on CUDA: one pass over the input, the kernels and the output, forward and backward.

Input channels are seen as (P, Q), kernels as (P, R), outputs as (P, Q, R), as in `dconv_tiles`; Q or R is 1. Programs own tiles of
channels by pixels of one image; what is contiguous in memory is found by the compiler from the strides. The gradient of x is
gathered: every input pixel reads the output pixels that read it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon.layers.kernels.triton.launch import Geometry, blocks, config, launch, memory_format, tuned

CONFIGS = [
    config(C=4, P=128),
    config(C=1, P=512),
    config(C=16, P=32),
    config(C=32, P=8),
    config(C=1, P=1024, warps=8),
]


@triton.jit
def read(x, channel, row, column, inside, strides, g):
    """x at (channel, row, column), zero outside of the image."""
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


@tuned(CONFIGS, ["KH", "KW", "outputs", "Q", "R"])
@triton.jit
def forward_kernel(
    x, kernels, y, xs, ks, ys, g, outputs, Q, R, KH: tl.constexpr, KW: tl.constexpr, C: tl.constexpr, P: tl.constexpr
):
    n, o, p = tile(outputs, g.out_height * g.out_width, C, P)
    inside = (o < outputs) & (p < g.out_height * g.out_width)
    i, j = p // g.out_width, p % g.out_width
    kernel = (o // (Q * R)) * R + o % R
    x += n * xs[0]
    kernels += n * ks[0] + kernel * ks[1] + i * ks[3] + j * ks[4]
    total = tl.zeros([C, P], tl.float32)
    for ty in range(KH):
        for tx in tl.static_range(KW):
            row, column = i * g.stride_h + ty * g.dilation_h - g.pad_h, j * g.stride_w + tx * g.dilation_w - g.pad_w
            weight = tl.load(kernels + (ty * KW + tx) * ks[2], mask=inside, other=0.0)
            total += weight.to(tl.float32) * read(x, o // R, row, column, inside, xs, g).to(tl.float32)
    tl.store(y + n * ys[0] + o * ys[1] + i * ys[2] + j * ys[3], total.to(y.dtype.element_ty), mask=inside)


@tuned(CONFIGS, ["KH", "KW", "groups", "Q", "R"])
@triton.jit
def grad_kernels_kernel(
    grad, x, out, gs, xs, os, g, groups, Q, R, KH: tl.constexpr, KW: tl.constexpr, C: tl.constexpr, P: tl.constexpr
):
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
                of_y = tl.load(grad + (channel * R + k % R) * gs[1], mask=inside, other=0.0)
                total += of_y.to(tl.float32) * read(x, channel, row, column, inside, xs, g).to(tl.float32)
            tl.store(out + (ty * KW + tx) * os[2], total.to(out.dtype.element_ty), mask=inside)


@tuned(CONFIGS, ["KH", "KW", "channels", "Q", "R"])
@triton.jit
def grad_x_kernel(
    grad, kernels, out, gs, ks, os, g, channels, Q, R, KH: tl.constexpr, KW: tl.constexpr, C: tl.constexpr, P: tl.constexpr
):
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
                of_y = tl.load(grad + (c * R + r) * gs[1] + i * gs[2] + j * gs[3], mask=there, other=0.0)
                at = r * ks[1] + (ty * KW + tx) * ks[2] + i * ks[3] + j * ks[4]
                weight = tl.load(kernels + at, mask=there, other=0.0)
                total += of_y.to(tl.float32) * weight.to(tl.float32)
    tl.store(out + n * os[0] + c * os[1] + row * os[2] + column * os[3], total.to(out.dtype.element_ty), mask=inside)


def forward(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], *geometry: Sequence[int]) -> Tensor:
    """Forward of `dconv`; `geometry` is stride, padding, dilation."""
    outputs, out_size = max(x.shape[1], kernels.shape[1]), tuple(kernels.shape[-2:])
    y = torch.empty((x.shape[0], outputs, *out_size), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    if y.numel():
        g = Geometry.of(x, out_size, *geometry)
        launch(
            forward_kernel,
            _programs(x.shape[0], outputs, g.out_height * g.out_width),
            *(x, kernels, y, x.stride(), kernels.stride(), y.stride(), g),
            *(outputs, *_split(x, kernels)),
            KH=kernel_size[0],
            KW=kernel_size[1],
        )
    return y


def backward(
    grad: Tensor, x: Tensor, kernels: Tensor, kernel_size: Sequence[int], needs: Sequence[bool], *geometry: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of `dconv` for x and the kernels, empty where `needs` says no."""
    grad_x = torch.empty_like(x) if needs[0] else x.new_empty(0)
    grad_kernels = torch.empty_like(kernels) if needs[1] else kernels.new_empty(0)
    g = Geometry.of(x, kernels.shape[-2:], *geometry)
    window = {"KH": kernel_size[0], "KW": kernel_size[1]}
    if grad_x.numel():
        launch(
            grad_x_kernel,
            _programs(x.shape[0], x.shape[1], g.height * g.width),
            *(grad, kernels, grad_x, grad.stride(), kernels.stride(), grad_x.stride(), g),
            *(x.shape[1], *_split(x, kernels)),
            **window,
        )
    if grad_kernels.numel():
        launch(
            grad_kernels_kernel,
            _programs(x.shape[0], kernels.shape[1], g.out_height * g.out_width),
            *(grad, x, grad_kernels, grad.stride(), x.stride(), grad_kernels.stride(), g),
            *(kernels.shape[1], *_split(x, kernels)),
            **window,
        )
    return grad_x, grad_kernels


def _split(x: Tensor, kernels: Tensor) -> tuple[int, int]:
    """Q and R."""
    channels, groups = x.shape[1], kernels.shape[1]
    return (channels // groups, 1) if channels % groups == 0 else (1, groups // channels)


def _programs(images: int, channels: int, pixels: int):
    return lambda meta: images * blocks(channels, meta["C"]) * blocks(pixels, meta["P"])
