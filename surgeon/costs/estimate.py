"""`cost`: FLOPs, parameters and peak GPU memory of a model, without a GPU and without running a kernel."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.costs.emulate import cuda_dispatch, meta_copy, to_channels_last
from surgeon.costs.flops import FlopCounter, UnknownOperatorError
from surgeon.costs.memory import (
    BLAS_WORKSPACE,
    CONTEXT,
    MARGIN,
    Timeline,
    kind_of,
    phase_ends,
    replay,
    timeline,
    workspace_bytes,
)
from surgeon.costs.settings import (
    LossFunction,
    Mode,
    OptimizerFactory,
    Settings,
    default_loss,
    image_dtype,
    make_optimizer,
    make_settings,
    optimizer_name,
)
from surgeon.costs.text import cost_lines, told
from surgeon.costs.trace import Trace, Tracker
from surgeon.errors import InputError, SurgeonError, called, offered
from surgeon.layers.base import DynamicConv2d
from surgeon.sites.inputs import Inputs, call_arguments
from surgeon.util.copying import check_module, checkpoint_gradients
from surgeon.util.held import walk
from surgeon.util.pages import rows, snippet


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer's share: operations in it, excluding layers inside it. FLOPs per image, 1 MAC = 2."""

    name: str
    type: str
    flops: int
    backward_flops: int
    params: int  # its own parameters; for a dynamic layer, including submodules
    saved_bytes: int  # activations saved for the backward pass, for the whole batch


