"""Providers of networks that no library has, under names with their prefix (`zoo/resnet20_cifar`).

A provider registers itself when its module is imported. The core knows only the name of that module, and imports it
when a name is first looked up.
"""

from abc import ABC, abstractmethod
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgeon.records.recipe import Rule

MODULES = ("surgeon.zoo",)  # the providers that come with surgeon

_PROVIDERS: dict[str, "Provider"] = {}


class Provider(ABC):
    """Networks by name. Unknown names raise a `ModelError` with the closest ones."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all networks, sorted, without the prefix."""

    @abstractmethod
    def create(self, name: str, **options: Any) -> "nn.Module":
        """Build a network with random weights; raises `ConfigError` for options that it does not take."""

    @abstractmethod
    def input_size(self, name: str) -> tuple[int, ...]:
        """(C, H, W) of an example input."""

    @abstractmethod
    def rules(self, name: str) -> tuple["Rule", ...]:
        """The rules that turn its plain counterpart into this network; raises `RecipeError` if there are none."""

    @abstractmethod
    def adapt(self, state: "dict[str, Tensor]", name: str, model: "nn.Module") -> "dict[str, Tensor]":
        """Public weights for the network under the names of `model`, an instance of it."""

    @abstractmethod
    def made_in(self, module: str) -> list[str]:
        """Names of the networks whose factories are in this Python module."""

    def options(self, name: str, model: "nn.Module") -> dict[str, Any]:
        """The options with which `model`, or the network that it was converted from, may have been built as `name`."""
        return {}


def register(prefix: str, provider: Provider) -> None:
    """Register a provider under the prefix of its names."""
    if prefix in _PROVIDERS:
        raise ValueError(f"the provider {prefix!r} is registered twice")
    _PROVIDERS[prefix] = provider


@cache
def _load() -> None:
    for module in MODULES:
        import_module(module)


def providers() -> dict[str, Provider]:
    """All providers by prefix."""
    _load()
    return dict(_PROVIDERS)
