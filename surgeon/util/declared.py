"""Names and options of layer types and tasks, read from their source, because importing them loads torch, which takes seconds.

The registries (`surgeon.layers.registry`, `surgeon.zoo.tasks.registry`) are authoritative. This only serves to
reject a misspelled option at once, using each class's name, its config class, and that class's annotated fields.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from surgeon.errors import ConfigError, RecipeError
from surgeon.util.kinds import fits, readable
from surgeon.util.limits import CHOICES, RANGES, WORDS, Limits, check_choice, check_limits, check_range, merged
from surgeon.util.near import did_you_mean

_TYPES = {"Any": Any, "Literal": Literal, "Path": Path}


@dataclass(frozen=True)
class Declared:
    """A layer type or a task: the type of each option, the limits of numbers, the choices of words, which options are ranges,
    whether it declares `compressed` options."""

    options: dict[str, Any]
    limits: Limits
    choices: dict[str, tuple[Any, ...]]
    ranges: tuple[str, ...] = ()
    compressed: bool = False


@cache
def layer_types() -> dict[str, Declared]:
    """The layer types by name; empty if their source is unavailable."""
    return _declared("surgeon.layers", "", "type_name", "Config")


@cache
def tasks() -> dict[str, Declared]:
    """The tasks by name; empty if their source is unavailable."""
    return _declared("surgeon.zoo", "tasks", "name", "config_class")


def check_layer_options(kind: str, options: dict[str, Any], flags: Mapping[str, str]) -> None:
    """Raise `ConfigError` for an unknown layer type, and for options that are unknown, of the wrong type or beyond their limits.

    `flags` are the flags with which options were given, if they have their own.
    """
    known = layer_types()
    if known and kind not in known:
        raise unknown_layer_type(kind, sorted(known))
    if kind in known:
        found = known[kind]
        unknown = sorted(set(options) - set(found.options))
        if unknown:
            names = ", ".join(flags.get(name, repr(name)) for name in unknown)
            near = did_you_mean(unknown[0], found.options)
            others = [other for other, its in known.items() if unknown[0] in its.options]
            owned = f" but of {' and '.join(others)}" if others else ""
            raise ConfigError(
                f"{names} is no option of {kind} layers{owned}; {kind} has {', '.join(found.options)}.{near}"
            )
        _check_kinds(f"{kind}: ", found, options, flags)


def check_task_options(name: str, options: dict[str, Any]) -> None:
    """Raise `ConfigError` for an unknown task, and for options that it does not have, of the wrong type or beyond their limits."""
    known = tasks()
    if known and name not in known:
        raise unknown_task(name, sorted(known))
    if name in known:
        for option in options:
            if option not in known[name].options:
                raise unknown_option(name, option, known[name].options)
        _check_kinds(f"task {name}: ", known[name], options, {})


def unknown_layer_type(name: str, known: Iterable[str]) -> ConfigError:
    """The error for an unknown layer type."""
    return ConfigError(f"unknown layer type {name!r}; there are {', '.join(known)}.{did_you_mean(str(name), known)}")


def unknown_task(name: str, known: Iterable[str]) -> ConfigError:
    """The error for an unknown task."""
    return ConfigError(f"unknown task {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}")


def unknown_option(task: str, option: str, known: Iterable[str]) -> ConfigError:
    """The error for an unknown task option."""
    names = ", ".join(known)
    return ConfigError(f"task {task} has no option {option!r}; it has {names}.{did_you_mean(option, known)}")


@cache
def training_recipes() -> list[str]:
    """The names of the training recipes that ship with surgeon, sorted; empty if their folder is unavailable."""
    spec = find_spec("surgeon.zoo")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return sorted(file.stem for place in places for file in Path(place, "recipes").glob("*.json"))


@cache
def training_defaults() -> dict[str, Any]:
    """The defaults of a training's options; empty if the source is unavailable."""
    spec = find_spec("surgeon.zoo")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [file for place in places if (file := Path(place, "finetune", "config.py")).is_file()]
    classes = [node for file in files for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.ClassDef)]
    values = (pair for one in classes if one.name == "FinetuneConfig" for pair in _assigned(one))
    return {name: value.value for name, kind, value in values if kind is not None and isinstance(value, ast.Constant)}


def unknown_training_recipe(name: str, known: Iterable[str]) -> RecipeError:
    """The error for an unknown training recipe."""
    return RecipeError(
        f"there is no training recipe {name!r}; there are {', '.join(known)}, and files by a name that ends in "
        f".json.{did_you_mean(name, known)}"
    )


def _check_kinds(where: str, found: Declared, options: dict[str, Any], flags: Mapping[str, str]) -> None:
    for name, value in options.items():
        shown = f"{where}{flags.get(name, name)}"
        if not fits(value, found.options[name]):
            raise ConfigError(f"{shown} must be {readable(found.options[name])}, got {value!r}")
        check_limits(shown, value, found.limits.get(name, {}))
        if name in found.choices:
            check_choice(shown, value, found.choices[name])
        if name in found.ranges:
            check_range(shown, value)


# --- reading the source -------------------------------------------------------------------------------------------


def _declared(package: str, below: str, name: str, config: str) -> dict[str, Declared]:
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    classes = {one.name: one for place in places for one in _classes(Path(place, below))}
    found = {}
    for one in classes.values():
        values = {key: node for key, _, node in _assigned(one)}
        if isinstance(called := values.get(name), ast.Constant) and isinstance(made := values.get(config), ast.Name):
            compressed = made.id in classes and "compressed" in (key for key, _, _ in _assigned(classes[made.id]))
            found[str(called.value)] = Declared(*_config(made.id, classes), compressed)
    return found


def _classes(folder: Path) -> Iterator[ast.ClassDef]:
    """Top-level classes in the files below a folder that are configs or refer to one."""
    for file in sorted(folder.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "Config" in text:
            yield from (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))


def _assigned(one: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None, ast.expr | None]]:
    """(name, annotation, value) of the plain assignments in a class."""
    for node in one.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.annotation, node.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, None, node.value


def _config(
    name: str, classes: dict[str, ast.ClassDef]
) -> tuple[dict[str, Any], Limits, dict[str, tuple[Any, ...]], tuple[str, ...]]:
    """(fields, limits, choices, ranges) of a config and its base classes; the types of its fields are `Any` where not plain."""
    fields: dict[str, Any] = {}
    limits: Limits = {}
    choices: dict[str, tuple[Any, ...]] = {}
    ranges: tuple[str, ...] = ()
    if name not in classes:
        return fields, limits, choices, ranges
    for base in classes[name].bases:
        if isinstance(base, ast.Name):
            more, inherited, words, spans = _config(base.id, classes)
            fields, limits, choices, ranges = fields | more, limits | inherited, choices | words, ranges + spans
    for field, annotation, value in _assigned(classes[name]):
        if field in WORDS and value is not None:
            limits = merged(limits, field, ast.literal_eval(value))
        elif field == CHOICES and value is not None:
            choices = choices | ast.literal_eval(value)
        elif field == RANGES and value is not None:
            ranges += ast.literal_eval(value)
        elif annotation is not None and not ast.unparse(annotation).startswith("ClassVar"):
            fields[field] = _type(annotation)
    return fields, limits, choices, ranges


def _type(annotation: ast.expr) -> Any:
    try:
        return eval(ast.unparse(annotation), dict(_TYPES))
    except NameError:
        return Any
