"""Kernel selection for depthwise convolutions: tap by tap, the selected kernel's weight is looked up for every pixel.

Legend: B images of a chunk, P Q its output rows and columns, R = B·P·Q its pixels, C input channels, O = C·M output channels,
n kernels, k l kernel size.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.layers.pafu.frames import FrameChunk, FrameProblem, Grads


def _views(problem: FrameProblem, chunk: FrameChunk, frame: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """For each tap, its position in the kernel and the view (B, P, Q, C) of the frame that it multiplies."""
    (s_h, s_w), (d_h, d_w) = problem.window.stride, problem.window.dilation
    rows, columns = chunk.rows.stop - chunk.rows.start, problem.index.shape[2]
    for i in range(problem.window.size[0]):
        for j in range(problem.window.size[1]):
            down = slice(i * d_h, i * d_h + (rows - 1) * s_h + 1, s_h)
            right = slice(j * d_w, j * d_w + (columns - 1) * s_w + 1, s_w)
            yield i, j, frame[:, down, right]


def _tables(problem: FrameProblem) -> Tensor:
    """Weights by tap, (k, l, n, O)."""
    kernels = torch.cat([problem.kernel[None], problem.further])
    return kernels[:, :, 0].permute(2, 3, 0, 1).to(problem.compute_dtype).contiguous()


def _pixel_bytes(problem: FrameProblem) -> int:
    return (problem.x.shape[1] + 4 * problem.outputs) * problem.compute_dtype.itemsize


def forward(problem: FrameProblem, out: Tensor) -> None:
    tables = _tables(problem)
    for chunk in problem.chunks(_pixel_bytes(problem)):
        index = problem.index[chunk.images, chunk.rows]
        frame = chunk.read(problem.x, problem.compute_dtype)
        y_BPQCM = frame.new_zeros(
            (*index.shape, frame.shape[-1], problem.outputs // frame.shape[-1]), dtype=problem.sum_dtype
        )
        for i, j, view_BPQC in _views(problem, chunk, frame):
            weights = tables[i, j].index_select(0, index.flatten()).view_as(y_BPQCM)
            y_BPQCM.addcmul_(weights.to(y_BPQCM.dtype), view_BPQC[..., None].to(y_BPQCM.dtype))
        target = chunk.outputs(out)
        target.copy_(y_BPQCM.view(target.shape))


def backward(problem: FrameProblem, grad: Tensor, grads: Grads) -> None:
    tables = _tables(problem)
    for chunk in problem.chunks(_pixel_bytes(problem)):
        index = problem.index[chunk.images, chunk.rows]
        frame = chunk.read(problem.x, problem.sum_dtype)
        frame_grad = torch.zeros_like(frame)
        g_RO = chunk.outputs(grad).to(frame.dtype).reshape(-1, problem.outputs)
        chosen_Rn = F.one_hot(index.flatten(), problem.n).to(frame.dtype)
        scores_Rn = torch.zeros_like(chosen_Rn)
        grad_views = _views(problem, chunk, frame_grad)
        for (i, j, view_BPQC), (_, _, grad_view) in zip(_views(problem, chunk, frame), grad_views, strict=True):
            table_nO = tables[i, j].to(frame.dtype)
            g_BPQCM = g_RO.view(*view_BPQC.shape, -1)
            if grads.x is not None:
                grad_view.add_((table_nO.index_select(0, index.flatten()).view_as(g_BPQCM) * g_BPQCM).sum(-1))
            products_RO = (g_BPQCM * view_BPQC[..., None]).view_as(g_RO)
            if grads.kernels is not None:
                for total, share in zip(grads.kernels, chosen_Rn.t() @ products_RO, strict=True):
                    total[:, i, j, 0] += share
            if grads.scores is not None:
                scores_Rn.addmm_(products_RO, table_nO.t())
        if grads.x is not None:
            chunk.add_to(grads.x, frame_grad)
        if grads.scores is not None:
            target = grads.scores[chunk.images, chunk.rows]
            target.copy_(scores_Rn.view(target.shape))
