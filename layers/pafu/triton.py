"""Kernel selection on CUDA by products with gathered patches: the cost of one convolution, for any number of kernels.

Output pixels r are sorted by selected kernel on the device, without synchronization. A program multiplies the patches of one block
of pixels of one kernel, reading them in place; no patch is stored. The gradient of x is accumulated tap by tap: no two pixels read
the same element with the same tap. The kernels' gradient is taken in `splits` partial sums, added afterwards. The scores of all
kernels, needed by the soft selection, are convolutions whose outputs stay in registers. Kernels are packed (n, T, C/G, O), T = k·l.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon.errors import GeometryError
from surgeon.layers.ops.triton.launch import Geometry, blocks, config, launch, precision, product, tuned
from surgeon.layers.pafu.frames import FrameProblem, Grads

PARTIAL_BYTES = 32 << 20  # for partial sums of kernel gradients
PROGRAMS = 256  # enough to keep a GPU busy

CONFIGS = [config(R=64, BO=64, C=32), config(R=32, BO=32, C=32), config(R=128, BO=64, C=32, warps=8)]
SINGLE = [config(R=32, BO=32, C=32), config(R=64, BO=32, C=16), config(R=32, BO=32, C=16)]
KEY = ["c_group", "o_group", "KH", "KW"]


@triton.jit
def block_of_kernel(bounds, block, n, R: tl.constexpr):
    """The kernel of a block of R sorted pixels, and the block's first and last pixel; empty if there is no such block."""
    kernel, first, last, before = 0, 0, 0, 0
    for e in range(n):
        start, stop = tl.load(bounds + e).to(tl.int32), tl.load(bounds + e + 1).to(tl.int32)
        count = tl.cdiv(stop - start, R)
        mine = (block >= before) & (block < before + count)
        kernel = tl.where(mine, e, kernel)
        first = tl.where(mine, start + (block - before) * R, first)
        last = tl.where(mine, stop, last)
        before += count
    return kernel, first, last


