"""Kernel selection by plain convolutions: one masked convolution per kernel that is selected anywhere.

Cheapest if few kernels are selected, or if a kernel's groups are too small for matrix products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.layers.pafu.frames import FrameProblem, Grads


def _kernels(problem: FrameProblem) -> list[Tensor]:
    dtype = problem.compute_dtype
    return [problem.kernel.to(dtype), *problem.further.to(dtype).unbind()]


def _pixel_bytes(problem: FrameProblem) -> int:
    return (problem.x.shape[1] + 3 * problem.outputs) * problem.compute_dtype.itemsize


def forward(problem: FrameProblem, out: Tensor) -> None:
    kernels, window = _kernels(problem), problem.window
    for chunk in problem.chunks(_pixel_bytes(problem)):
        frame = chunk.read(problem.x, problem.compute_dtype).movedim(-1, 1)
        index = problem.index[chunk.images, chunk.rows, :, None]
        target = chunk.outputs(out)
        for place, i in enumerate(problem.present):
            y = F.conv2d(frame, kernels[i], None, window.stride, 0, window.dilation, window.groups).movedim(1, -1)
            target.copy_(y if place == 0 else torch.where(index == i, y.to(out.dtype), target))


def backward(problem: FrameProblem, grad: Tensor, grads: Grads) -> None:
    kernels, window = _kernels(problem), problem.window
    wanted = [grads.x is not None, grads.kernels is not None, False]
    for chunk in problem.chunks(_pixel_bytes(problem)):
        frame = chunk.read(problem.x, problem.compute_dtype).movedim(-1, 1)
        index = problem.index[chunk.images, chunk.rows, :, None]
        g = chunk.outputs(grad).to(frame.dtype)
        for i in problem.present if any(wanted) else []:
            mine = (g * (index == i)).movedim(-1, 1)
            settings = (None, window.stride, (0, 0), window.dilation, False, (0, 0), window.groups, wanted)
            frame_grad, kernel_grad, _ = torch.ops.aten.convolution_backward(mine, frame, kernels[i], *settings)
            if grads.x is not None:
                chunk.add_to(grads.x, frame_grad.movedim(1, -1))
            if grads.kernels is not None:
                grads.kernels[i].add_(kernel_grad.movedim(1, -1))
        for i, kernel in enumerate(kernels if grads.scores is not None else []):
            y = F.conv2d(frame, kernel, None, window.stride, 0, window.dilation, window.groups).movedim(1, -1)
            assert grads.scores is not None
            grads.scores[chunk.images, chunk.rows, :, i] = (y.to(grads.scores.dtype) * g.to(grads.scores.dtype)).sum(-1)
