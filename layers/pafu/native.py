"""The PAFU operator in C (pafu.h), for the CPU: computed in float32, bit-identical for any number of threads."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, pairwise

import torch
from torch import Tensor

from surgeon.layers.ops.library import memory_format_of
from surgeon.layers.ops.native.compiler import library
from surgeon.layers.ops.native.half import all_float32, image_blocks
from surgeon.layers.ops.native.support import borrowed, in_parallel, pointer
from surgeon.layers.pafu.frames import FrameChunk, FrameProblem, Grads

FEWEST = 4  # channels per group: with fewer, vectors are mostly empty and torch is faster
CHUNK_BYTES = 4 << 20  # of input and output at a time, to stay in the L2 cache
SEGMENT = 1024  # maximum pixels per task; a task packs its kernel once
CALLS = 4  # into C for each thread, so that none waits long for the last one
PARTS = 4  # minimum tasks for the gradient of the input, if there are as many images
SPARE = 8  # padding after the sorted pixels, which is read but not used
SPARE_FLOATS = 16  # padding after buffers, which are read in whole vectors

_GEOMETRY = ("h", "w", "c", "outputs", "groups", "lh", "lw", "sh", "sw", "dh", "dw", "n")
_LAST = ("last_0", "last_others")
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
_MADE = ("bounds", "order", "start", "frame", "y", "g", "gframe", "out", "gx")
_GRADIENTS = ("gkernel", "gfurther", "gscores")


class _Plan(ctypes.Structure):
    """`Pafu` of pafu.h."""

    _fields_ = [(name, ctypes.c_int64) for name in (*_GEOMETRY, *_LAST, *_CHUNK)]


class _Tensors(ctypes.Structure):
    """`PafuTensors` of pafu.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in (*_GIVEN, *_MADE, *_GRADIENTS)]


def _dense(kernels: Tensor) -> tuple[Tensor, bool]:
    """Kernels (..., O, C/G, k, l) without gaps, and whether their channels are last in memory."""
    last = kernels.movedim(-3, -1).is_contiguous()
    return kernels if last else kernels.contiguous(), last


