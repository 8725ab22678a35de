"""Cost of one layer alone, at its shapes in the model: the building block of a cost table."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.costs.emulate import cuda_dispatch, to_channels_last
from surgeon.costs.flops import FlopCounter
from surgeon.costs.memory import timeline
from surgeon.costs.settings import Settings, make_optimizer
from surgeon.costs.trace import Trace, Tracker


@dataclass(frozen=True)
class OperatorCall:
    """A call of a layer: its input's shape, dtype, layout, and whether a gradient flows back through it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    requires_grad: bool


@dataclass(frozen=True)
class Profile:
    """One layer, called once. FLOPs for the whole batch; bytes relative to the start of the layer."""

    flops: int
    backward_flops: int
    params: int
    static: int  # its weights, buffers and optimizer state
    gradients: int  # gradients of its parameters, after the backward pass
    saved: int  # held from its forward to its backward pass, without input and output
    forward_peak: int
    backward_peak: int  # relative to the start of its forward pass, including the output's gradient
    optimizer_peak: int  # temporaries of the optimizer's step for its parameters


def profile(layer: nn.Module, call: OperatorCall, settings: Settings) -> Profile:
    """Trace one layer, which must be on the meta device and is modified."""
    train = settings.mode == "train"
    layer.train(train)
    if settings.channels_last:
        to_channels_last(layer)
    counter = FlopCounter()
    tracker = Tracker(layer, counter)
    tracker.begin("setup")
    tracker.own([*layer.parameters(), *layer.buffers()], "weights")
    memory_format = torch.channels_last if call.channels_last else torch.contiguous_format
    x = torch.empty(call.shape, dtype=call.dtype, device="meta", memory_format=memory_format)
    x.requires_grad_(call.requires_grad and train)
    with tracker, tracker.hooked():
        sizes = _train(layer, x, settings, tracker) if train else _infer(layer, x, settings, tracker)
    return _read(layer, tracker.close(), sizes)


@dataclass(frozen=True)
class _Sizes:
    output: int
    held: int  # index of the event at which the forward pass ends


def _train(layer: nn.Module, x: Tensor, settings: Settings, tracker: Tracker) -> _Sizes:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = make_optimizer(settings, parameters)
    if optimizer is not None:
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    tracker.own([x], "inputs")
    tracker.begin("forward")
    with cuda_dispatch(settings.amp):
        y = layer(_Source.apply(x) if x.requires_grad else x)
        held = len(tracker.trace.events)
    sizes = _Sizes(_bytes(y, tracker), held)
    tracker.begin("loss")
    if y.requires_grad:
        end = _Sink.apply(y)
        del y
        tracker.begin("backward")
        end.backward()
    tracker.note_gradients(parameters)
    tracker.begin("optimizer")
    if optimizer is not None:
        optimizer.step()
    return sizes


def _infer(layer: nn.Module, x: Tensor, settings: Settings, tracker: Tracker) -> _Sizes:
    tracker.own([x], "inputs")
    tracker.begin("forward")
    with torch.no_grad(), cuda_dispatch(settings.amp):
        y = layer(x)
        held = len(tracker.trace.events)
    sizes = _Sizes(_bytes(y, tracker), held)
    tracker.begin("end")
    return sizes


class _Source(torch.autograd.Function):
    """Sink of the input's gradient: dropped, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None


class _Sink(torch.autograd.Function):
    """Stand-in for the layers after this one: saves nothing, and returns a gradient of the output's size."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.like = (y.shape, y.stride(), y.dtype)
        return y.new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        shape, stride, dtype = ctx.like
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _bytes(y: Tensor, tracker: Tracker) -> int:
    index = tracker._live[y.untyped_storage()._cdata]
    return tracker.trace.storages[index].nbytes


def _read(layer: nn.Module, trace: Trace, sizes: _Sizes) -> Profile:
    times = timeline(trace)
    first = dict(reversed(trace.phases))  # phase -> its first event
    levels = times.levels
    start = int(levels[0])

    def highest(phase: str, until: int) -> int:
        low, high = first[phase] - times.first, max(until - times.first, first[phase] - times.first + 1)
        return int(levels[low:high].max(initial=0)) - start

    gradients = sum(trace.storages[i].nbytes for i in trace.gradients)
    flops = [0, 0]
    for op in trace.ops:
        flops[op.phase == "backward"] += op.flops
    end = len(trace.events)
    train = "optimizer" in first
    inputs = sum(s.nbytes for s in trace.storages if s.kind == "inputs")
    return Profile(
        flops=flops[0],
        backward_flops=flops[1],
        params=sum(p.numel() for p in layer.parameters()),
        static=start - inputs,
        gradients=gradients,
        saved=int(levels[sizes.held - 1 - times.first]) - start - sizes.output,
        forward_peak=highest("forward", sizes.held),
        backward_peak=highest("backward", first["optimizer"]) if "backward" in first else 0,
        optimizer_peak=highest("optimizer", end) - gradients if train and first["optimizer"] < end else 0,
    )
