"""The PAFU operator in C (pafu.h): float32 on the CPU, bit-identical whatever the number of threads."""

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from surgeon.layers.kernels.library import memory_format_of
from surgeon.layers.kernels.native.compiler import library
from surgeon.layers.kernels.native.support import borrowed, in_parallel, pointer
from surgeon.layers.kernels.pafu_frames import Chunk, Problem

SEGMENT = 1024  # pixels of one kernel that a task takes at most, for which it packs the kernel
SPARE = 8  # places behind the sorted pixels that are read, but of no account

_GEOMETRY = ("h", "w", "c", "outputs", "groups", "lh", "lw", "sh", "sw", "dh", "dw", "n")
_LAST = ("last_0", "last_others")
_CHUNK = ("images", "rows", "columns", "height", "width", "first", "inside", "across", "top", "left", "last")
_TENSORS = ("x", "kernel", "further", "grad", "index", "bounds", "order", "start", "frame", "y", "g", "gframe")
_GRADIENTS = ("gkernel", "gfurther", "gscores")


class _Plan(ctypes.Structure):
    """`Pafu` of pafu.h."""

    _fields_ = [(name, ctypes.c_int64) for name in (*_GEOMETRY, *_LAST, *_CHUNK)]


class _Tensors(ctypes.Structure):
    """`PafuTensors` of pafu.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in (*_TENSORS, *_GRADIENTS)]


def _dense(kernels: Tensor) -> tuple[Tensor, bool]:
    """Kernels (..., O, C/G, k, l) without gaps, and whether their channels are last in memory."""
    last = kernels.movedim(-3, -1).is_contiguous()
    return kernels if last else kernels.contiguous(), last


class _Work:
    """One call: the operands as the C functions take them, chunk by chunk."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.library = problem, library()
        self.format = memory_format_of(problem.x)
        self.last = self.format == torch.channels_last
        self.x = problem.x.contiguous(memory_format=self.format)
        self.kernel, first = _dense(problem.kernel)
        self.further, others = _dense(problem.further)
        self.index = problem.index.contiguous()
        window = problem.window
        sizes = (*self.x.shape[2:], self.x.shape[1], problem.outputs, window.groups)
        self.geometry = (*sizes, *window.size, *window.stride, *window.dilation, problem.n, first, others)

    def chunks(self) -> Iterator[Chunk]:
        stride_h, stride_w = self.problem.window.stride
        return self.problem.chunks(4 * (self.x.shape[1] * stride_h * stride_w + self.problem.outputs))

    def plan(self, chunk: Chunk) -> _Plan:
        images, rows = chunk.images.stop - chunk.images.start, chunk.rows.stop - chunk.rows.start
        inside = (chunk.inside.start, chunk.inside.stop - chunk.inside.start, chunk.across.stop)
        frame = (chunk.height, chunk.width, *inside, chunk.top, chunk.left)
        return _Plan(*self.geometry, images, rows, self.index.shape[2], *frame, self.last)

    @contextmanager
    def sorted(self, plan: _Plan, chunk: Chunk) -> Iterator[tuple[_Tensors, list[int]]]:
        """The chunk's frame and sorted pixels, and where the pixels of each kernel begin."""
        pixels = plan.images * plan.rows * plan.columns
        bounds, order, start = (self.index.new_empty(size) for size in (plan.n + 1, pixels, pixels + SPARE))
        index = self.index[chunk.images, chunk.rows]
        with borrowed(plan.images * plan.height * plan.width * plan.c) as frame:
            given = {"x": self.x[chunk.images], "kernel": self.kernel, "further": self.further, "index": index}
            made = {"bounds": bounds, "order": order, "start": start, "frame": frame}
            tensors = _Tensors(**{name: pointer(t) for name, t in (given | made).items()})
            at, operands = ctypes.byref(plan), ctypes.byref(tensors)
            self.library.pafu_sort(at, operands)
            in_parallel(lambda image, _: self.library.pafu_frame(at, operands, ctypes.c_int64(image)), plan.images, 0)
            yield tensors, bounds.tolist()

    def forward(self, y: Tensor) -> None:
        """Fill y (N, O, P, Q), of the memory format of x."""
        run = self.library.pafu_forward
        plane = self.index.shape[1] * self.index.shape[2]
        for chunk in self.chunks():
            plan = self.plan(chunk)
            at, blocks = ctypes.byref(plan), self.library.pafu_blocks(ctypes.byref(plan))
            own = y[chunk.images, :, chunk.rows]
            with ExitStack() as stack:
                tensors, bounds = stack.enter_context(self.sorted(plan, chunk))
                operands = ctypes.byref(tensors)
                size = plan.images * plan.rows * plan.columns * plan.outputs
                tensors.y = pointer(own if self.last else stack.enter_context(borrowed(size)))
                tasks = [(*part, block) for part in _segments(bounds) for block in range(blocks)]

                def work(task: int, scratch: Tensor) -> None:
                    run(at, operands, pointer(scratch), *map(ctypes.c_int64, tasks[task]))  # noqa: B023 - runs at once

                in_parallel(work, len(tasks), self.library.pafu_scratch(at))
                if not self.last:
                    to = pointer(own), ctypes.c_int64(plane)
                    in_parallel(
                        lambda image, _: self.library.pafu_output(at, operands, *to, ctypes.c_int64(image)),  # noqa: B023
                        plan.images,
                        0,
                    )


def _segments(bounds: list[int]) -> Iterator[tuple[int, int, int]]:
    """Kernel, first and end of runs of sorted pixels, each of one kernel."""
    for kernel, (start, stop) in enumerate(pairwise(bounds)):
        pieces = -(-(stop - start) // SEGMENT)
        for piece in range(pieces):
            yield kernel, *(start + (stop - start) * p // pieces for p in (piece, piece + 1))


def forward(problem: Problem, out: Tensor) -> None:
    """Fill out (N, O, P, Q)."""
    _Work(problem).forward(out)
