"""One observed forward pass: shapes and calls of every convolution, and other readers of its weight.

The pass runs on the meta device, on a copy. If a model cannot run there, a copy runs for real, in eval mode.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgeon.errors import InputError, ModelError, called, offered
from surgeon.sites.inputs import Inputs, candidate_inputs, first_channels, given_inputs
from surgeon.sites.reads import HARMLESS
from surgeon.util.copying import copy_model, copy_to_meta, evaluating, is_lazy, quiet_eager, seeded, strict_float32


@dataclass(frozen=True, kw_only=True)
class Call:
    """Shapes of one call of a convolution."""

    input: tuple[int, ...]
    output: tuple[int, ...]


@dataclass(kw_only=True)
class Observation:
    """Observations of one forward pass, by the first name of every module."""

    inputs: Inputs
    device: str
    calls: dict[str, list[Call]] = field(default_factory=dict)
    started: dict[str, int] = field(default_factory=dict)  # time of a convolution's first call
    ended: dict[str, list[int]] = field(default_factory=dict)  # end times of any module's calls
    arguments: dict[str, list[str]] = field(default_factory=dict)  # a convolution's arguments other than its input
    readers: dict[str, list[str]] = field(default_factory=dict)  # outside readers of a convolution's parameters
    # weights passed to `conv2d` outside convolutions, and in which module
    functional: dict[str, str] = field(default_factory=dict)
    # kernels passed to `conv2d` that are not the model's, by id, and how they are told
    unregistered: dict[int, str] = field(default_factory=dict)


def observe(
    model: nn.Module,
    targets: Sequence[str],
    example_inputs: Any = None,
    input_size: Sequence[int] | int | None = None,
    *,
    argument: str = "example_inputs",
) -> Observation:
    """Run a copy of the model once and observe the modules in `targets`.

    `argument` is the caller's name of the inputs. Raises `InputError` if it runs on none of them, listing those tried.
    """
    if example_inputs is not None:
        candidates: Iterable[Inputs] = [given_inputs(example_inputs)]
    else:
        candidates = candidate_inputs(model, input_size)
    failures = []
    for inputs in candidates:
        for device in ("meta", "real"):
            seen = Observation(inputs=inputs, device=device)
            try:
                _run_watched(model, targets, seen)
            except ModelError:
                raise
            except Exception as error:
                failures.append((inputs.shapes(), error))
            else:
                return seen
    raise _cannot_run(model, failures, _hint(model, inputs, argument, several=_needs_more(failures)))


def _cannot_run(model: nn.Module, failures: list[tuple[str, Exception]], hint: str) -> InputError:
    told = {shapes: f"{type(error).__name__}: {_first_line(error)}" for shapes, error in failures}
    tried = "; ".join(f"{shapes} gave {message}" for shapes, message in told.items())
    return InputError(f"{type(model).__name__} does not run on these inputs: {tried}{hint}")


def _needs_more(failures: list[tuple[str, Exception]]) -> bool:
    """Whether a network of several inputs got one."""
    return any(isinstance(error, TypeError) and "missing" in str(error) for _, error in failures)


def _hint(model: nn.Module, inputs: Inputs, argument: str, *, several: bool = False) -> str:
    """Advice on other inputs, in Python or at a terminal, where only the size can be given."""
    channels, size = first_channels(model), inputs.image_size
    one = "; ({...},) passes a dict as one argument" if inputs.kwargs else ""
    python = f"Pass {argument}=... (a tensor, a tuple of arguments, a list, or a dict of keyword arguments{one})"
    python += " or input_size=(C, H, W) that it takes." if argument == "example_inputs" else " that it takes."
    terminal = "Give another --input-size, as CxHxW."
    if size is not None and channels not in (None, size[0]):
        terminal = f"Its first convolution takes {channels} channels: --input-size {channels}x{size[1]}x{size[2]}."
    if several:
        return f". Networks with several inputs are for Python: {argument}=(first, second, ...)"
    return called(f". {terminal}" if offered("--input-size") else "", f". {python}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else ""


def _run_watched(model: nn.Module, targets: Sequence[str], seen: Observation) -> None:
    if seen.device == "meta":
        if is_lazy(model):
            raise InputError("uninitialized parameters have no shape on the meta device")
        twin = copy_to_meta(model)
        inputs = seen.inputs.fresh().map(lambda t: t.to("meta"))
    else:
        twin, inputs = copy_model(model), seen.inputs.fresh()
    stack: list[str] = []
    owners: dict[int, list[str]] = {}
    for name in targets:
        for parameter in twin.get_submodule(name).parameters():
            owners.setdefault(id(parameter), []).append(name)
    weights = {id(p): name for name, p in twin.named_parameters() if id(p) not in owners}
    _install(twin, set(targets), stack, seen)
    with quiet_eager(), evaluating(twin), seeded(0), strict_float32(), _WatchReads(owners, weights, stack, seen):
        twin(*inputs.args, **inputs.kwargs)


def _install(twin: nn.Module, targets: set[str], stack: list[str], seen: Observation) -> None:
    """Hooks on every module that track the stack of running modules and record the calls of the targets."""
    now = 0

    def tick() -> int:  # a plain int: compilers would trace an iterator without end
        nonlocal now
        now += 1
        return now - 1

    def hook(name: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            stack.append(name)
            if name in targets:
                seen.started.setdefault(name, tick())

        def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            stack.pop()
            seen.ended.setdefault(name, []).append(tick())
            given = args[0] if args else kwargs.get("input", kwargs.get("x"))
            more = [f"argument {i + 1}" for i in range(1, len(args))] + [f"{key}=" for key in kwargs if key != "input"]
            if name in targets and more:
                seen.arguments.setdefault(name, more)
            if name in targets and isinstance(given, Tensor) and isinstance(output, Tensor):
                call = Call(input=tuple(given.shape), output=tuple(output.shape))
                seen.calls.setdefault(name, []).append(call)

        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave, with_kwargs=True)

    for name, module in twin.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            hook(name, module)


class _WatchReads(TorchFunctionMode):
    """Records functions that take a convolution's parameter while it is not running, and other uses of `conv2d`."""

    def __init__(
        self, owners: dict[int, list[str]], weights: dict[int, str], stack: list[str], seen: Observation
    ) -> None:
        super().__init__()
        self.owners, self.weights, self.stack, self.seen = owners, weights, stack, seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if isinstance(weight, nn.Parameter) and id(weight) not in self.weights and id(weight) not in self.owners:
                out, into, *window = weight.shape
                self.seen.unregistered[id(weight)] = f"{into}>{out} {'x'.join(map(str, window))}"
            if id(weight) in self.weights:
                self.seen.functional[self.weights[id(weight)]] = self.stack[-1] if self.stack else ""
        if not _is_harmless(func):
            for value in [*args, *kwargs.values()]:
                for item in value if isinstance(value, list | tuple) else (value,):
                    self._note(func, item)
        return func(*args, **kwargs)

    def _note(self, func: Callable[..., Any], item: Any) -> None:
        owners = self.owners.get(id(item), []) if isinstance(item, Tensor) else []
        if not owners or any(owner in self.stack for owner in owners):
            return
        reader = self.stack[-1] if self.stack and self.stack[-1] else "the model itself"
        told = f"{reader} ({getattr(func, '__name__', 'a function')})"
        for owner in owners:
            readers = self.seen.readers.setdefault(owner, [])
            if told not in readers:
                readers.append(told)


def _is_harmless(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name in HARMLESS
