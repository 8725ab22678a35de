"""The value of `.weight` on a dynamic layer: a read-only tensor that raises an error on writes.

Code for `nn.Conv2d` merges adapters, folds norms and clips by writing to `.weight`. A dynamic layer recomputes its static weight
on each access: the write would be lost, or, if the weight is built into another convolution, the dynamic part would.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import ReadOnlyError

READ_ONLY = (
    "the weight of a dynamic layer is read-only: it is computed from several parameters, and a write, or a convolution built "
    "from it, would lose them or the dynamic part. Fold a norm with surgeon.layers.fold_batchnorm(layer, norm), merge adapters "
    "and fuse before converting, or make plain convolutions first with surgeon.revert(model); static_weight() is an ordinary tensor"
)

_WRITING_DUNDERS = frozenset(
    f"__{name}__" for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
) | {"__setitem__", "__set__", "__delete__", "__idiv__"}
_HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
# Combined with other tensors, these produce the kernel of another convolution: a norm's scale, a parallel branch.
_COMBINING = frozenset(
    {"add", "sub", "rsub", "mul", "div", "true_divide", "addcmul", "lerp", "where", "cat", "stack"}
) | {
    *(
        "mm",
        "bmm",
        "matmul",
        "einsum",
        "tensordot",
        "__add__",
        "__radd__",
        "__sub__",
        "__rsub__",
        "__mul__",
        "__rmul__",
    ),
    *("__truediv__", "__matmul__", "__rmatmul__"),
}
_VIEWS = frozenset(
    {"detach", "data", "view", "reshape", "flatten", "permute", "transpose", "t", "T", "mT", "contiguous"}
) | {
    *("__getitem__", "squeeze", "unsqueeze", "narrow", "select", "to", "float", "double", "half", "cpu", "cuda", "pad"),
}


class StaticWeight(Tensor):
    """A static weight: `ReadOnlyError` on a write to it or to a view of it, and when it is combined with other tensors."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if _writes(name) or kwargs.get("out") is not None or (name in _COMBINING and _with_others(args, kwargs)):
            raise ReadOnlyError(READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        return out.as_subclass(StaticWeight) if name in _VIEWS and isinstance(out, Tensor) else out


def read_only(weight: Tensor) -> Tensor:
    """The weight, guarded; returned as is under a compiler."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(StaticWeight)


def _name(func: Callable[..., Any]) -> str:
    """Name of a function or method; for an attribute, its own when read and `__set__` when written."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITING_DUNDERS or name in _HOOKS


def _with_others(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the arguments contain a tensor other than a static weight."""
    given = [
        item for value in (*args, *kwargs.values()) for item in (value if isinstance(value, list | tuple) else (value,))
    ]
    return any(isinstance(item, Tensor) and item.dim() > 0 and not isinstance(item, StaticWeight) for item in given)