@dataclass(frozen=True, kw_only=True, repr=False)
class Cost:
    """Cost of a model. FLOPs per image (1 MAC = 2 FLOPs), bytes for the whole batch.

    `peak_bytes` is the highest sum of tensors alive in one step of the steady state (optimizer state exists), each rounded as
    CUDA's allocator rounds. `breakdown` splits it by kind. `reserve` is what the device needs on top of it
    (fragmentation, workspaces, CUDA context, itemized). `total_bytes` is the sum of both. `reserved_bytes` is what the allocator
    would hold after the step if the device had room for it (`torch.cuda.memory_reserved`; part of it is released when short).
    `needed_bytes` is what memory budgets are compared with: the peak times `MARGIN`, and the reserve.
    """

    flops: int
    macs: int
    backward_flops: int
    params: int
    peak_bytes: int
    reserved_bytes: int
    breakdown: dict[str, int]
    reserve: dict[str, int]
    layers: tuple[LayerCost, ...]
    input_size: tuple[int, ...]
    batch_size: int
    mode: str
    optimizer: str | None
    amp: str | None
    channels_last: bool
    unknown_ops: dict[str, int] = field(default_factory=dict)  # operators without a FLOP formula, and their calls
    estimated: bool = False  # extrapolated instead of traced at this batch size; `notes` explain why
    notes: tuple[str, ...] = ()
    timeline: Timeline | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        """The lines that `surgeon cost` prints."""
        return "\n".join(cost_lines("cost", self))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same as HTML for notebooks."""
        head, header, lines, notes = told("cost", self)
        inner = [[name.replace("  ", "\N{EM SPACE}"), *values] for name, *values in lines]
        return snippet(head, rows(header, inner), "\n".join(notes))

    @property
    def total_bytes(self) -> int:
        """Device memory that the step needs, bytes: tensors at their peak and the reserve."""
        return self.peak_bytes + self.breakdown["reserve"]

    @property
    def needed_bytes(self) -> int:
        """Device memory that a memory budget must allow, bytes: the peak with the margin, and the reserve."""
        return round(self.peak_bytes * MARGIN + self.breakdown["reserve"])

    @property
    def step(self) -> str:
        """The step in words: `training step, adamw, float32, batch 32`."""
        kind = "inference" if self.mode == "infer" else f"training step, {self.optimizer}"
        return f"{kind}, {self.amp or 'float32'}, batch {self.batch_size}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the timeline."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("timeline", "layers")}
        values["input_size"], values["notes"] = list(self.input_size), list(self.notes)
        values["total_bytes"], values["needed_bytes"] = self.total_bytes, self.needed_bytes
        values["layers"] = [{name: getattr(x, name) for name in x.__dataclass_fields__} for x in self.layers]
        return values


def cost(
    model: nn.Module,
    *,
    input_size: Any = None,
    batch_size: int = 1,
    example_inputs: Any = None,
    mode: Mode = "train",
    optimizer: str | OptimizerFactory = "sgd",
    amp: bool | str = False,
    channels_last: bool = False,
    weight_decay: float = 1e-4,
    accumulate: int = 1,
    checkpointing: bool = False,
    loss: LossFunction | None = None,
    strict: bool = False,
) -> Cost:
    """Cost of one training step, or one inference, of the model on a GPU. Nothing is allocated, no kernel runs.

    Args:
        model: not modified; its own device and data do not matter.
        input_size: of one image, `224`, `(H, W)` or `(C, H, W)`; by default the model's own, otherwise 224.
        batch_size: images per step (per micro-step if gradients are accumulated).
        example_inputs: for models that take more than images: one whole batch, as in `convert`, instead of the two above.
        mode: "train" (forward, backward, optimizer) or "infer" (forward in eval mode, no gradients).
        optimizer: "sgd" (momentum 0.9), "sgd-plain", "adam", "adamw", as torch runs them on CUDA (foreach); or a function that
            creates one from the parameters.
        amp: autocast: True or "float16", "bfloat16".
        weight_decay: coupled weight decay (SGD, Adam) needs a temporary copy of all gradients.
        accumulate: micro-steps per optimizer step.
        checkpointing: gradient checkpointing, for models with timm's `set_grad_checkpointing`.
        loss: function from the model's output to a scalar; by default cross-entropy for (N, K) outputs, otherwise a squared error
            against a target of the same shape.
        strict: raise an `UnknownOperatorError` for an operator without a FLOP formula.

    Raises:
        ConfigError: an argument has an invalid value.
        InputError: the model does not take images of this size.
    """
    check_module(model)
    settings = make_settings(
        model,
        input_size=input_size,
        batch_size=batch_size,
        example_inputs=example_inputs,
        mode=mode,
        optimizer=optimizer,
        amp=amp,
        channels_last=channels_last,
        weight_decay=weight_decay,
        accumulate=accumulate,
        checkpointing=checkpointing,
        loss=loss,
    )
    counter = FlopCounter(strict)
    try:
        copy = meta_copy(model)
        trace = run_step(copy, settings, counter, "meta")
    except SurgeonError:
        raise
    except Exception as error:
        return _extrapolated(model, settings, strict, error)
    return summarize(copy, settings, trace, counter)


# --- one step -----------------------------------------------------------------------------------------------------


def run_step(model: nn.Module, settings: Settings, counter: FlopCounter, device: str) -> Trace:
    """Run and record one step of the steady state of `model`, which is on `device` and is modified."""
    train = settings.mode == "train"
    model.train(train)
    if settings.checkpointing:
        checkpoint_gradients(model)
    if settings.channels_last:
        to_channels_last(model)
    tracker = Tracker(model, counter, device)
    autocast = _autocast(settings, device)
    tracker.recompute = autocast
    tracker.begin("setup")
    tracker.own([*model.parameters(), *model.buffers()], "weights")
    call = _call(model, settings, device)
    tracker.own([t for t in walk(call.args, call.kwargs) if isinstance(t, Tensor)], "inputs")
    with warnings.catch_warnings(), tracker.hooked():
        warnings.simplefilter("ignore")
        if train:
            _train_step(model, call, settings, tracker, autocast)
        else:
            with tracker, torch.no_grad():
                tracker.begin("forward")
                with autocast():
                    out = model(*call.args, **call.kwargs)
                del out
                tracker.close()
    return tracker.trace


def _call(model: nn.Module, settings: Settings, device: str) -> Inputs:
    """The arguments of one call: the given ones, or a batch of random images."""
    if settings.inputs is None:
        x = torch.empty((settings.batch_size, *settings.input_size), device=device, dtype=image_dtype(model))
        if device != "meta":
            x.normal_()
        if settings.channels_last:
            x = x.to(memory_format=torch.channels_last)
        return Inputs(args=call_arguments(model, x, train=settings.mode == "train"), given=False)

    def place(t: Tensor) -> Tensor:
        t = t.detach().to(device)
        return t.to(memory_format=torch.channels_last) if settings.channels_last and t.dim() == 4 else t

    return settings.inputs.map(place)


def _autocast(settings: Settings, device: str) -> Callable[[], AbstractContextManager[None]]:
    if device == "meta":
        return lambda: cuda_dispatch(settings.amp)
    if settings.amp is None:
        return nullcontext
    return lambda: torch.autocast(device, torch.bfloat16)


def _train_step(
    model: nn.Module,
    call: Inputs,
    settings: Settings,
    tracker: Tracker,
    autocast: Callable[[], AbstractContextManager[None]],
) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    with tracker:
        optimizer = make_optimizer(settings, parameters)
        if optimizer is not None:  # one step beforehand creates the optimizer's state
            for p in parameters:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
        for _ in range(min(settings.accumulate, 2)):  # later micro-steps repeat the second one
            tracker.begin("forward")
            with autocast():
                out = model(*call.args, **call.kwargs)
                tracker.begin("loss")
                loss = (settings.loss or default_loss)(out)
            del out
            tracker.begin("backward")
            loss.backward()
            del loss
            tracker.note_gradients(parameters)
        tracker.begin("optimizer")
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        tracker.close()


# --- the result ---------------------------------------------------------------------------------------------------


def summarize(model: nn.Module, settings: Settings, trace: Trace, counter: FlopCounter) -> Cost:
    """Summarize a trace."""
    times = timeline(trace)
    steps = min(settings.accumulate, 2) if settings.mode == "train" else 1
    images = settings.batch_size * steps
    flops = [[0, 0] for _ in trace.layers]
    for op in trace.ops:
        flops[op.layer][op.phase == "backward"] += op.flops
    saved = [0] * len(trace.layers)
    ends = phase_ends(trace)
    for index, storage in enumerate(trace.storages):
        if kind_of(storage, index, trace, ends) == "saved activations":
            saved[storage.layer] += storage.nbytes
    modules = dict(model.named_modules())
    layers = tuple(
        LayerCost(
            name=name,
            type=type(modules[name]).__name__,
            flops=round(forward / images),
            backward_flops=round(backward / images),
            params=_own_params(modules[name]),
            saved_bytes=saved[i] // steps,
        )
        for i, (name, (forward, backward)) in enumerate(zip(trace.layers, flops, strict=True))
    )
    allocator = replay(trace)
    reserve = {
        "fragmentation": max(allocator.peak_pinned - times.peak, 0),
        "workspaces": workspace_bytes(trace, times) + BLAS_WORKSPACE,
        "context": CONTEXT,
    }
    total = sum(forward for forward, _ in flops)
    notes = (f"operators without a FLOP formula: {', '.join(sorted(counter.unknown))}",) if counter.unknown else ()
    return Cost(
        flops=round(total / images),
        macs=round(total / images / 2),
        backward_flops=round(sum(backward for _, backward in flops) / images),
        params=sum(p.numel() for p in model.parameters()),
        peak_bytes=times.peak,
        reserved_bytes=allocator.reserved,
        breakdown=times.breakdown() | {"reserve": sum(reserve.values())},
        reserve=reserve,
        layers=layers,
        input_size=settings.input_size,
        batch_size=settings.batch_size,
        mode=settings.mode,
        optimizer=optimizer_name(settings),
        amp=None if settings.amp is None else str(settings.amp).removeprefix("torch."),
        channels_last=settings.channels_last,
        unknown_ops=dict(counter.unknown),
        notes=notes,
        timeline=times,
    )


def _own_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=isinstance(module, DynamicConv2d)))


# --- models that cannot be traced without data --------------------------------------------------------------------


def _extrapolated(model: nn.Module, settings: Settings, strict: bool, why: Exception) -> Cost:
    """Run two small batches on the CPU instead, and extrapolate to the batch size."""
    if settings.inputs is not None:
        return _once_on_cpu(model, settings, strict, why)
    small, large = (2, 4) if settings.mode == "train" else (1, 2)
    try:
        two = [_on_cpu(model, replace(settings, batch_size=n), strict) for n in (small, large)]
    except UnknownOperatorError:
        raise
    except Exception as error:
        raise cannot_run(model, settings, error) from error
    first, second = two
    steps = (settings.batch_size - small) / (large - small)

    def at(a: int, b: int) -> int:
        return max(round(a + (b - a) * steps), 0)

    layers = tuple(
        replace(b, saved_bytes=at(a.saved_bytes, b.saved_bytes))
        for a, b in zip(first.layers, second.layers, strict=True)
    )
    reserve = {key: at(first.reserve[key], second.reserve[key]) for key in first.reserve}
    parts = {key: at(first.breakdown[key], second.breakdown[key]) for key in first.breakdown if key != "reserve"}
    note = (
        f"estimated: the model cannot be traced without data ({_first_line(why)}); batches of {small} and {large} were run on "
        "the CPU and extrapolated"
    )
    return replace(
        second,
        peak_bytes=sum(parts.values()),
        reserved_bytes=at(first.reserved_bytes, second.reserved_bytes),
        breakdown=parts | {"reserve": sum(reserve.values())},
        reserve=reserve,
        layers=layers,
        batch_size=settings.batch_size,
        estimated=True,
        notes=(note, *second.notes),
        amp=None if settings.amp is None else str(settings.amp).removeprefix("torch."),
    )


def cannot_run(model: nn.Module, settings: Settings, error: Exception) -> InputError:
    """The error for a step that cannot run, with a hint."""
    size = "x".join(map(str, settings.input_size))
    hint = called(
        "give a supported --input-size", "give a supported size as input_size, or all arguments as example_inputs"
    )
    if not offered("--input-size"):
        hint = ""
    if "more than 1 value per channel" in str(error):
        larger = called("--batch-size 2", "batch_size=2")
        hint = f"its BatchNorm sees one value per channel: use a larger batch ({larger}) or larger images"
    return InputError(f"{type(model).__name__} fails on images of {size}: {_first_line(error)}{hint and f'; {hint}'}")


def _once_on_cpu(model: nn.Module, settings: Settings, strict: bool, why: Exception) -> Cost:
    """With given inputs the batch size is fixed: run the batch as a whole."""
    try:
        found = _on_cpu(model, settings, strict)
    except UnknownOperatorError:
        raise
    except Exception as error:
        told = settings.inputs.shapes() if settings.inputs is not None else ""
        raise InputError(f"{type(model).__name__} does not run on {told}: {_first_line(error)}") from error
    note = f"the model cannot be traced without data ({_first_line(why)}); it was run on the CPU"
    return replace(found, notes=(note, *found.notes))


def _on_cpu(model: nn.Module, settings: Settings, strict: bool) -> Cost:
    counter = FlopCounter(strict)
    copy = deepcopy(model).to("cpu")
    return summarize(copy, settings, run_step(copy, settings, counter, "cpu"), counter)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {shorten(lines[0], 120)}" if lines else type(error).__name__
