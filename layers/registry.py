"""Registry of the dynamic layers. A layer type is one file or folder here with one `@register` line."""

import pkgutil
from functools import cache
from importlib import import_module

from surgeon.errors import ConfigError
from surgeon.layers.base import DynamicConv2d, LayerConfig
from surgeon.util.near import did_you_mean

_TYPES: dict[str, type[DynamicConv2d]] = {}


def register(cls: type[DynamicConv2d]) -> type[DynamicConv2d]:
    """Class decorator: register a layer under its `type_name`."""
    if cls.type_name in _TYPES:
        raise ValueError(
            f"layer type {cls.type_name!r} is registered twice, by {_TYPES[cls.type_name].__name__} and {cls.__name__}"
        )
    _TYPES[cls.type_name] = cls
    cls.Config.layer_type = cls.type_name
    return cls


@cache
def _load() -> None:
    """Import every file and folder here so that their layers register themselves."""
    import surgeon.layers

    for module in pkgutil.iter_modules(surgeon.layers.__path__, "surgeon.layers."):
        import_module(module.name)


def layer_types() -> list[str]:
    """Names of all layer types."""
    _load()
    return sorted(_TYPES)


def layer_class(name: str) -> type[DynamicConv2d]:
    """The class of a layer type; an unknown name raises a `ConfigError` that lists the known ones."""
    _load()
    if not isinstance(name, str) or name not in _TYPES:
        raise ConfigError(
            f"unknown layer type {name!r}; there are {', '.join(layer_types())}.{did_you_mean(name, _TYPES)}"
        )
    return _TYPES[name]


def type_of(config: LayerConfig) -> str:
    """Name of the layer type that takes these options; raises `ConfigError` if none is registered."""
    _load()
    names = [name for name, cls in _TYPES.items() if cls.Config is type(config)]
    if not names:
        raise ConfigError(f"no layer type takes a {type(config).__name__}; known types: {', '.join(layer_types())}")
    return names[0]
