"""Which forward methods read a convolution's parameters themselves, also on paths that the example does not take.

timm's MobileViTv2 slices the weight of a convolution only when it attends to a second image; one watched forward pass cannot
show that. So the bytecode of forward methods is searched for `self.<…>.weight` and `self.<…>.bias`.
"""

import dis
from collections.abc import Collection
from functools import cache
from typing import Any

from torch import nn

HARMLESS = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_sparse", "is_quantized"}
    | {
        "is_mkldnn",
        "is_leaf",
        "names",
        "itemsize",
        "nbytes",
        "is_cpu",
        "is_xpu",
        "is_mps",
        "_backward_hooks",
        "grad_fn",
    }
    | {"size", "dim", "numel", "nelement", "element_size", "stride", "is_contiguous", "is_floating_point", "is_complex"}
    | {"get_device", "type", "__len__", "__hash__", "__repr__", "data_ptr", "storage_offset", "ndimension"}
)  # what tells about a tensor without using its values

_PARAMETERS = ("weight", "bias")


def written_reads(model: nn.Module, targets: Collection[int]) -> dict[int, list[str]]:
    """For modules among `targets` (by id): the methods of other modules that read their weight or bias."""
    found: dict[int, list[str]] = {}
    for module in model.modules():
        for method, path in _reads_of(type(module)):
            owner = _resolve(module, path)
            if owner is not None and owner is not module and id(owner) in targets:
                readers = found.setdefault(id(owner), [])
                if method not in readers:
                    readers.append(method)
    return found


def _resolve(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    owner: Any = module
    for name in path:
        owner = getattr(owner, name, None)
    return owner if isinstance(owner, nn.Module) else None


@cache
def _reads_of(cls: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(method, attribute path) of every read in the forward methods of a class."""
    found = []
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn.") or base is object:
            continue
        for name, function in vars(base).items():
            code = getattr(function, "__code__", None)
            if "forward" in name and code is not None and set(_PARAMETERS) & set(code.co_names):
                found += [(f"{base.__name__}.{name}", path) for path in _paths(code)]
    return tuple(found)


def _paths(code: Any) -> list[tuple[str, ...]]:
    """Chains `self.a.b` whose `.weight` or `.bias` is taken for more than a look at its shape or dtype."""
    chains: list[list[str]] = []
    current: list[str] | None = None
    for step in dis.get_instructions(code):
        if step.opname.startswith("LOAD_FAST") and step.argval == "self":
            current = []
            chains.append(current)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and current is not None:
            current.append(str(step.argval))
        elif step.opname not in ("CACHE", "EXTENDED_ARG", "PRECALL"):
            current = None
    paths = []
    for chain in chains:
        at = next((i for i, name in enumerate(chain) if name in _PARAMETERS and i > 0), None)
        if at is not None and (at + 1 == len(chain) or chain[at + 1] not in HARMLESS):
            paths.append(tuple(chain[:at]))
    return paths