@triton.jit
def place(r, g):
    """Image (64 bits), row and column of output pixel r."""
    of_image = g.out_height * g.out_width
    inner = (r % of_image).to(tl.int32)
    return (r // of_image).to(tl.int64), inner // g.out_width, inner % g.out_width


@triton.jit
def read_at(i, j, ty, tx, inside, g):
    """Row and column that a tap reads, and whether they are inside the image."""
    row, column = i * g.stride_h + ty * g.dilation_h - g.pad_h, j * g.stride_w + tx * g.dilation_w - g.pad_w
    return row, column, inside & (row >= 0) & (row < g.height) & (column >= 0) & (column < g.width)


@triton.jit
def convolved(
    x, weight, i, j, inside, o, o_in, xs, g, c_group, outputs,
    KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, BO: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Outputs o of pixels (i, j) for the kernel at `weight` (T, C/G, O), (R, O); x points at images and at the first channel."""
    total = tl.zeros([R, BO], tl.float32)
    for t in range(KH * KW):
        row, column, there = read_at(i, j, t // KW, t % KW, inside, g)
        at = x + row * xs[2] + column * xs[3]
        for c0 in range(0, c_group, C):
            c = c0 + tl.arange(0, C)
            c_in = c < c_group
            patch = tl.load(at[:, None] + c[None, :] * xs[1], mask=there[:, None] & c_in[None, :], other=0.0)
            w_at = weight + (t * c_group + c)[:, None] * outputs + o[None, :]
            total = product(patch, tl.load(w_at, mask=c_in[:, None] & o_in[None, :], other=0.0), total, PRECISION)
    return total


@tuned(CONFIGS, KEY, SINGLE)
@triton.jit
def forward_kernel(
    x, weight, order, bounds, y, xs, ys, g, pixels, n, c_group, o_group, groups,
    KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, BO: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    pixel_blocks, o_blocks = tl.cdiv(pixels, R) + n, tl.cdiv(o_group, BO)
    kernel, first, last = block_of_kernel(bounds, tl.program_id(0) % pixel_blocks, n, R)
    rest = tl.program_id(0) // pixel_blocks
    group = rest // o_blocks
    o = (rest % o_blocks) * BO + tl.arange(0, BO)
    o_in = o < o_group
    o += group * o_group
    slot = first + tl.arange(0, R)
    inside = slot < last
    image, i, j = place(tl.load(order + slot, mask=inside, other=0), g)
    outputs = o_group * groups
    weight += kernel.to(tl.int64) * (KH * KW) * c_group * outputs
    x += image * xs[0] + group * c_group * xs[1]
    total = convolved(x, weight, i, j, inside, o, o_in, xs, g, c_group, outputs, KH, KW, PRECISION, R, BO, C)
    at = y + image * ys[0] + i * ys[2] + j * ys[3]
    tl.store(at[:, None] + o[None, :] * ys[1], total.to(y.dtype.element_ty), mask=inside[:, None] & o_in[None, :])


@tuned(CONFIGS, KEY, SINGLE)
@triton.jit
def scores_kernel(
    grad, x, weight, out, gs, xs, g, pixels, n, c_group, o_group, groups,
    KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, BO: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out (r, n) = <gradient of the pixel, response of every kernel there>."""
    pixel_blocks = tl.cdiv(pixels, R)
    kernel = tl.program_id(0) // pixel_blocks
    r = (tl.program_id(0) % pixel_blocks) * R + tl.arange(0, R)
    inside = r < pixels
    image, i, j = place(r, g)
    outputs = o_group * groups
    weight += kernel.to(tl.int64) * (KH * KW) * c_group * outputs
    grad += image * gs[0] + i * gs[2] + j * gs[3]
    x += image * xs[0]
    score = tl.zeros([R], tl.float32)
    for group in range(groups):
        for o0 in range(0, o_group, BO):
            o = o0 + tl.arange(0, BO)
            o_in = o < o_group
            o += group * o_group
            at = x + group * c_group * xs[1]
            answer = convolved(at, weight, i, j, inside, o, o_in, xs, g, c_group, outputs, KH, KW, PRECISION, R, BO, C)
            of_y = tl.load(grad[:, None] + o[None, :] * gs[1], mask=inside[:, None] & o_in[None, :], other=0.0)
            score += tl.sum(answer * of_y.to(tl.float32), axis=1)
    tl.store(out + r.to(tl.int64) * n + kernel, score, mask=inside)


# Never tuned: it adds to existing values.
@tuned([config(R=64, BO=32, C=32)], KEY, SINGLE[:1])
@triton.jit
def grad_x_kernel(
    grad, weight, order, bounds, out, gs, os, g, ty, tx, pixels, n, c_group, o_group, groups,
    KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, BO: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Add the contribution of one tap (ty, tx) to `out`, which has the shape of x."""
    pixel_blocks, c_blocks = tl.cdiv(pixels, R) + n, tl.cdiv(c_group, C)
    kernel, first, last = block_of_kernel(bounds, tl.program_id(0) % pixel_blocks, n, R)
    rest = tl.program_id(0) // pixel_blocks
    group = rest // c_blocks
    c = (rest % c_blocks) * C + tl.arange(0, C)
    c_in = c < c_group
    slot = first + tl.arange(0, R)
    inside = slot < last
    image, i, j = place(tl.load(order + slot, mask=inside, other=0), g)
    outputs = o_group * groups
    weight += (kernel.to(tl.int64) * (KH * KW) + ty * KW + tx) * c_group * outputs + group * o_group
    grad += image * gs[0] + i * gs[2] + j * gs[3] + group * o_group * gs[1]
    total = tl.zeros([R, C], tl.float32)
    for o0 in range(0, o_group, BO):
        o = o0 + tl.arange(0, BO)
        o_in = o < o_group
        of_y = tl.load(grad[:, None] + o[None, :] * gs[1], mask=inside[:, None] & o_in[None, :], other=0.0)
        turned = tl.load(weight + c[None, :] * outputs + o[:, None], mask=c_in[None, :] & o_in[:, None], other=0.0)
        total = product(of_y, turned, total, PRECISION)
    row, column, there = read_at(i, j, ty, tx, inside, g)
    at = out + image * os[0] + row * os[2] + column * os[3] + group * c_group * os[1]
    at = at[:, None] + c[None, :] * os[1]
    mask = there[:, None] & c_in[None, :]
    tl.store(at, total + tl.load(at, mask=mask, other=0.0), mask=mask)


@tuned([config(R=32, BO=64, C=32), config(R=32, BO=32, C=32), config(R=64, BO=64, C=32)], KEY, SINGLE[::2])
@triton.jit
def grad_kernels_kernel(
    grad, x, order, bounds, out, gs, xs, g, splits, n, c_group, o_group, groups,
    KH: tl.constexpr, KW: tl.constexpr, PRECISION: tl.constexpr, R: tl.constexpr, BO: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out (splits, n, T, C/G, O): contribution of each part of a kernel's pixels to its gradient."""
    o_blocks, c_blocks = tl.cdiv(o_group, BO), tl.cdiv(c_group, C)
    program = tl.program_id(0)
    o = (program % o_blocks) * BO + tl.arange(0, BO)
    rest = program // o_blocks
    c = (rest % c_blocks) * C + tl.arange(0, C)
    rest = rest // c_blocks
    group = rest % groups
    rest = rest // groups
    t = rest % (KH * KW)
    rest = rest // (KH * KW)
    kernel, split = rest % n, rest // n
    o_in, c_in = o < o_group, c < c_group
    o += group * o_group
    start, stop = tl.load(bounds + kernel).to(tl.int32), tl.load(bounds + kernel + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(stop - start, splits), R) * R
    first = start + split * share
    last = tl.minimum(first + share, stop)
    total = tl.zeros([C, BO], tl.float32)
    for s in range(first, last, R):
        slot = s + tl.arange(0, R)
        inside = slot < last
        image, i, j = place(tl.load(order + slot, mask=inside, other=0), g)
        row, column, there = read_at(i, j, t // KW, t % KW, inside, g)
        at = x + image * xs[0] + row * xs[2] + column * xs[3]
        at = at[None, :] + (group * c_group + c)[:, None] * xs[1]
        patch = tl.load(at, mask=there[None, :] & c_in[:, None], other=0.0)
        of_y = grad + image * gs[0] + i * gs[2] + j * gs[3]
        of_y = tl.load(of_y[:, None] + o[None, :] * gs[1], mask=inside[:, None] & o_in[None, :], other=0.0)
        total = product(patch, of_y, total, PRECISION)
    at = out + ((rest.to(tl.int64) * (KH * KW) + t) * c_group + c)[:, None] * (o_group * groups) + o[None, :]
    tl.store(at, total, mask=c_in[:, None] & o_in[None, :])


class SortedPixels(NamedTuple):
    """Pixels by kernel: `order` (r) lists them; kernel e has `bounds[e]`:`bounds[e + 1]` of it."""

    order: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, index: Tensor, n: int) -> "SortedPixels":
        ordered, order = torch.sort(index.flatten(), stable=True)
        _check_range(ordered, n)
        return cls(order, torch.searchsorted(ordered, torch.arange(n + 1, device=index.device)))


def _check_range(ordered: Tensor, n: int) -> None:
    """On a GPU the check does not synchronize: an index out of range is a device-side assertion, as for an embedding."""
    fits = (ordered[0] >= 0) & (ordered[-1] < n)
    if fits.device.type != "cpu":
        torch._assert_async(fits, f"pafu_conv: index out of range, there are {n} kernels")
    elif not fits:
        raise GeometryError(f"pafu_conv: index {int(ordered[-1])} is out of range, there are {n} kernels")


class _Call(NamedTuple):
    """Arguments of every launch."""

    problem: FrameProblem
    g: Geometry
    weight: Tensor

    @classmethod
    def of(cls, problem: FrameProblem) -> "_Call":
        window = problem.window
        g = Geometry.of(problem.x, problem.index.shape[1:], window.stride, window.padding, window.dilation)
        kernels = torch.cat([problem.kernel[None], problem.further]).to(problem.x.dtype)
        return cls(problem, g, kernels.permute(0, 3, 4, 2, 1).contiguous())

    @property
    def pixels(self) -> int:
        return self.problem.index.numel()

    @property
    def channels(self) -> tuple[int, int, int]:
        """Input channels per group, output channels per group, groups."""
        groups = self.problem.window.groups
        return self.problem.kernel.shape[1], self.problem.outputs // groups, groups

    @property
    def constants(self) -> dict[str, Any]:
        size = self.problem.window.size
        return {"KH": size[0], "KW": size[1], "PRECISION": precision(self.problem.x.dtype)}


def forward(problem: FrameProblem, out: Tensor) -> None:
    """Fill out (N, O, P, Q)."""
    call, pixels = _Call.of(problem), SortedPixels.of(problem.index, problem.n)
    x, (_, o_group, groups) = problem.x, call.channels
    launch(
        forward_kernel,
        lambda meta: (blocks(call.pixels, meta["R"]) + problem.n) * groups * blocks(o_group, meta["BO"]),
        *(x, call.weight, *pixels, out, x.stride(), out.stride(), call.g, call.pixels, problem.n, *call.channels),
        **call.constants,
    )


def backward(problem: FrameProblem, grad: Tensor, grads: Grads) -> None:
    """Add to the requested gradients, which are zero and in float32; grad is the gradient of the output, (N, O, P, Q)."""
    call, grad = _Call.of(problem), grad.to(problem.x.dtype)
    if grads.scores is not None:
        _scores(call, grad, grads.scores)
    if grads.x is None and grads.kernels is None:
        return
    pixels = SortedPixels.of(problem.index, problem.n)
    if grads.x is not None:
        _input(call, pixels, grad, grads.x)
    if grads.kernels is not None:
        _kernels(call, pixels, grad, grads.kernels)


def _scores(call: _Call, grad: Tensor, out: Tensor) -> None:
    x, n = call.problem.x, call.problem.n
    launch(
        scores_kernel,
        lambda meta: blocks(call.pixels, meta["R"]) * n,
        *(grad, x, call.weight, out, grad.stride(), x.stride(), call.g, call.pixels, n, *call.channels),
        **call.constants,
    )


def _input(call: _Call, pixels: SortedPixels, grad: Tensor, out: Tensor) -> None:
    c_group, _, groups = call.channels
    for ty in range(call.problem.window.size[0]):
        for tx in range(call.problem.window.size[1]):
            launch(
                grad_x_kernel,
                lambda meta: (blocks(call.pixels, meta["R"]) + call.problem.n) * groups * blocks(c_group, meta["C"]),
                *(grad, call.weight, *pixels, out, grad.stride(), out.stride(), call.g, ty, tx),
                *(call.pixels, call.problem.n, *call.channels),
                **call.constants,
                tune=False,
            )


def _kernels(call: _Call, pixels: SortedPixels, grad: Tensor, out: list[Tensor]) -> None:
    x, n, (c_group, o_group, groups) = call.problem.x, call.problem.n, call.channels
    taps = math.prod(call.problem.window.size)
    sums = n * taps * groups  # programs per split, in blocks of channels
    programs = sums * blocks(c_group, 32) * blocks(o_group, 64)
    bytes_of_one = n * taps * c_group * o_group * groups * 4
    splits = max(1, min(blocks(PROGRAMS, programs), PARTIAL_BYTES // bytes_of_one, blocks(call.pixels, 64)))
    partial = x.new_empty((splits, n, taps, c_group, o_group * groups), dtype=torch.float32)
    launch(
        grad_kernels_kernel,
        lambda meta: splits * sums * blocks(c_group, meta["C"]) * blocks(o_group, meta["BO"]),
        *(grad, x, *pixels, partial, grad.stride(), x.stride(), call.g, splits, n, *call.channels),
        **call.constants,
    )
    for total, found in zip(out, partial.sum(0), strict=True):
        total += found.movedim(-1, 0).view(total.shape)
