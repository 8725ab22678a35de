"""Traces a model without data: every operator, the lifetime of every storage, and the layer each belongs to."""

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from surgeon.costs import remember
from surgeon.costs.allocator import round_block
from surgeon.costs.flops import FlopCounter
from surgeon.layers.base import DynamicConv2d

NEVER = 2**62


@dataclass
class Storage:
    """One allocation. `born` and `died` are indices into the trace's events."""

    nbytes: int  # rounded to the allocator's blocks
    kind: str | None  # set for what exists before the step: weights, inputs, optimizer
    layer: int
    phase: str
    born: int
    died: int = NEVER


@dataclass(frozen=True)
class Op:
    """One operator call: its events [first, end) are its allocations and the preceding frees."""

    name: str
    phase: str
    layer: int
    flops: int
    end: int
    workspace: int


@dataclass
class Trace:
    """The record of a tracker. `events` has storage indices, +i + 1 at allocation and -i - 1 at release; `marks` events by name."""

    layers: list[str]  # names; index 0 is the model itself
    storages: list[Storage] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    phases: list[tuple[str, int]] = field(default_factory=list)  # (phase, first event)
    visits: list[tuple[int, int, int, str]] = field(default_factory=list)  # (layer, first event, end, phase)
    gradients: set[int] = field(default_factory=set)  # storages that became the gradient of a parameter


class Tracker(TorchDispatchMode):
    """Records a `Trace` of everything that runs under it on one device type; counts FLOPs with `counter`."""

    def __init__(self, model: nn.Module, counter: FlopCounter, device: str = "meta") -> None:
        TorchDispatchMode.__init__(self)
        self.counter = counter
        self.device = device
        self.phase = "setup"
        self.names, self.modules = _tracked(model)
        self.trace = Trace(layers=self.names)
        self.recompute: Callable[[], AbstractContextManager[None]] = nullcontext
        self._live: dict[int, int] = {}  # address of a storage -> index
        self._references: dict[int, weakref.ref[Any]] = {}
        self._stack: list[tuple[int, int]] = []  # (layer, first event)
        self._again: list[AbstractContextManager[None]] = []
        self._borders: list[int] = []  # autograd sequence numbers at which the layer changes,
        self._owners: list[int] = []  # and the layer from then on
        self._last_layer = 0

    # --- phases and layers ----------------------------------------------------------------------------------------

    def begin(self, phase: str) -> None:
        """Start a phase, to which everything that follows belongs."""
        self.phase = phase
        self._last_layer = 0
        self.trace.phases.append((phase, len(self.trace.events)))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Context that tracks the model's layers (also out of a forward pass that checkpointing stops early)."""
        handles = []
        for index, module in enumerate(self.modules):
            handles.append(module.register_forward_pre_hook(self._enter(index)))
            handles.append(module.register_forward_hook(self._leave(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self.phase == "backward" and not self._stack:  # checkpointing recomputes a part of the forward pass
                self._again.append(self.recompute())
                self._again[-1].__enter__()
            self._stack.append((index, len(self.trace.events)))
            self._border(index)

        return hook

    def _leave(self) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            index, first = self._stack.pop()
            self.trace.visits.append((index, first, len(self.trace.events), self.phase))
            self._border(self._stack[-1][0] if self._stack else 0)
            if self.phase == "backward" and not self._stack and self._again:
                self._again.pop().__exit__(None, None, None)

        return hook

    def _border(self, layer: int) -> None:
        self._borders.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(layer)

    def _layer(self) -> int:
        if self._stack:
            return self._stack[-1][0]
        if self.phase != "backward":
            return 0
        node = torch._C._current_autograd_node()
        number = None if node is None else node._sequence_nr()
        # AccumulateGrad belongs to the layer that ran just before
        if number is None or number > 2**60 or not self._borders:
            return self._last_layer
        self._last_layer = self._owners[max(bisect_right(self._borders, number) - 1, 0)]
        return self._last_layer

    # --- storages -------------------------------------------------------------------------------------------------

    def own(self, tensors: Any, kind: str) -> None:
        """Count tensors that already exist."""
        for tensor in tensors:
            self._watch(tensor, 0, kind)
            index = self._live.get(tensor.untyped_storage()._cdata)
            if index is not None:
                self.trace.storages[index].kind = kind

    def note_gradients(self, parameters: Any) -> None:
        """Register the parameters' current gradients."""
        for parameter in parameters:
            if parameter.grad is not None:
                index = self._live.get(parameter.grad.untyped_storage()._cdata)
                if index is not None:
                    self.trace.gradients.add(index)

    def _watch(self, tensor: Tensor, layer: int, kind: str | None = None) -> None:
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live:
            return
        index = len(self.trace.storages)
        self._live[address] = index
        self.counter.forget(address)
        self.trace.storages.append(
            Storage(round_block(storage.nbytes()), kind, layer, self.phase, born=len(self.trace.events))
        )
        self.trace.events.append(index + 1)
        self._references[index] = weakref.ref(storage, self._freed(address, index))

    def _freed(self, address: int, index: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            if self._references.pop(index, None) is None:
                return
            del self._live[address]
            self.trace.storages[index].died = len(self.trace.events)
            self.trace.events.append(-index - 1)

        return freed

    # --- operators ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = remember.run(func, args, kwargs) if self.device == "meta" else func(*args, **kwargs)
        layer = self._layer()
        counts = self.phase in ("forward", "backward")
        flops = self.counter.count(func, out, args, kwargs) if counts else 0
        outputs = [out] if isinstance(out, Tensor) else _tensors(out)
        for tensor in outputs:
            self._watch(tensor, layer)
        self.counter.note_product(func, out)
        workspace = _workspace(func, args, out) if counts else 0
        self.trace.ops.append(Op(func._schema.name, self.phase, layer, flops, len(self.trace.events), workspace))
        return out

    def close(self) -> Trace:
        """Stop tracking; storages still alive stay alive in the trace."""
        self._references.clear()
        return self.trace


def _tracked(model: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """Names and modules to track; everything inside a dynamic layer counts as that layer."""
    names, modules, inside = [], [], ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        inside = name + "." if isinstance(module, DynamicConv2d) else inside
        names.append(name)
        modules.append(module)
    return names, modules


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, list | tuple):
        return [tensor for item in out for tensor in ([item] if isinstance(item, Tensor) else _tensors(item))]
    return []


def _workspace(func: OpOverload, args: tuple[Any, ...], out: Any) -> int:
    """Bytes of workspace that cuDNN may need for a convolution: a copy of each tensor that is not in its preferred layout.

    An assumption, not a measurement; the result is part of the reserve, not of the peak.
    """
    name = func._schema.name
    if name not in ("aten::convolution", "aten::convolution_backward"):
        return 0
    tensors = [a for a in (args[:3] if name.endswith("backward") else args[:2]) if isinstance(a, Tensor)]
    tensors += [t for t in _tensors([out])[:2] if isinstance(t, Tensor)]
    return sum(
        t.numel() * t.element_size()
        for t in tensors
        if t.dim() == 4 and not t.is_contiguous(memory_format=torch.channels_last)
    )
