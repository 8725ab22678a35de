"""The networks of the zoo by name. A network is one file in `networks/` and one `@register` line a name."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgeon.errors import ConfigError, ModelError

Layout = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
"""(regular expression, replacement) pairs, applied in order to the keys of a public state dict; "" drops the tensor."""

Factory = Callable[..., nn.Module]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name of the zoo."""

    name: str
    factory: Factory
    input_size: tuple[
        int, int, int
    ]  # (C, H, W) of an example input; H and W are free unless the docstring says otherwise
    layout: Layout = ()  # how the keys of the weights that are in circulation map to this network's
    summary: str = ""


_ENTRIES: dict[str, Entry] = {}


def zero_based(template: str) -> Callable[[re.Match[str]], str]:
    """Replacement for a layout that counts from 1: each `{}` takes a matched number less one."""
    return lambda match: template.format(*(int(group) - 1 for group in match.groups()))


def register(name: str, *, input_size: tuple[int, int, int], layout: Layout = ()) -> Callable[[Factory], Factory]:
    """Decorator: make a factory (keyword options -> module) known under a name."""

    def decorate(factory: Factory) -> Factory:
        if name in _ENTRIES:
            raise ValueError(f"the zoo already has a network {name!r}")
        summary = (factory.__doc__ or "").strip().splitlines()[0] if factory.__doc__ else ""
        _ENTRIES[name] = Entry(name=name, factory=factory, input_size=input_size, layout=layout, summary=summary)
        return factory

    return decorate


def names() -> list[str]:
    """Names of all networks, sorted."""
    return sorted(_ENTRIES)


def entry(name: str) -> Entry:
    """What is known about a network; an unknown name is a `ModelError` with the nearest ones."""
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, _ENTRIES, n=3) or names()
        raise ModelError(f"the zoo has no network {name!r}. Did you mean {' or '.join(near)}?")
    return _ENTRIES[name]


def create(name: str, **options: Any) -> nn.Module:
    """Build a network with random weights.

    Raises `ModelError` for an unknown name and `ConfigError` for options that the network does not have.
    """
    found = entry(name)
    try:
        return found.factory(**options)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
        raise ConfigError(f"zoo network {name!r} cannot be built with {given}: {error}") from error
