"""Registry of the zoo's networks. A network is one file in `networks/` with one `@register` line per name."""

import difflib
import functools
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgeon.errors import ConfigError, ModelError
from surgeon.records.recipe import Rule
from surgeon.util.near import refused_argument

Layout = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
"""(regular expression, replacement) pairs, applied in order to the keys of a public state dict; "" drops the tensor."""

Factory = Callable[..., nn.Module]
Size = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Numbers published in a paper.

    `params` is the number of parameters; `macs` the multiply-accumulates of one image of size `at` (C, H, W), if the paper
    gives them in any unit; `where` is the table or the sentence.
    """

    where: str
    params: float | None = None
    macs: float | None = None
    at: Size | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One network of the zoo.

    `plain` names the network that `rules` turn into this one; without rules, its closest plain counterpart, and `by_hand`
    explains why surgery cannot produce this one. `uncounted` is a regular expression of parameters that
    the published number omits; `difference` explains why ours differs from the published number.
    """

    name: str
    factory: Factory
    input_size: Size  # (C, H, W) of an example input; H and W are free unless the docstring says otherwise
    layout: Layout = ()  # how the keys of public weights map to this network's
    reshaped: str = ""  # regular expression of tensors that public weights store in another shape, in the same order
    summary: str = ""
    description: str = field(default="", repr=False)
    published: Published | None = None
    difference: str = ""
    uncounted: str = ""
    plain: str | None = None
    rules: tuple[Rule, ...] = ()
    by_hand: str = ""


_ENTRIES: dict[str, Entry] = {}
_OPTIONS = "_zoo_options"  # attribute of a network: the arguments of its factory


def zero_based(template: str) -> Callable[[re.Match[str]], str]:
    """Replacement for a layout that counts from 1: each `{}` takes a matched number minus one."""
    return lambda match: template.format(*(int(group) - 1 for group in match.groups()))


def register(name: str, *, input_size: Size, source: str | None = None, **about: Any) -> Callable[[Factory], Factory]:
    """Decorator: register a factory (keyword options -> module) under a name.

    `source` cites the network's origin, by default the docstring of the factory's module; `about` holds fields of
    `Entry`.
    """

    def decorate(factory: Factory) -> Factory:
        if name in _ENTRIES:
            raise ValueError(f"the zoo already has a network {name!r}")
        parameters = inspect.signature(factory)

        @functools.wraps(factory)
        def build(*args: Any, **options: Any) -> nn.Module:
            model = factory(*args, **options)
            vars(model)[_OPTIONS] = dict(parameters.bind(*args, **options).arguments)
            return model

        text = inspect.cleandoc(factory.__doc__ or "")
        module = inspect.cleandoc(source or getattr(inspect.getmodule(factory), "__doc__", None) or "")
        _ENTRIES[name] = Entry(
            name=name,
            factory=build,
            input_size=input_size,
            summary=text.partition("\n")[0],
            description=f"{text}\n\n{module}",
            **about,
        )
        return build

    return decorate


def options_of(model: nn.Module, name: str) -> dict[str, Any]:
    """The options with which the zoo built a model, those that the network `name` takes, too; only values that JSON has."""
    taken = inspect.signature(entry(name).factory).parameters
    given: dict[str, Any] = vars(model).get(_OPTIONS, {})
    return {key: value for key, value in given.items() if key in taken and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def names() -> list[str]:
    """Names of all networks, sorted."""
    return sorted(_ENTRIES)


def entry(name: str) -> Entry:
    """Facts about a network; an unknown name raises a `ModelError` with the nearest ones."""
    if name not in _ENTRIES:
        near = difflib.get_close_matches(name, _ENTRIES, n=3) or names()
        raise ModelError(f"the zoo has no network {name!r}. Did you mean {' or '.join(near)}?")
    return _ENTRIES[name]


def create(name: str, **options: Any) -> nn.Module:
    """Build a network with random weights.

    Raises `ModelError` for an unknown name and `ConfigError` for options that the network does not have.
    """
    factory = entry(name).factory
    try:
        return factory(**options)
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
        raise ConfigError(
            f"zoo network {name!r} cannot be built with {given}: {refused_argument(error) or error}"
        ) from error
