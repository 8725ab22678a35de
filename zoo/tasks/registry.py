"""Registry of the tasks. A task is one file in this folder with one `@register` line."""

import dataclasses
import pkgutil
from functools import cache
from importlib import import_module
from typing import Any

from surgeon.errors import ConfigError
from surgeon.util.near import did_you_mean
from surgeon.zoo.tasks.base import Task

_TASKS: dict[str, type[Task]] = {}


def register(cls: type[Task]) -> type[Task]:
    """Class decorator: register a task under its `name`."""
    if cls.name in _TASKS:
        raise ValueError(f"task {cls.name!r} is registered twice, by {_TASKS[cls.name].__name__} and {cls.__name__}")
    _TASKS[cls.name] = cls
    return cls


@cache
def _load() -> None:
    """Import every file of this folder so that its tasks register themselves."""
    import surgeon.zoo.tasks

    for module in pkgutil.iter_modules(surgeon.zoo.tasks.__path__, "surgeon.zoo.tasks."):
        import_module(module.name)


def task_names() -> list[str]:
    """Names of all tasks."""
    _load()
    return sorted(_TASKS)


def task_class(name: str) -> type[Task]:
    """The class of a task; an unknown name raises a `ConfigError` that lists the known ones."""
    _load()
    if name not in _TASKS:
        raise ConfigError(f"unknown task {name!r}; there are {', '.join(task_names())}.{did_you_mean(name, _TASKS)}")
    return _TASKS[name]


def create_task(name: str, *, seed: int = 0, **options: Any) -> Task:
    """A task with its options; unknown options raise a `ConfigError` that lists the task's own."""
    cls = task_class(name)
    known = [field.name for field in dataclasses.fields(cls.config_class)]
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known)
            raise ConfigError(f"task {name} has no option {option!r}; it has {', '.join(known)}.{hint}")
    try:
        config = cls.config_class(**options)
    except ConfigError as error:
        raise ConfigError(f"task {name}: {error}") from error
    return cls(config, seed=seed)
