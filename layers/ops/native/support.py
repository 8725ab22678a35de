"""Reasons why the compiled operators cannot run, and the distribution of their work over threads."""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from surgeon.layers.ops.inputs import floating, named
from surgeon.layers.ops.native.compiler import forget_lock, why_no_library

MOST_PARTIAL_BYTES = 32 << 20  # for partial sums of gradients
PARTS = 8  # parts of a batch for these sums, for any number of threads
LEAST_MACS = 1 << 24  # for each thread: about 0.3 ms; starting one takes 0.1 ms
MOVED_MACS = 4  # multiply-accumulates that count as much as a number moved: threads share the memory

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

Work = Callable[[int, Tensor], None]


def reasons_against(tensors: Sequence[Tensor | None]) -> list[str]:
    """Reasons why no compiled operator can take these tensors; asks for the library last, because that may compile it."""
    given = [t for t in tensors if t is not None]
    if not all(t.is_cpu for t in given):
        kinds = sorted({t.device.type for t in given})
        return [f"it runs on the CPU; the tensors are on {' and '.join(kinds)}"]
    if dtypes := {t.dtype for t in given} - DTYPES:
        return floating(*given) or [f"it computes in float32, not in {named(dtypes)}"]
    return list(why_no_library())


class _Scratch:
    """Reused buffers, whose memory pages are already mapped; each goes to one user at a time."""

    KEPT = 8

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.free: list[Tensor] = []

    def take(self, floats: int) -> Tensor:
        """At least this many floats, contents arbitrary."""
        with self.lock:
            if len(self.free) == 1 and self.free[0].numel() >= floats:
                return self.free.pop()
            fit = [i for i, t in enumerate(self.free) if t.numel() >= floats]
            if fit:
                return self.free.pop(min(fit, key=lambda i: self.free[i].numel()))
            if self.free:
                self.free.pop()  # too small: a larger one replaces it
        return torch.empty(floats, dtype=torch.float32)

    def give(self, buffer: Tensor) -> None:
        with self.lock:
            if len(self.free) < self.KEPT:
                self.free.append(buffer)


_scratch = _Scratch()


def _after_fork() -> None:
    """The threads that may hold the locks do not exist in the child."""
    _scratch.lock = threading.Lock()
    forget_lock()


os.register_at_fork(after_in_child=_after_fork)


def threads_for(macs: int) -> int:
    """How many threads are worth starting for this many multiply-accumulates; at most as many as torch uses."""
    return max(1, min(torch.get_num_threads(), macs // LEAST_MACS))


def in_parallel(work: Work, parts: int, floats: int, threads: int) -> None:
    """Call `work(part, scratch)` for every part on this number of threads; scratch has `floats` floats.

    Parts must not write to the same memory. Threads start and end with the call, so a fork cannot lose any.
    The calls release the GIL (ctypes).
    """
    threads = min(threads, parts)
    if threads == 1:
        alone = _scratch.take(floats)
        try:
            for part in range(parts):
                work(part, alone)
        finally:
            _scratch.give(alone)
        return
    left = iter(range(parts))
    lock = threading.Lock()
    failed: list[BaseException] = []

    def worker() -> None:
        buffer = _scratch.take(floats)
        try:
            while True:
                with lock:
                    part = next(left, None)
                if part is None or failed:
                    return
                work(part, buffer)
        except BaseException as problem:
            failed.append(problem)
        finally:
            _scratch.give(buffer)

    others = [threading.Thread(target=worker, name="surgeon-native") for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    worker()
    for thread in others:
        thread.join()
    if failed:
        raise failed[0]


def partial_sums(tasks: int, floats: int) -> int:
    """Number of partial sums of gradients, each of `floats` floats; depends only on the shapes, not on the number of threads."""
    return max(1, min(PARTS, tasks, max(2, MOST_PARTIAL_BYTES // max(4 * floats, 1))))


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    """Address of a tensor's data; null for None."""
    return ctypes.c_void_p(None if t is None else t.data_ptr())


@contextmanager
def borrowed(floats: int) -> Iterator[Tensor]:
    """A reused buffer of at least this many floats, contents arbitrary."""
    buffer = _scratch.take(floats)
    try:
        yield buffer
    finally:
        _scratch.give(buffer)
