"""Difference between two outputs of a model, for any output structure."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

_DEEPEST = 20  # levels of an output that are searched
_MOST_ITEMS = 10_000  # per list or iterator


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Largest errors over all tensors: max |a − b|, and max |a − b| / max |a| of the worst tensor. `notes` list anomalies."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    where: str = ""  # the worst tensor
    notes: tuple[str, ...] = ()
    compared: int = 0  # number of tensors; 0: nothing was compared
    eps: float = 0.0  # of their coarsest dtype

    def worse(self, other: "Difference") -> "Difference":
        """The two combined, keeping the larger errors."""
        first = self if not other.max_rel > self.max_rel else other
        notes = tuple(dict.fromkeys((*self.notes, *other.notes)))
        return Difference(
            max_abs=max(self.max_abs, other.max_abs),
            max_rel=first.max_rel,
            where=first.where,
            notes=notes,
            compared=self.compared + other.compared,
            eps=max(self.eps, other.eps),
        )


class Leaves(dict[str, Any]):
    """The tensors of an output by path, copied, so later code cannot change them. Strings and None are kept as they are."""


def leaves(tree: Any) -> Leaves:
    """Flatten an output: containers, dataclasses, iterators, and the attributes of any other object."""
    return tree if isinstance(tree, Leaves) else Leaves(_leaves(tree, "output", {}))


def compare(expected: Any, found: Any) -> Difference:
    """Compare nested tensors (see `leaves`). A different structure, shape or string is an infinite error."""
    a, b = leaves(expected), leaves(found)
    odd = sorted(a.keys() ^ b.keys())
    odd += [path for path in a.keys() & b.keys() if not _alike(a[path], b[path])]
    if odd:
        note = f"the outputs differ in structure, first in {', '.join(odd[:3])}"
        return Difference(max_abs=math.inf, max_rel=math.inf, notes=(note,), compared=1)
    total = Difference()
    for path, tensor in a.items():
        if isinstance(tensor, Tensor):
            total = total.worse(compare_tensors(tensor, b[path], path))
    return total


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor)
    return type(a) is type(b) and bool(a == b)


def compare_tensors(expected: Tensor, found: Tensor, where: str = "output") -> Difference:
    """Compare two tensors. If the first has infinities or NaN, the second must have the same ones in the same positions."""
    if expected.is_nested or found.is_nested:
        return _compare_nested(expected, found, where)
    if expected.is_quantized and found.is_quantized:
        expected, found = expected.dequantize(), found.dequantize()
    if expected.layout != found.layout:
        note = f"{where} has the layout {found.layout}, not {expected.layout}"
        return Difference(max_abs=math.inf, max_rel=math.inf, where=where, notes=(note,), compared=1)
    if expected.layout != torch.strided:
        expected, found = expected.to_dense(), found.to_dense()
    if expected.shape != found.shape:
        note = f"{where} has the shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        return Difference(max_abs=math.inf, max_rel=math.inf, where=where, notes=(note,), compared=1)
    if expected.numel() == 0:
        return Difference(notes=("parts of the output are empty and were not compared",))
    wide = torch.complex128 if expected.is_complex() else torch.float64
    if expected.device.type == "mps" or expected.dtype in (torch.float32, torch.float16, torch.bfloat16):
        wide = torch.float32
    a, b = expected.detach().to(wide), found.detach().to(wide)
    difference, scale = (a - b).abs().max().item(), a.abs().max().item()
    floating = [t.dtype for t in (expected, found) if t.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    floor = max((torch.finfo(dtype).tiny / torch.finfo(dtype).eps for dtype in floating), default=0.0)
    if math.isfinite(difference) and math.isfinite(scale):
        found_difference = _relative(difference, scale, where, floor)
    else:
        found_difference = _not_finite(a, b, where)
    return replace(found_difference, compared=1, eps=eps)


def _compare_nested(expected: Tensor, found: Tensor, where: str) -> Difference:
    """Tensor by tensor; a different number of them, or a dense tensor on one side only, is an infinite error."""
    lists = [t.unbind() if t.is_nested else () for t in (expected, found)]
    if len(lists[0]) != len(lists[1]):
        note = f"{where} holds {len(lists[1])} nested tensors, not {len(lists[0])}"
        return Difference(max_abs=math.inf, max_rel=math.inf, where=where, notes=(note,), compared=1)
    total = Difference()
    for i, (a, b) in enumerate(zip(*lists, strict=True)):
        total = total.worse(compare_tensors(a, b, f"{where}[{i}]"))
    return total


def _relative(difference: float, scale: float, where: str, floor: float = 0.0) -> Difference:
    """Below the floor (tiny / eps) numbers lose digits: differences there are measured relative to the floor."""
    if difference == 0:
        return Difference(where=where)
    if scale == 0 and difference > floor:
        return Difference(max_abs=difference, max_rel=math.inf, where=where)
    return Difference(max_abs=difference, max_rel=difference / max(scale, floor), where=where)


def _not_finite(a: Tensor, b: Tensor, where: str) -> Difference:
    finite = a.isfinite()
    same = bool((finite == b.isfinite()).all()) and torch.equal(a.isnan(), b.isnan())
    same = same and torch.equal(a[a.isinf()], b[a.isinf()])
    share = 100 * (1 - finite.double().mean().item())
    if not same:
        note = f"{where}: infinities or NaNs ({share:.0f} % of the original's values) are in different positions"
        return Difference(max_abs=math.inf, max_rel=math.inf, where=where, notes=(note,))
    note = f"{where}: the original has infinities or NaNs ({share:.0f} % of the values), in the same positions"
    if not finite.any():
        return Difference(where=where, notes=(note + "; only the layers' own errors are meaningful",))
    a, b = a[finite], b[finite]
    found = _relative((a - b).abs().max().item(), a.abs().max().item(), where)
    return found.worse(Difference(notes=(note,)))


def _leaves(tree: Any, path: str, above: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Tensor):
        yield path, tree.detach().clone()
    elif isinstance(tree, bool | int | float):
        yield path, torch.tensor(tree)
    elif tree is None or isinstance(tree, str | bytes):
        yield path, tree
    elif type(tree).__module__ == "numpy":
        yield path, torch.as_tensor(tree).clone()
    elif id(tree) not in above and len(above) < _DEEPEST:
        above = above | {id(tree): tree}
        for name, value in _parts(tree):
            yield from _leaves(value, path + name, above)


def _parts(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in tree.items())
    elif isinstance(tree, list | tuple | Iterator):
        yield from ((f"[{i}]", value) for i, value in enumerate(islice(tree, _MOST_ITEMS)))
    elif is_dataclass(tree) and not isinstance(tree, type):
        yield from ((f".{field.name}", getattr(tree, field.name, None)) for field in fields(tree))
    elif not isinstance(tree, type | nn.Module) and not callable(tree):
        slots = [name for kind in type(tree).__mro__ for name in _slots(kind) if hasattr(tree, name)]
        held = {name: getattr(tree, name) for name in slots} | getattr(tree, "__dict__", {})
        yield from ((f".{name}", value) for name, value in held.items())


def _slots(kind: type) -> tuple[str, ...]:
    slots: Any = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
