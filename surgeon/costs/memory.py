"""Memory use of a trace: its content over time, the peak, the composition of the peak, and the memory reserved by an allocator."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.costs.allocator import CachingAllocator
from surgeon.costs.trace import NEVER, Storage, Trace

KINDS = ("weights", "gradients", "optimizer", "inputs", "saved activations", "transient")

# A CUDA process's memory beyond its tensors, bytes. Assumptions from documentation, not calibrated on a device:
CONTEXT = 512 * 2**20  # context, loaded kernels (cuDNN, cuBLAS)
BLAS_WORKSPACE = 32 * 2**20  # cuBLAS and cuBLASLt, Hopper's default

MARGIN = 1.05  # of the predicted peak, in what memory budgets are compared with; a search that runs out of memory raises its own


@dataclass(frozen=True)
class Timeline:
    """Memory over the events of one step. `levels[i]` is bytes after event i; `parts` splits it by kind."""

    levels: NDArray[np.int64]
    parts: dict[str, NDArray[np.int64]]
    phases: list[tuple[str, int]]  # (phase, first event), counted from the first event of the timeline
    first: int  # first event of the trace in it

    @property
    def peak_at(self) -> int:
        """Index of the event with the highest level after it."""
        return int(self.levels.argmax())

    @property
    def peak(self) -> int:
        """Bytes of tensors at the peak."""
        return int(self.levels.max())

    def breakdown(self) -> dict[str, int]:
        """Composition of the peak, bytes by kind."""
        return {kind: int(values[self.peak_at]) for kind, values in self.parts.items()}


def kind_of(storage: Storage, index: int, trace: Trace, ends: dict[str, list[int]]) -> str:
    """The kind of an allocation, one of `KINDS`; `ends` contains the events at which each phase ended."""
    if storage.kind is not None:
        return storage.kind
    if index in trace.gradients:
        return "gradients"
    if storage.phase in ("setup", "optimizer") and storage.died == NEVER:
        return "optimizer"
    if storage.phase in ("forward", "loss"):
        after = [end for end in ends.get("loss", []) if end >= storage.born]
        if after and storage.died > after[0]:
            return "saved activations"
    return "transient"


def phase_ends(trace: Trace) -> dict[str, list[int]]:
    """Events at which each phase ended, in order."""
    ends: dict[str, list[int]] = {}
    borders = [*trace.phases[1:], ("", len(trace.events))]
    for (phase, _), (_, end) in zip(trace.phases, borders, strict=True):
        ends.setdefault(phase, []).append(end)
    return ends


def timeline(trace: Trace) -> Timeline:
    """Memory over the steady step of a trace; the set-up only determines its initial level."""
    n = len(trace.events)
    deltas = {kind: np.zeros(n + 1, dtype=np.int64) for kind in KINDS}
    ends = phase_ends(trace)
    for index, storage in enumerate(trace.storages):
        kind = kind_of(storage, index, trace, ends)
        deltas[kind][storage.born] += storage.nbytes
        if storage.died != NEVER:
            deltas[kind][storage.died] -= storage.nbytes
    first = next((event for phase, event in trace.phases if phase != "setup"), 0)
    start = max(first - 1, 0)
    parts = {kind: values.cumsum()[start:n] for kind, values in deltas.items()}
    levels: NDArray[np.int64] = np.sum(list(parts.values()), axis=0)
    phases = [(phase, event - start) for phase, event in trace.phases if phase != "setup"]
    return Timeline(levels, parts, phases, start)


def replay(trace: Trace) -> CachingAllocator:
    """Replay the trace through a model of the caching allocator."""
    allocator = CachingAllocator()
    for event in trace.events:
        if event > 0:
            allocator.allocate(event, trace.storages[event - 1].nbytes)
        else:
            allocator.release(-event)
    return allocator


def workspace_bytes(trace: Trace, times: Timeline) -> int:
    """Increase of the peak caused by the convolutions' workspaces."""
    highest = max(
        (int(times.levels[op.end - 1 - times.first]) + op.workspace for op in trace.ops if op.workspace), default=0
    )
    return max(highest - times.peak, 0)
