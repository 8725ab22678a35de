"""Checks whether a value has an annotated type, and readable names of types."""

import types
import typing
from pathlib import Path
from typing import Any


def fits(value: Any, hint: Any) -> bool:
    """Whether a value, from JSON or a caller, is acceptable for the type.

    An integer is accepted for a float, a string for a path, a list for a tuple; `Any` accepts everything.
    """
    if hint is Any:
        return True
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        parts = typing.get_args(hint)
        if not isinstance(value, tuple | list):
            return False
        if parts[-1] is Ellipsis:
            return all(fits(one, parts[0]) for one in value)
        return len(value) == len(parts) and all(fits(one, part) for one, part in zip(value, parts, strict=True))
    if isinstance(value, bool):
        return hint is bool
    accepted = {float: (int, float), Path: (str, Path)}.get(hint, hint)
    return isinstance(value, accepted)


def readable(hint: Any) -> str:
    """The type in words: "an integer or none"."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    names = {
        int: "an integer",
        float: "a number",
        str: "a text",
        bool: "true or false",
        Path: "a path",
        type(None): "none",
    }
    return " or ".join(names.get(part) or _readable_list(part) for part in parts)


def _readable_list(hint: Any) -> str:
    """A tuple as users write it on a command line: a list, with an example."""
    if typing.get_origin(hint) is not tuple:
        return str(hint).replace("typing.", "")
    parts = typing.get_args(hint)
    example = {int: "3,64,64", float: "0.5,0.5,0.5"}.get(parts[0], "a,b,c").split(",")
    if parts[-1] is Ellipsis:
        return f"a list such as [{','.join(example)}]"
    return f"a list of {len(parts)}, such as [{','.join(example[: len(parts)])}]"