class _Work:
    """One chunk of a call: sizes and operands in the layout of the C functions, and the buffers borrowed for them."""

    def __init__(self, call: "_Call", chunk: FrameChunk, parts: int, stack: ExitStack) -> None:
        self.call, self.chunk, self.stack = call, chunk, stack
        images, rows = chunk.images.stop - chunk.images.start, chunk.rows.stop - chunk.rows.start
        columns, inside = call.index.shape[2], chunk.inside.stop - chunk.inside.start
        frame = (chunk.height, chunk.width, chunk.inside.start, inside, chunk.across.stop, chunk.top, chunk.left)
        plane = call.index.shape[1] * columns
        self.plan = _Plan(*call.sizes, plane, images, rows, columns, *frame, call.last, min(parts, images))
        self.pixels, self.keys = images * rows * columns, self.plan.parts * self.plan.n
        index = call.index[chunk.images, chunk.rows]
        sizes = [self.keys + 1, self.pixels + SPARE, self.pixels + SPARE]
        self.sorted = self.borrow(2 * sum(sizes))[: 2 * sum(sizes)].view(torch.int64).split(sizes)
        given = (call.x[chunk.images], call.kernel, call.further, None, index, *self.sorted)
        self.tensors = _Tensors(*map(pointer, given))
        self.tensors.frame = pointer(self.frame())
        call.library.pafu_sort(ctypes.byref(self.plan), ctypes.byref(self.tensors))
        self.run("pafu_frame", self.images())

    def borrow(self, floats: int) -> Tensor:
        return self.stack.enter_context(borrowed(floats + SPARE_FLOATS))

    def frame(self) -> Tensor:
        """Buffer for the frame or its gradient."""
        return self.borrow(self.plan.images * self.plan.height * self.plan.width * self.plan.c)

    def output(self, y: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        """The chunk's part of an output-sized map, and its channels-last version: the same memory, or a buffer."""
        own = pointer(y[self.chunk.images, :, self.chunk.rows])
        return own, own if self.call.last else pointer(self.borrow(self.pixels * self.plan.outputs))

    def images(self) -> list[tuple[int]]:
        return [(image,) for image in range(self.plan.images)]

    def segments(self, bounds: list[int]) -> Iterator[tuple[int, int, int]]:
        """Kernel, first and end of each run of sorted pixels of one kernel."""
        for key, (start, stop) in enumerate(pairwise(bounds)):
            pieces = -(-(stop - start) // SEGMENT)
            for piece in range(pieces):
                yield key % self.plan.n, *(start + (stop - start) * p // pieces for p in (piece, piece + 1))

    def run(self, name: str, tasks: Sequence[tuple[int, ...]]) -> None:
        """Call a C function for every task, several in one call from Python; the tasks write to disjoint memory."""
        if not tasks:
            return
        library, width, threads = self.call.library, len(tasks[0]), torch.get_num_threads()
        function = ctypes.cast(getattr(library, name), ctypes.c_void_p)
        operands = ctypes.byref(self.plan), ctypes.byref(self.tensors)
        numbers = (ctypes.c_int64 * (width * len(tasks)))(*chain.from_iterable(tasks))
        calls = min(len(tasks), CALLS * threads) if threads > 1 else 1

        def work(part: int, scratch: Tensor) -> None:
            first, end = (len(tasks) * p // calls for p in (part, part + 1))
            own = ctypes.byref(numbers, first * width * ctypes.sizeof(ctypes.c_int64))
            count = ctypes.c_int64(end - first)
            library.pafu_tasks(*operands, pointer(scratch), function, own, ctypes.c_int64(width), count)

        in_parallel(work, calls, self.call.scratch)


class _Call:
    """The operands of a call in the layout of the C functions."""

    def __init__(self, problem: FrameProblem) -> None:
        window = problem.window
        self.problem, self.library = problem, library()
        self.last = memory_format_of(problem.x) == torch.channels_last
        self.x, self.index = self.laid_out(problem.x), problem.index.contiguous()
        self.kernel, first = _dense(problem.kernel)
        self.further, others = _dense(problem.further)
        given = (*self.x.shape[2:], self.x.shape[1], problem.outputs, window.groups)
        self.sizes = (*given, *window.size, *window.stride, *window.dilation, problem.n, first, others)
        self.scratch = self.library.pafu_scratch(ctypes.byref(_Plan(*self.sizes)), ctypes.c_int64(SEGMENT))

    def laid_out(self, t: Tensor) -> Tensor:
        """In the memory format of x, without gaps."""
        return t.contiguous(memory_format=torch.channels_last if self.last else torch.contiguous_format)

    def chunks(self, parts: int) -> Iterator[_Work]:
        """The chunks, each with its frame and sorted pixels; a chunk's images are split into `parts`, if it has as many."""
        stride_h, stride_w = self.problem.window.stride
        pixel = 4 * (self.x.shape[1] * stride_h * stride_w + self.problem.outputs)
        for chunk in self.problem.chunks(pixel, CHUNK_BYTES):
            with ExitStack() as stack:
                yield _Work(self, chunk, parts, stack)


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
    for work in _Call(problem).chunks(1):
        work.tensors.out, work.tensors.y = work.output(out)
        blocks = work.call.library.pafu_blocks(ctypes.byref(work.plan))
        segments = work.segments(work.sorted[0].tolist())
        work.run("pafu_forward", [(*segment, block) for segment in segments for block in range(blocks)])
        if not work.call.last:
            work.run("pafu_output", work.images())


def backward(problem: FrameProblem, grad: Tensor, grads: Grads) -> None:
    """Add to the requested gradients (that of x in its memory format); grad is the gradient of the output, (N, O, P, Q)."""
    kernel, further = (k.movedim(-3, -1).contiguous().movedim(-1, -3) for k in (problem.kernel, problem.further))
    for block, part in _in_float32(replace(problem, kernel=kernel, further=further)):
        own = [None if sums is None else sums[block] for sums in (grads.x, grads.scores)]
        _backward(part, grad[block].float(), Grads(own[0], grads.kernels, own[1]))


def _backward(problem: FrameProblem, grad: Tensor, grads: Grads) -> None:
    """For kernels that have their channels last in memory."""
    call = _Call(problem)
    grad = call.laid_out(grad)
    blocks = call.library.pafu_input_blocks(ctypes.byref(_Plan(*call.sizes)))
    taps = problem.window.size[0] * problem.window.size[1]
    for work in call.chunks(-(-PARTS // blocks)):
        tensors = work.tensors
        tensors.grad, tensors.g = work.output(grad)
        if not call.last:
            work.run("pafu_gradient", work.images())
        if grads.kernels is not None:
            first, *others = map(pointer, grads.kernels)
            tensors.gkernel, tensors.gfurther = first, others[0] if others else None
            work.run("pafu_kernel_gradient", [(i, tap) for i in range(problem.n) for tap in range(taps)])
        if grads.scores is not None:
            tensors.gscores = pointer(grads.scores[work.chunk.images, work.chunk.rows])
            parts = range(0, work.pixels, SEGMENT)
            tasks = [(i, p, min(p + SEGMENT, work.pixels)) for i in range(problem.n) for p in parts]
            work.run("pafu_score_gradient", tasks)
        if grads.x is not None:
            frame = work.frame()
            frame.zero_()
            tensors.gframe, tensors.gx = pointer(frame), pointer(grads.x[work.chunk.images])
            work.run("pafu_input_gradient", [(p, block) for p in range(work.plan.parts) for block in range(blocks)])
            work.run("pafu_input_add", work.images())
