"""Object graphs: a walk through containers, objects, methods and closures, and restoring what a run changed."""

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

_OPAQUE = (
    type,
    types.ModuleType,
    str,
    bytes,
    int,
    float,
    complex,
    torch.dtype,
    torch.device,
    torch.Size,
    fx.Graph,
    fx.Node,
)
_OWN = frozenset(vars(nn.Module()))  # PyTorch's own attributes of every module
_MOST = 10_000  # maximum number of objects visited below one attribute


def held_by(value: Any) -> Iterator[Any]:
    """Objects directly referenced by an object. Modules, tensors and plain values count as referencing nothing."""
    if isinstance(value, (*_OPAQUE, nn.Module, Tensor)):
        return
    if isinstance(value, Mapping):
        yield from list(value.values())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from list(value)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
    yield from vars(value).values() if hasattr(value, "__dict__") else ()


def walk(*roots: Any) -> Iterator[Any]:
    """The roots and everything reachable from them, each object once."""
    seen: dict[int, Any] = {}
    waiting = list(roots)
    while waiting and len(seen) < _MOST:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen[id(value)] = value
        yield value
        waiting += held_by(value)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module beyond those of `nn.Module`."""
    return {key: value for key, value in vars(module).items() if key not in _OWN}


def outside_references(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """By the name of a module: attributes that hold it outside the module tree, where a replacement would not reach it."""
    found: dict[str, list[str]] = {}
    tree = {id(module) for module in model.modules()}
    targets = _by_id(model, names)
    for prefix, owner in model.named_modules():
        for key, value in own_attributes(owner).items():
            if key == "graph_module" and isinstance(vars(owner).get("graph"), fx.Graph):
                continue  # of an unflattened program: only its code runs, on the owner's modules
            for held in walk(value):
                if not isinstance(held, nn.Module) or held is owner:
                    continue
                for module in [held] if id(held) in tree else held.modules():
                    if id(module) in targets:
                        found.setdefault(targets[id(module)], []).append(f"{prefix}.{key}" if prefix else key)
    return {name: list(dict.fromkeys(keys)) for name, keys in found.items()}


def held_by_functions(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """By the name of a module: attributes that are functions whose variables hold it, or a module around it.

    Copying a model does not copy what a function's variables hold: it goes on calling the original's modules.
    """
    found: dict[str, list[str]] = {}
    targets = _by_id(model, names)
    for prefix, owner in model.named_modules():
        for key, value in own_attributes(owner).items():
            functions = [held for held in walk(value) if isinstance(held, types.FunctionType)]
            held = [inner for inner in walk(*map(_variables, functions)) if isinstance(inner, nn.Module)]
            for module in {id(part): part for outer in held for part in outer.modules()}:
                if module in targets:
                    found.setdefault(targets[module], []).append(f"{prefix}.{key}" if prefix else key)
    return found


def _by_id(model: nn.Module, names: Iterable[str]) -> dict[int, str]:
    """The named modules' names by id; names are without the prefix of `torch.compile`."""
    by_name = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}
    return {id(by_name[name]): name for name in names if name in by_name}


def _variables(function: types.FunctionType) -> list[Any]:
    """Values of the global and the closed-over variables of a function."""
    closed = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    return closed + [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Context that restores the attributes, lists, objects, tensors and random generators held by the modules."""
    before: list[tuple[Any, Any]] = []
    for module in model.modules():
        own = own_attributes(module)
        before.append((module, own))
        before += [(module._buffers, dict(module._buffers))]
        before += [(value, kept) for value in walk(*own.values()) if (kept := _content(value)) is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for value, kept in before:
                _put_back(value, kept)


def _content(value: Any) -> Any:
    """A shallow copy of an object's mutable content; None if it has none, or none is known."""
    if isinstance(value, Tensor):
        return value.detach().clone() if type(value) in (Tensor, nn.Parameter) and not value.is_meta else None
    if isinstance(value, dict | list | set | deque):
        return value.copy()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if hasattr(value, "bit_generator"):  # numpy's Generator
        return value.bit_generator.state
    if type(value).__name__ == "RandomState":
        return value.get_state()
    if isinstance(value, nn.Module | types.FunctionType | types.MethodType) or not hasattr(value, "__dict__"):
        return None
    return dict(vars(value))


def _put_back(value: Any, kept: Any) -> None:
    if isinstance(value, nn.Module):
        for key in own_attributes(value).keys() - kept.keys():
            del value.__dict__[key]
        value.__dict__.update(kept)
    elif isinstance(value, Tensor):
        if not torch.equal(value, kept):
            value.copy_(kept)
    elif isinstance(value, dict | set):
        if not _same(value, kept):
            value.clear()
            value.update(kept)
    elif isinstance(value, list):
        value[:] = kept
    elif isinstance(value, deque):
        value.clear()
        value.extend(kept)
    elif isinstance(value, torch.Generator):
        value.set_state(kept)
    elif isinstance(value, random.Random):
        value.setstate(kept)
    elif hasattr(value, "bit_generator"):
        value.bit_generator.state = kept
    elif type(value).__name__ == "RandomState":
        value.set_state(kept)
    else:
        value.__dict__.clear()
        value.__dict__.update(kept)


def _same(value: Any, kept: Any) -> bool:
    """Whether a dictionary contains the same objects in the same order; sets are simply refilled."""
    if not isinstance(value, dict):
        return False
    return [*map(id, value.values())] == [*map(id, kept.values())] and [*value] == [*kept]


@contextmanager
def python_seeded(seed: int) -> Iterator[None]:
    """Context that seeds the global generators of Python and numpy and restores them afterward."""
    numpy = sys.modules.get("numpy")
    before, arrays = random.getstate(), None if numpy is None else numpy.random.get_state()
    random.seed(seed)
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before)
        if numpy is not None:
            numpy.random.set_state(arrays)
