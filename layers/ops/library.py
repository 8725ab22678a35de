"""Operators as graph nodes: opaque to `torch.compile` and `torch.export`, with their own shapes and gradients."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from surgeon.errors import BackendError

Function = TypeVar("Function", bound=Callable[..., Any])


def define(name: str, *tags: torch.Tag) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register a function of tensors as the operator `name` ("surgeon::…") for every device; returns the operator.

    Like `torch.library.custom_op`, but that one loads all of torch._dynamo (2 s, 150 MB) at the first eager call. The
    schema comes from the annotations; `tags` are added to `pt2_compliant_tag`. Add shapes with `shapes_of(name)` and
    gradients with `torch.library.register_autograd(name, …)`. A call of which torch has nothing to record goes to the function
    itself: its dispatcher would take longer than a small operator.
    """

    def register(kernel: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(kernel, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        torch.library.impl(name, "default", kernel)
        namespace, operator = name.split("::")
        node = getattr(getattr(torch.ops, namespace), operator)

        @wraps(kernel)
        def call(*args: Any) -> Any:
            return kernel(*args) if nothing_to_record(*args) else node(*args)

        return call

    return register


def _keys(t: Tensor) -> int:
    """The set of bits by which torch's dispatcher decides about a tensor."""
    return int(torch._C._dispatch_keys(t).raw_repr())


with torch.inference_mode():
    _INFERENCE = _keys(torch.empty(0))
_ORDINARY = frozenset((_keys(torch.empty(0)), _INFERENCE))  # on the CPU: no subclass, wrapper or lazily negated view


def nothing_to_record(*args: Any) -> bool:
    """Whether an operator called with these arguments only has to compute: on the CPU, without gradients, and unobserved.

    Observers are graphs being traced or compiled, dispatch and function modes (such as counters of FLOPs), forward gradients and
    the profiler.
    """
    gradients = torch.is_grad_enabled()
    tensors = [a for a in args if isinstance(a, Tensor)]
    if (
        torch.compiler.is_compiling()
        or (gradients and any(t.requires_grad for t in tensors))
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    return all(_keys(t) in _ORDINARY for t in tensors)


def shapes_of(name: str) -> Callable[[Function], Function]:
    """Decorator: register the function that returns empty results of the right shapes (a typed `torch.library.register_fake`)."""

    def register(fake: Function) -> Function:
        torch.library.register_fake(name, fake)
        return fake

    return register


def differentiable_once(name: str) -> None:
    """Make the gradient of the operator `name`, a backward formula, a `BackendError` instead of a wrong number."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise BackendError(
            f"{name} has no gradient: the operators of dynamic layers can be differentiated once (no double backward)"
        )

    torch.library.register_autograd(name, refuse)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels last if x is strictly channels last."""
    plain = x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
    return torch.contiguous_format if plain else torch.channels_last


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the active autocast region of x's device, or None outside one (and on devices without, such as meta)."""
    device_type = "cpu" if x.is_cpu else x.device.type
    if not x.is_cpu and not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
