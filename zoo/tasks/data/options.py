"""Type checks of options that come from a command line, before they do harm."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from surgeon.errors import ConfigError
from surgeon.zoo.tasks.base import TaskConfig


def check_types(config: TaskConfig) -> None:
    """Raise `ConfigError` for the first option whose value does not have its annotated type.

    An integer is accepted for a float, a string for a path, a list for a tuple.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            raise ConfigError(f"{field.name} must be {_readable(hint)}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        parts = typing.get_args(hint)
        if not isinstance(value, tuple | list):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(one, parts[0]) for one in value)
        return len(value) == len(parts) and all(_fits(one, part) for one, part in zip(value, parts, strict=True))
    if isinstance(value, bool):
        return hint is bool
    accepted = {float: (int, float), Path: (str, Path)}.get(hint, hint)
    return isinstance(value, accepted)


def _readable(hint: Any) -> str:
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
