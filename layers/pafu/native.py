"""The PAFU operator in C (pafu.h), for the CPU: computed in float32, bit-identical for any number of threads."""

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from surgeon.layers.ops.library import memory_format_of
from surgeon.layers.ops.native.compiler import library
from surgeon.layers.ops.native.half import all_float32, image_blocks
from surgeon.layers.ops.native.support import MOVED_MACS, borrowed, in_parallel, pointer, threads_for
from surgeon.layers.pafu.frames import FrameChunk, FrameProblem, Grads

FEWEST = 4  # channels per group: with fewer, vectors are mostly empty and torch is faster
CHUNK_BYTES = 4 << 20  # of input and output at a time, to stay in the L2 cache
SEGMENT = 1024  # maximum pixels per task; a task packs its kernel once
CALLS = 4  # into C for each thread, so that none waits long for the last one
PARTS = 4  # minimum tasks for the gradient of the input, if there are as many images
SPARE = 8  # padding after the sorted pixels, which is read but not used
SPARE_FLOATS = 16  # padding after buffers, which are read in whole vectors

_GEOMETRY = ("h", "w", "c", "outputs", "groups", "lh", "lw", "sh", "sw", "dh", "dw", "n")
_ORDER = ("last_0", "last_others", "segment")
_CHUNK = (
    "plane",
    "images",
    "rows",
    "columns",
    "height",
    "width",
    "first",
    "inside",
    "across",
    "top",
    "left",
    "last",
    "parts",
)
_GIVEN = ("x", "kernel", "further", "grad", "index")
_MADE = ("bounds", "order", "start", "runs", "frame", "y", "g", "gframe", "out", "gx")
_GRADIENTS = ("gkernel", "gfurther", "gscores")


class _Plan(ctypes.Structure):
    """`Pafu` of pafu.h."""

    _fields_ = [(name, ctypes.c_int64) for name in (*_GEOMETRY, *_ORDER, *_CHUNK)]


