"""Submodule attributes read by the source of a method. Only parses code; does not import torch.

The syntax tree is the same on every Python. If a function has no source (made by `exec`, typed in, shipped compiled),
the names in its code object, which every Python has, are used instead: anything they could spell counts as read.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

ANY = "*"  # an element picked at run time, as `self.convs[i]`

Path = tuple[str, ...]


@dataclass(frozen=True)
class Read:
    """A read of `self.<path>.<attribute>`; `then` is the attribute taken from it, as `shape`, or "" for the value itself."""

    path: Path
    attribute: str
    then: str = ""


@dataclass(frozen=True)
class Unread:
    """A method without source: the names in its code, unordered."""

    names: frozenset[str]


def reads_of(function: Callable[..., Any]) -> tuple[Read, ...] | Unread:
    """Reads of submodules of a method's first argument, including in nested functions."""
    tree = _tree(function)
    if tree is None:
        return Unread(frozenset(_names(inspect.unwrap(function).__code__)))
    return tuple(dict.fromkeys(_Reader(tree).found))


def names_in(function: Callable[..., Any]) -> frozenset[str]:
    """All names in the code of a function: a cheap check before it is parsed."""
    return _names(inspect.unwrap(function).__code__)


@cache
def _names(code: CodeType) -> frozenset[str]:
    """Names and strings in the code of a function and its nested functions: `getattr(conv, "weight")` has a string."""
    texts = [constant for constant in code.co_consts if isinstance(constant, str)]
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(texts, *inner)


def _tree(function: Callable[..., Any]) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The definition of a function, or None if its source is unavailable or has changed."""
    function = inspect.unwrap(function)
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    tree = body[0] if body else None
    if not isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef) or tree.name != function.__code__.co_name:
        return None
    return tree if tree.args.posonlyargs or tree.args.args else None


class _Reader(ast.NodeVisitor):
    """Follows the first argument, and local names bound to its attributes, through the statements in order."""

    def __init__(self, tree: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        first = [*tree.args.posonlyargs, *tree.args.args][0].arg
        self.known: dict[str, Path] = {first: ()}
        self.found: list[Read] = []
        for statement in tree.body:
            self.visit(statement)

    def visit_Name(self, node: ast.Name) -> None:
        """A name bound to a weight counts as a read where it is used, not where it is bound."""
        self._add(self.known.get(node.id, ()), "")

    def visit_Assign(self, node: ast.Assign) -> None:
        if self._path(node.value) is None or not all(isinstance(target, ast.Name) for target in node.targets):
            self.generic_visit(node)
        for target in node.targets:
            self._bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if node.value is not None:
            self._bind(node.target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._bind(node.target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind_each(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind_each(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        for part in (*node.generators, *ast.iter_child_nodes(node)):  # bind names before use
            self.visit(part)

    visit_SetComp = visit_GeneratorExp = visit_DictComp = visit_ListComp

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._note(node, "")

    def visit_Call(self, node: ast.Call) -> None:
        path = self._path(node)
        if path:
            self._add(path, "")
        self.generic_visit(node)

    def _note(self, node: ast.Attribute, then: str) -> None:
        """One read for the whole chain: `self.a.weight.shape` reads the shape of `self.a.weight`."""
        path = self._path(node)
        if path is None:
            if isinstance(node.value, ast.Attribute):
                self._note(node.value, node.attr)
            else:
                self.visit(node.value)
        elif isinstance(node.ctx, ast.Load):
            for length in range(2, len(path) + 1):
                self._add(path[:length], path[length] if length < len(path) else then)
            if not isinstance(node.value, ast.Attribute | ast.Name):
                self.generic_visit(node)

    def _add(self, path: Path, then: str) -> None:
        if len(path) > 1:
            self.found.append(Read(path[:-1], path[-1], then))

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List):
            for one, other in zip(target.elts, value.elts, strict=False):
                self._bind(one, other)
        elif isinstance(target, ast.Name):
            self._set(target.id, self._path(value))

    def _bind_each(self, target: ast.expr, value: ast.expr) -> None:
        """The target of a loop over submodules, also via `enumerate`, `zip`, `.children()`, `.values()` and the like."""
        for each, whole in _pairs(target, value):
            if isinstance(whole, ast.Call) and isinstance(whole.func, ast.Attribute):
                whole = whole.func.value  # the modules of `self.convs.values()`
            path = self._path(whole)
            if isinstance(each, ast.Name):
                self._set(each.id, None if path is None else (*path, ANY))

    def _set(self, name: str, path: Path | None) -> None:
        if path is None:
            self.known.pop(name, None)
        else:
            self.known[name] = path

    def _path(self, node: ast.expr) -> Path | None:
        """The path of an expression from the first argument on; None if it is something else."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._path(node.value)
            return None if base is None else (*base, node.attr)
        if isinstance(node, ast.Subscript):
            base = self._path(node.value)
            return None if base is None else (*base, _key(node.slice))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "getattr"
            and node.args[1:]
        ):
            base = self._path(node.args[0])
            return None if base is None else (*base, _key(node.args[1]))
        return None


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The names of a loop and the collections whose elements they take."""
    name = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
    if isinstance(value, ast.Call) and name in ("reversed", "list", "tuple", "iter", "sorted") and value.args:
        yield from _pairs(target, value.args[0])
    elif (
        isinstance(value, ast.Call) and isinstance(target, ast.Tuple) and name == "enumerate" and len(target.elts) == 2
    ):
        yield from _pairs(target.elts[1], value.args[0])
    elif isinstance(value, ast.Call) and isinstance(target, ast.Tuple) and name == "zip":
        for one, other in zip(target.elts, value.args, strict=False):
            yield from _pairs(one, other)
    elif isinstance(target, ast.Tuple):  # (name, module) of items() and named_children()
        yield target.elts[-1], value
    else:
        yield target, value


def _key(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, int | str) else ANY
