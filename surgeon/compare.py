"""How far two outputs of a model are apart, whatever their structure."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Largest errors over all tensors: max |a − b|, and max |a − b| / max |a| of the worst tensor. `notes` tell oddities."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    where: str = ""  # the worst tensor
    notes: tuple[str, ...] = ()

    def worse(self, other: "Difference") -> "Difference":
        """The two taken together."""
        first = self if not other.max_rel > self.max_rel else other
        notes = tuple(dict.fromkeys((*self.notes, *other.notes)))
        return Difference(
            max_abs=max(self.max_abs, other.max_abs), max_rel=first.max_rel, where=first.where, notes=notes
        )


def compare(expected: Any, found: Any) -> Difference:
    """Compare nested tensors: dictionaries, lists, tuples, dataclasses. Another structure or shape is an infinite error."""
    a, b = dict(_leaves(expected, "output")), dict(_leaves(found, "output"))
    if a.keys() != b.keys():
        odd = ", ".join(sorted(a.keys() ^ b.keys())[:3])
        return Difference(
            max_abs=math.inf, max_rel=math.inf, notes=(f"the outputs differ in structure, first in {odd}",)
        )
    total = Difference()
    for path, tensor in a.items():
        total = total.worse(compare_tensors(tensor, b[path], path))
    return total


def compare_tensors(expected: Tensor, found: Tensor, where: str = "output") -> Difference:
    """Compare two tensors. Where the first is not finite, the second must have the same infinities and NaNs."""
    if expected.is_nested or found.is_nested:
        return _compare_nested(expected, found, where)
    if expected.layout != found.layout:
        note = f"{where} has the layout {found.layout}, not {expected.layout}"
        return Difference(max_abs=math.inf, max_rel=math.inf, where=where, notes=(note,))
    if expected.layout != torch.strided:
        expected, found = expected.to_dense(), found.to_dense()
    if expected.shape != found.shape:
        note = f"{where} has the shape {tuple(found.shape)}, not {tuple(expected.shape)}"
        return Difference(max_abs=math.inf, max_rel=math.inf, where=where, notes=(note,))
    if expected.numel() == 0:
        return Difference(notes=("parts of the output are empty: they tell nothing",))
    wide = torch.complex128 if expected.is_complex() else torch.float64
    if expected.device.type == "mps" or expected.dtype in (torch.float32, torch.float16, torch.bfloat16):
        wide = torch.float32
    a, b = expected.detach().to(wide), found.detach().to(wide)
    difference, scale = (a - b).abs().max().item(), a.abs().max().item()
    if math.isfinite(difference) and math.isfinite(scale):
        return _relative(difference, scale, where)
    return _not_finite(a, b, where)


def _compare_nested(expected: Tensor, found: Tensor, where: str) -> Difference:
    """Tensor by tensor; another number of them, or a dense one on one side only, is an infinite error."""
    lists = [t.unbind() if t.is_nested else () for t in (expected, found)]
    if len(lists[0]) != len(lists[1]):
        note = f"{where} holds {len(lists[1])} nested tensors, not {len(lists[0])}"
        return Difference(max_abs=math.inf, max_rel=math.inf, where=where, notes=(note,))
    total = Difference()
    for i, (a, b) in enumerate(zip(*lists, strict=True)):
        total = total.worse(compare_tensors(a, b, f"{where}[{i}]"))
    return total


def _relative(difference: float, scale: float, where: str) -> Difference:
    if difference == 0:
        return Difference(where=where)
    return Difference(max_abs=difference, max_rel=difference / scale if scale else math.inf, where=where)


def _not_finite(a: Tensor, b: Tensor, where: str) -> Difference:
    finite = a.isfinite()
    same = bool((finite == b.isfinite()).all()) and torch.equal(a.isnan(), b.isnan())
    same = same and torch.equal(a[a.isinf()], b[a.isinf()])
    share = 100 * (1 - finite.double().mean().item())
    if not same:
        note = f"{where}: infinities or NaNs ({share:.0f} % of the original's values) are not at the same places"
        return Difference(max_abs=math.inf, max_rel=math.inf, where=where, notes=(note,))
    note = f"{where}: the original gives infinities or NaNs ({share:.0f} % of the values), at the same places"
    if not finite.any():
        return Difference(where=where, notes=(note + "; only the layers' own errors tell something",))
    a, b = a[finite], b[finite]
    found = _relative((a - b).abs().max().item(), a.abs().max().item(), where)
    return found.worse(Difference(notes=(note,)))


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, bool | int | float):
        yield path, torch.tensor(tree)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}[{key!r}]")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{i}]")
    elif is_dataclass(tree) and not isinstance(tree, type):
        for field in fields(tree):
            yield from _leaves(getattr(tree, field.name), f"{path}.{field.name}")