class _Tensors(ctypes.Structure):
    """`PafuTensors` of pafu.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in (*_GIVEN, *_MADE, *_GRADIENTS)]


def _dense(kernels: Tensor) -> tuple[Tensor, bool]:
    """Kernels (..., O, C/G, k, l) without gaps, and whether their channels are last in memory."""
    last = kernels.movedim(-3, -1).is_contiguous()
    return kernels if last else kernels.contiguous(), last


def _at(t: Tensor, image: int, row: int = 0, rows: int = 1) -> int:
    """Address of an image of a batch, or of a row of it; `rows` is the dimension they are in."""
    return t.data_ptr() + t.element_size() * (image * t.stride(0) + row * t.stride(rows))


class _Call:
    """Sizes, operands and borrowed buffers of a call in the layout of the C functions: of one chunk after another."""

    def __init__(self, problem: FrameProblem, parts: int, stack: ExitStack) -> None:
        window = problem.window
        self.problem, self.parts, self.stack, self.library = problem, parts, stack, library()
        self.last = memory_format_of(problem.x) == torch.channels_last
        self.x, self.index = self.laid_out(problem.x), problem.index.contiguous()
        self.kernel, first = _dense(problem.kernel)
        self.further, others = _dense(problem.further)
        given = (*self.x.shape[2:], self.x.shape[1], problem.outputs, window.groups)
        sizes = (*given, *window.size, *window.stride, *window.dilation, problem.n, first, others, SEGMENT)
        rows, columns = self.index.shape[1:]
        self.plan = _Plan(*sizes, rows * columns, columns=columns, last=self.last)
        self.tensors = _Tensors(kernel=self.kernel.data_ptr(), further=self.further.data_ptr())
        self.operands = ctypes.byref(self.plan), ctypes.byref(self.tensors)
        self.scratch = self.library.pafu_scratch(self.operands[0])
        self.runs = 0  # of sorted pixels of one kernel

    def laid_out(self, t: Tensor) -> Tensor:
        """In the memory format of x, without gaps."""
        return t.contiguous(memory_format=torch.channels_last if self.last else torch.contiguous_format)

    def borrow(self, floats: int) -> Tensor:
        return self.stack.enter_context(borrowed(floats + SPARE_FLOATS))

    def frame(self) -> Tensor:
        """Buffer for the frame or its gradient."""
        return self.borrow(self.plan.images * self.plan.height * self.plan.width * self.plan.c)

    def buffers(self) -> None:
        """For the first chunk, which is the largest: the sorted pixels, the frame, and a map as the output, channels last."""
        plan, tensors = self.plan, self.tensors
        pixels, keys = plan.images * plan.rows * plan.columns, plan.parts * plan.n
        sizes = (keys + 1, pixels + SPARE, pixels + SPARE, 3 * (keys + pixels // SEGMENT + 1))
        starts = accumulate((2 * size * 4 for size in sizes), initial=self.borrow(2 * sum(sizes)).data_ptr())
        tensors.bounds, tensors.order, tensors.start, tensors.runs, _ = starts
        tensors.frame = self.frame().data_ptr()
        if not self.last:
            tensors.y = tensors.g = self.borrow(pixels * plan.outputs).data_ptr()

    def chunks(self) -> Iterator[FrameChunk]:
        """The chunks, each with its frame and its pixels, sorted; its images are split into `parts`, if there are as many."""
        plan, tensors, (stride_h, stride_w) = self.plan, self.tensors, self.problem.window.stride
        pixel = 4 * (self.x.shape[1] * stride_h * stride_w + self.problem.outputs)
        for chunk in self.problem.chunks(pixel, CHUNK_BYTES):
            images, rows, inside = chunk.images, chunk.rows, chunk.inside
            plan.images, plan.rows, plan.inside = (part.stop - part.start for part in (images, rows, inside))
            plan.height, plan.width, plan.top, plan.left = chunk.height, chunk.width, chunk.top, chunk.left
            plan.first, plan.across, plan.parts = inside.start, chunk.across.stop, min(self.parts, plan.images)
            if not tensors.frame:
                self.buffers()
            tensors.x, tensors.index = _at(self.x, images.start), _at(self.index, images.start, rows.start)
            self.runs = self.library.pafu_sort(*self.operands)
            self.moves("pafu_frame")
            yield chunk

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass of the chunk."""
        plan = self.plan
        return int(plan.images * plan.rows * plan.columns * plan.outputs * (plan.c // plan.groups) * plan.lh * plan.lw)

    def moves(self, name: str) -> None:
        """Call a C function that moves the numbers of an image, for every image of the chunk."""
        plan = self.plan
        numbers = plan.images * max(plan.height * plan.width * plan.c, plan.rows * plan.columns * plan.outputs)
        self.run(name, plan.images, MOVED_MACS * numbers)

    def run(self, name: str, tasks: int, macs: int) -> None:
        """Call a C function for every task, several in one call from Python; the tasks write to disjoint memory."""
        run, function = self.library.pafu_tasks, ctypes.cast(getattr(self.library, name), ctypes.c_void_p)
        threads = threads_for(macs)
        calls = min(tasks, CALLS * threads) if threads > 1 else 1

        def work(part: int, scratch: Tensor) -> None:
            first, end = (ctypes.c_int64(tasks * p // calls) for p in (part, part + 1))
            run(*self.operands, pointer(scratch), function, first, end)

        in_parallel(work, calls, self.scratch, threads)


def in_range(index: Tensor, n: int) -> bool:
    """Whether an index (int64) names nothing but n kernels."""
    index = index.contiguous()
    return bool(library().pafu_in_range(pointer(index), ctypes.c_int64(index.numel()), ctypes.c_int64(n)))


def forward(problem: FrameProblem, out: Tensor) -> None:
    """Fill out (N, O, P, Q), which has the memory format and dtype of x."""
    for block, part in _in_float32(problem):
        if part is problem:
            _forward(part, out)
        else:
            y = torch.empty_like(out[block], dtype=torch.float32)
            _forward(part, y)
            out[block] = y


def _in_float32(problem: FrameProblem) -> Iterator[tuple[slice, FrameProblem]]:
    """The problem in float32, of half precision for a few images at a time, and which images."""
    x, kernel, further, index = problem.x, problem.kernel, problem.further, problem.index
    if all_float32(x, kernel, further):
        yield slice(None), problem
        return
    kernel, further = kernel.float(), further.float()
    for block in image_blocks(x):
        yield block, replace(problem, x=x[block].float(), kernel=kernel, further=further, index=index[block])


def _forward(problem: FrameProblem, out: Tensor) -> None:
    with ExitStack() as stack:
        call = _Call(problem, 1, stack)
        blocks = call.library.pafu_blocks(call.operands[0])
        for chunk in call.chunks():
            call.tensors.out = _at(out, chunk.images.start, chunk.rows.start, 2)
            if call.last:
                call.tensors.y = call.tensors.out
            call.run("pafu_forward", call.runs * blocks, call.macs)
            if not call.last:
                call.moves("pafu_output")


def backward(problem: FrameProblem, grad: Tensor, grads: Grads) -> None:
    """Add to the requested gradients (that of x in its memory format); grad is the gradient of the output, (N, O, P, Q)."""
    kernel, further = (k.movedim(-3, -1).contiguous().movedim(-1, -3) for k in (problem.kernel, problem.further))
    for block, part in _in_float32(replace(problem, kernel=kernel, further=further)):
        own = [None if sums is None else sums[block] for sums in (grads.x, grads.scores)]
        _backward(part, grad[block].float(), Grads(own[0], grads.kernels, own[1]))


def _backward(problem: FrameProblem, grad: Tensor, grads: Grads) -> None:
    """For kernels that have their channels last in memory."""
    with ExitStack() as stack:
        call = _Call(problem, 1, stack)
        plan, tensors, grad = call.plan, call.tensors, call.laid_out(grad)
        blocks = call.library.pafu_input_blocks(call.operands[0])
        call.parts = -(-PARTS // blocks)
        frame: Tensor | None = None
        if grads.kernels is not None:
            tensors.gkernel, *others = (sums.data_ptr() for sums in grads.kernels)
            tensors.gfurther = others[0] if others else None
        for chunk in call.chunks():
            image, row = chunk.images.start, chunk.rows.start
            tensors.grad = _at(grad, image, row, 2)
            if call.last:
                tensors.g = tensors.grad
            else:
                call.moves("pafu_gradient")
            if grads.kernels is not None:
                call.run("pafu_kernel_gradient", plan.n * plan.lh * plan.lw, call.macs)
            if grads.scores is not None:
                tensors.gscores = _at(grads.scores, image, row)
                pieces = call.library.pafu_score_pieces(call.operands[0])
                call.run("pafu_score_gradient", plan.n * pieces, plan.n * call.macs)
            if grads.x is not None:
                frame = call.frame() if frame is None else frame
                frame.zero_()
                tensors.gframe, tensors.gx = frame.data_ptr(), _at(grads.x, image)
                call.run("pafu_input_gradient", plan.parts * blocks, call.macs)
                call.moves("pafu_input_add")
