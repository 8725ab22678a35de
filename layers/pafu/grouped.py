"""Kernel selection by sorting: the cost of one convolution, regardless of the number of kernels.

The pixels of a chunk are sorted by selected kernel. In small blocks that stay in the cache, their patches are gathered from the
channels-last frame and multiplied by their kernel, one product per kernel and block; the result rows are scattered back.

Legend: B images of a chunk, R pixels of a chunk or block, C channels, G groups, O output channels, n kernels, U = k·l·C/G numbers
of a patch (channels last).
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from surgeon.layers.pafu.frames import FrameChunk, FrameProblem, Grads

BLOCK_BYTES = 2 << 20  # gathered patches; measured: they must stay in the cache until multiplied


class Block(NamedTuple):
    """Sorted pixels `pixels` of a chunk, rows `at` (R·k·l) of their taps, and `segments`, each of one kernel, within the block."""

    pixels: slice
    at: Tensor
    segments: list[tuple[int, slice]]


class SortedChunk(NamedTuple):
    """The pixels of a chunk in the order of their selected kernels.

    `order` (R) lists them, `inverse` (R) maps each to its position, `starts` (R) are the frame's rows of their first taps, `taps`
    (k·l) the offsets of all taps from the first, `bounds` (n + 1) where each kernel's pixels start.
    """

    order: Tensor
    inverse: Tensor
    starts: Tensor
    taps: Tensor
    bounds: list[int]

    @classmethod
    def of(cls, problem: FrameProblem, chunk: FrameChunk) -> "SortedChunk":
        index, window = problem.index[chunk.images, chunk.rows], problem.window
        images, rows, columns = (torch.arange(size, device=index.device) for size in index.shape)
        corners = images[:, None, None] * chunk.height + rows[:, None] * window.stride[0]
        starts = (corners * chunk.width + columns * window.stride[1]).flatten()
        down, right = (
            torch.arange(k, device=index.device) * d for k, d in zip(window.size, window.dilation, strict=True)
        )
        taps = (down[:, None] * chunk.width + right).flatten()
        order = torch.sort(index.flatten(), stable=True).indices
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=index.device))
        ends = torch.bincount(index.flatten(), minlength=problem.n).cumsum(0)
        return cls(order, inverse, starts[order], taps, [0, *ends.tolist()])

    def blocks(self, patch_bytes: int) -> Iterator[Block]:
        """Consecutive blocks of sorted pixels, cut at kernel boundaries if possible: each cut segment costs an extra product."""
        size = _block_size(patch_bytes)
        first = last = 0
        segments: list[tuple[int, slice]] = []
        for kernel, (start, stop) in enumerate(pairwise(self.bounds)):
            pieces = max(-(-(stop - start) // size), 1)
            cuts = [start + (stop - start) * piece // pieces for piece in range(pieces + 1)]
            for begin, end in pairwise(cuts):
                if end - first > size and last > first:
                    yield self._block(first, last, segments)
                    first, segments = begin, []
                if begin < end:
                    segments.append((kernel, slice(begin - first, end - first)))
                last = end
        yield self._block(first, last, segments)

    def _block(self, first: int, last: int, segments: list[tuple[int, slice]]) -> Block:
        return Block(slice(first, last), (self.starts[first:last, None] + self.taps).flatten(), segments)


def _block_size(patch_bytes: int) -> int:
    """Maximum number of pixels per block."""
    return max(BLOCK_BYTES // patch_bytes, 64)


def _patch_buffer(problem: FrameProblem) -> Tensor:
    """Buffer for the patches of a block, (pixels·k·l, C/G): reused, it stays in the cache and costs no page faults."""
    taps, width = math.prod(problem.window.size), problem.kernel.shape[1]
    pixels = min(_block_size(taps * width * problem.compute_dtype.itemsize), problem.index.numel())
    return problem.x.new_empty((pixels * taps, width), dtype=problem.compute_dtype)


def _matrices(problem: FrameProblem) -> list[Tensor]:
    """The kernels as (O, U), without a copy if their channels are last in memory."""
    dtype = problem.compute_dtype
    further = problem.further.movedim(2, -1).to(dtype).flatten(2)
    return [problem.kernel.movedim(1, -1).to(dtype).flatten(1), *further.unbind()]


def _group_slices(problem: FrameProblem) -> list[tuple[slice, slice]]:
    """(input channels, output channels) of each group."""
    c, o = problem.kernel.shape[1], problem.outputs // problem.window.groups
    return [(slice(g * c, (g + 1) * c), slice(g * o, (g + 1) * o)) for g in range(problem.window.groups)]


def _pixel_bytes(problem: FrameProblem, copies: int) -> int:
    """Bytes that a chunk needs per output pixel: frame, and rows of output channels."""
    stride_h, stride_w = problem.window.stride
    channels = problem.x.shape[1] * stride_h * stride_w + copies * problem.outputs
    return channels * problem.compute_dtype.itemsize


def forward(problem: FrameProblem, out: Tensor) -> None:
    """Fill out (N, O, P, Q)."""
    dtype = problem.compute_dtype
    kernels, buffer = _matrices(problem), _patch_buffer(problem)
    for chunk in problem.chunks(_pixel_bytes(problem, 2)):
        pixels = SortedChunk.of(problem, chunk)
        frame = chunk.read(problem.x, dtype)
        y_RO = frame.new_empty((len(pixels.order), problem.outputs))
        for inputs, outputs in _group_slices(problem):
            rows = frame[..., inputs].reshape(-1, problem.kernel.shape[1])
            patch = kernels[0].shape[1]
            for block in pixels.blocks(patch * dtype.itemsize):
                patches = torch.index_select(rows, 0, block.at, out=buffer[: len(block.at)])
                patches_RU = patches.view(-1, patch)
                y_block = y_RO[block.pixels, outputs]
                for i, segment in block.segments:
                    torch.mm(patches_RU[segment], kernels[i][outputs].t(), out=y_block[segment])
        target = chunk.outputs(out)
        target.copy_(torch.index_select(y_RO, 0, pixels.inverse).view(target.shape))


def backward(problem: FrameProblem, grad: Tensor, grads: Grads) -> None:
    """Add to the requested gradients; grad is the gradient of the output, (N, O, P, Q)."""
    dtype = problem.compute_dtype
    kernels, buffers = _matrices(problem), (_patch_buffer(problem), _patch_buffer(problem))
    kernel_grads = None if grads.kernels is None else [total.flatten(1) for total in grads.kernels]
    for chunk in problem.chunks(_pixel_bytes(problem, 3)):
        pixels = SortedChunk.of(problem, chunk)
        frame = chunk.read(problem.x, dtype)
        g_RO = chunk.outputs(grad).to(dtype).reshape(-1, problem.outputs).index_select(0, pixels.order)
        frame_grad = None if grads.x is None else torch.zeros_like(frame, dtype=grads.x.dtype)
        scores_Rn = None if grads.scores is None else grads.scores.new_zeros((len(g_RO), problem.n))
        for inputs, outputs in _group_slices(problem):
            rows = frame[..., inputs].reshape(-1, problem.kernel.shape[1])
            work = _GroupWork(
                [kernel[outputs] for kernel in kernels],
                g_RO[:, outputs],
                None if frame_grad is None else torch.zeros_like(rows, dtype=frame_grad.dtype),
                None if kernel_grads is None else [total[outputs] for total in kernel_grads],
                scores_Rn,
                buffers,
            )
            for block in pixels.blocks(rows.shape[1] * len(pixels.taps) * dtype.itemsize):
                work.add(rows, block)
            if frame_grad is not None and work.rows_grad is not None:
                frame_grad[..., inputs] = work.rows_grad.view(*frame.shape[:-1], -1)
        if grads.x is not None and frame_grad is not None:
            chunk.add_to(grads.x, frame_grad)
        if grads.scores is not None and scores_Rn is not None:
            target = grads.scores[chunk.images, chunk.rows]
            target.copy_(scores_Rn.index_select(0, pixels.inverse).view(target.shape))


class _GroupWork(NamedTuple):
    """One chunk and one group of channels in the backward pass: kernels n × (O/G, U), gradient (R, O/G), and the accumulators."""

    kernels: list[Tensor]
    g_RO: Tensor
    rows_grad: Tensor | None
    kernel_grads: list[Tensor] | None
    scores_Rn: Tensor | None
    buffers: tuple[Tensor, Tensor]

    def add(self, rows: Tensor, block: Block) -> None:
        """Add the contribution of a block, whose patches come from the frame's rows (B·height·width, C/G)."""
        g_RO = self.g_RO[block.pixels]
        if self.rows_grad is not None:
            z = self.buffers[0][: len(block.at)]
            z_RU = z.view(len(g_RO), -1)
            for i, segment in block.segments:
                torch.mm(g_RO[segment], self.kernels[i], out=z_RU[segment])
            self.rows_grad.index_add_(0, block.at, z.to(self.rows_grad.dtype))
        if self.kernel_grads is None and self.scores_Rn is None:
            return
        patches = torch.index_select(rows, 0, block.at, out=self.buffers[1][: len(block.at)])
        patches_RU = patches.view(len(g_RO), -1)
        if self.kernel_grads is not None:
            for i, segment in block.segments:
                _add_product(self.kernel_grads[i], g_RO[segment].t(), patches_RU[segment])
        if self.scores_Rn is not None:
            g = g_RO.to(self.scores_Rn.dtype)
            y_RO = torch.empty_like(g_RO)
            for i, kernel in enumerate(self.kernels):
                torch.mm(patches_RU, kernel.t(), out=y_RO)
                self.scores_Rn[block.pixels, i] += (y_RO * g).sum(1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may have a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b))
