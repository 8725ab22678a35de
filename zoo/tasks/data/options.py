"""Type checks of options that come from a command line, before they do harm."""

import dataclasses
import typing

from surgeon.errors import ConfigError
from surgeon.util.kinds import fits, readable
from surgeon.zoo.tasks.base import TaskConfig


def check_types(config: TaskConfig) -> None:
    """Raise `ConfigError` for the first option whose value does not have its annotated type.

    An integer is accepted for a float, a string for a path, a list for a tuple.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not fits(value, hint):
            raise ConfigError(f"{field.name} must be {readable(hint)}, got {value!r}")
