"""Methods that read a convolution's parameters directly, even on code paths that the example does not take.

timm's MobileViTv2 slices a convolution's weight only when it attends to a second image; a helper may read one only in
training. An observed forward pass in eval mode cannot show that, so the source of the methods is searched for
`self.<…>.weight` and `self.<…>.bias` (see `surgeon.sites.syntax`), except in methods that build or rebuild a model.
"""

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

from torch import fx, nn

from surgeon.layers.base import DynamicConv2d
from surgeon.layers.source import CONV_ATTRIBUTES
from surgeon.sites.syntax import ANY, Path, Read, Unread, names_in, reads_of

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
)  # properties of a tensor that do not use its values

_PARAMETERS = frozenset({"weight", "bias"})
# Methods that build, load, fuse or print a model may read weights; but those that a forward method calls are searched, too.
_UPKEEP = re.compile(
    r"__init__|__repr__|extra_repr|init|reset|load|state_dict|fus(e|ing)|reparam|deploy|equivalent|merge|prune|freeze|decay|"
    r"parameter_groups|group_matcher|kernel_bias|remove_|export|save|^set_|resize|resample"
)


def written_reads(model: nn.Module, targets: Collection[int]) -> dict[int, list[str]]:
    """For modules among `targets` (by id): methods of other modules that read their weight or bias."""
    return {
        key: list(dict.fromkeys(method for method, _ in reads))
        for key, reads in _all_reads(model, dict.fromkeys(targets, _PARAMETERS)).items()
    }


def lost_reads(model: nn.Module, targets: Collection[int]) -> dict[int, list[tuple[str, str]]]:
    """For modules among `targets` (by id): methods of other modules that read an attribute dynamic layers lack, and its name."""
    lost = {id(m): _lost(m) for m in model.modules() if id(m) in targets and not isinstance(m, DynamicConv2d)}
    return _all_reads(model, lost)


@cache
def _dynamic_names() -> frozenset[str]:
    return (
        frozenset(dir(DynamicConv2d))
        | _PARAMETERS
        | {"in_channels", "out_channels", "kernel_size", "stride", "groups"}
        | {
            *("dilation", "padding_mode", "training"),
        }
    )


def _lost(conv: nn.Module) -> frozenset[str]:
    """Attributes of a convolution that its replacement does not get (those set on the instance carry over)."""
    own = frozenset(vars(conv)) - CONV_ATTRIBUTES
    return frozenset(dir(conv)) - own - _dynamic_names()


def _all_reads(model: nn.Module, wanted: Mapping[int, Collection[str]]) -> dict[int, list[tuple[str, str]]]:
    """(method, attribute) of every read of a wanted attribute by another module, by the id of the module read."""
    found: dict[int, list[tuple[str, str]]] = {}
    names = frozenset().union(*wanted.values())
    for module in model.modules():
        cls: Any = type(module)
        for method, read in _reads_of(cls, names):
            for owner, attribute in _owners(module, read):
                if owner is module or attribute not in wanted.get(id(owner), ()):
                    continue
                entry = (method, attribute)
                if entry not in found.setdefault(id(owner), []):
                    found[id(owner)].append(entry)
    return found


def _owners(module: nn.Module, read: Read | Unread) -> Iterator[tuple[Any, str]]:
    """The modules read, and the attribute. Without source: every child whose name occurs in the method."""
    if isinstance(read, Read):
        yield from ((owner, read.attribute) for owner in _resolve([module], read.path))
        return
    for name, child in module.named_modules():
        parts = [part for part in name.split(".") if not part.isdigit()]
        if name and read.names.issuperset(parts):
            yield from ((child, attribute) for attribute in read.names)


def _resolve(owners: list[Any], path: Path) -> list[Any]:
    for key in path:
        owners = [part for owner in owners for part in _parts(owner, key)]
    return [owner for owner in owners if isinstance(owner, nn.Module)]


def _parts(owner: Any, key: str) -> list[Any]:
    """The value of `owner.key` or `owner[key]`; all possible values if the code picks an element at run time."""
    if isinstance(owner, nn.Module):
        if key == ANY:
            return list(owner.children())
        found = owner._modules.get(key)
        return [found if found is not None else getattr(owner, key, None)]
    if isinstance(owner, dict):
        return list(owner.values()) if key == ANY else [owner.get(key)]
    if isinstance(owner, list | tuple):
        return list(owner) if not (key.isdigit() and int(key) < len(owner)) else [owner[int(key)]]
    return []


@cache
def _reads_of(cls: Any, names: frozenset[str]) -> tuple[tuple[str, Read | Unread], ...]:
    """(method, read) of every read of these attributes in the methods of a class."""
    found: list[tuple[str, Read | Unread]] = []
    for name, (where, function) in _searched(cls).items():
        if names_in(function).isdisjoint(names):
            continue
        reads = reads_of(function)
        told = f"{where}.{name}"
        if isinstance(reads, Unread):
            found.append((told, reads))
        else:
            found += [(told, r) for r in reads if r.attribute in names and r.then not in HARMLESS]
    return tuple(found)


def _searched(cls: Any) -> dict[str, tuple[str, Any]]:
    """Methods of a class that may run when it computes: all but maintenance methods, plus those of them that these call."""
    methods: dict[str, tuple[str, Any]] = {}
    for base in cls.__mro__:
        # a graph's own forward is in a subclass
        if base in (object, fx.GraphModule) or base.__module__.startswith("torch.nn."):
            continue
        for name, value in vars(base).items():
            function = inspect.unwrap(value.fget if isinstance(value, property) and value.fget else value)
            if inspect.isfunction(function) and name != "__init__":
                methods.setdefault(name, (base.__name__, function))
    chosen = {name: entry for name, entry in methods.items() if "forward" in name or not _UPKEEP.search(name)}
    pending = list(chosen.values())
    while pending:
        for name in names_in(pending.pop()[1]) & (methods.keys() - chosen.keys()):
            chosen[name] = methods[name]
            pending.append(methods[name])
    return chosen
