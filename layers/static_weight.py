"""What `.weight` of a dynamic layer gives: a tensor to look at, which says so where somebody writes to it.

Code for `nn.Conv2d` merges adapters, folds norms and clips by writing to `.weight`. A dynamic layer computes its static weight anew
at each call: the write would be lost, or, where the weight is made into another convolution, the dynamic part would.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import ReadOnlyError

READ_ONLY = (
    "the weight of a dynamic layer is there to look at: it is computed from several parameters, and a write, or a convolution "
    "made of it, would lose them or the dynamic part. Fold a norm with surgeon.layers.fold_batchnorm(layer, norm), merge adapters "
    "and fuse before converting, or make plain convolutions first with surgeon.revert(model); static_weight() is an ordinary tensor"
)

_WRITING_DUNDERS = frozenset(
    f"__{name}__" for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
) | {"__setitem__", "__set__", "__delete__", "__idiv__"}
_HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
# With other tensors, these make the kernel of another convolution: a norm's scale, a parallel branch.
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
    """A static weight: `ReadOnlyError` for a write to it, to a view of it, and where it is combined with other tensors."""

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
    """The weight, under guard; as it is where a compiler looks on."""
    return weight if torch.compiler.is_compiling() else weight.as_subclass(StaticWeight)


def _name(func: Callable[..., Any]) -> str:
    """Name of a function or method; of an attribute, its own where it is read and `__set__` where it is written."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITING_DUNDERS or name in _HOOKS


def _with_others(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a tensor, not a number, that is no static weight is among the arguments."""
    given = [
        item for value in (*args, *kwargs.values()) for item in (value if isinstance(value, list | tuple) else (value,))
    ]
    return any(isinstance(item, Tensor) and item.dim() > 0 and not isinstance(item, StaticWeight) for item in given)
