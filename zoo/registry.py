"""The networks of the zoo by name. A network is one file in `networks/` and one `@register` line a name."""

import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgeon.errors import ConfigError, ModelError
from surgeon.records.recipe import Rule

Layout = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
"""(regular expression, replacement) pairs, applied in order to the keys of a public state dict; "" drops the tensor."""

Factory = Callable[..., nn.Module]
Size = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper says that a network has.

    `params` parameters; `macs` multiply-accumulates of one image of size `at` (C, H, W), where the paper says so in whatever
    unit; `where` is the table or the sentence.
    """

    where: str
    params: float | None = None
    macs: float | None = None
    at: Size | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name of the zoo.

    `plain` is the name of the network that `rules` turn into this one; without rules it is the one beside it, and `by_hand`
    says why no surgery leads from there. `uncounted` is a regular expression of parameters that
    the published number leaves out; `difference` says why ours differs from what was published.
    """

    name: str
    factory: Factory
    input_size: Size  # (C, H, W) of an example input; H and W are free unless the docstring says otherwise
    layout: Layout = ()  # how the keys of the weights that are in circulation map to this network's
    reshaped: str = ""  # regular expression of the tensors that are in circulation in another shape, in the same order
    summary: str = ""
    description: str = field(default="", repr=False)
    published: Published | None = None
    difference: str = ""
    uncounted: str = ""
    plain: str | None = None
    rules: tuple[Rule, ...] = ()
    by_hand: str = ""


_ENTRIES: dict[str, Entry] = {}


def zero_based(template: str) -> Callable[[re.Match[str]], str]:
    """Replacement for a layout that counts from 1: each `{}` takes a matched number less one."""
    return lambda match: template.format(*(int(group) - 1 for group in match.groups()))


def register(name: str, *, input_size: Size, source: str | None = None, **about: Any) -> Callable[[Factory], Factory]:
    """Decorator: make a factory (keyword options -> module) known under a name.

    `source` is the text that says where the network is from, by default that of the factory's module; `about` are fields of
    `Entry`.
    """

    def decorate(factory: Factory) -> Factory:
        if name in _ENTRIES:
            raise ValueError(f"the zoo already has a network {name!r}")
        text = inspect.cleandoc(factory.__doc__ or "")
        module = inspect.cleandoc(source or getattr(inspect.getmodule(factory), "__doc__", None) or "")
        _ENTRIES[name] = Entry(
            name=name,
            factory=factory,
            input_size=input_size,
            summary=text.partition("\n")[0],
            description=f"{text}\n\n{module}",
            **about,
        )
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
