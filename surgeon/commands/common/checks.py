"""Checks made before heavy libraries are loaded, which takes seconds: names, paths, conflicting options.

Every command module may have a `check(args)`, which `main` calls first and which uses these.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from surgeon.errors import ConfigError, DataError, InputError, RecipeError
from surgeon.models.places import (
    HUB,
    WEIGHTS,
    check_folder,
    check_model_name,
    check_module_of,
    check_own,
    check_repository,
    check_search,
    check_trust,
    check_weights,
    factory_of,
    has_dynamic_layers,
)
from surgeon.util import declared
from surgeon.util.bounds import FLAGS, parse_bound
from surgeon.util.files import read_json, read_object
from surgeon.util.kinds import fits
from surgeon.util.near import no_folder
from surgeon.util.outputs import RECIPE, is_surgeon_folder
from surgeon.util.outputs import WEIGHTS as FOLDER_WEIGHTS
from surgeon.util.parse import parse_input_size


def model(name: str, weights: str | None = None) -> None:
    """Check a model's name and its `--weights`."""
    check_model_name(name)
    check_weights(weights)


def model_of(args: argparse.Namespace) -> None:
    """Check the model of a command, its `--weights`, `--num-classes` and `--model-args`: a folder has its own."""
    weights, options = getattr(args, "weights", None), dict(args.model_args)
    model(args.model, weights)
    if options.get("num_classes", args.num_classes) != args.num_classes is not None:
        told = f"--num-classes {args.num_classes} and --model-args num_classes={options['num_classes']}"
        raise ConfigError(f"num_classes is given twice: {told}; give it once")
    if HUB.fullmatch(args.model) is None and is_surgeon_folder(args.model):
        check_own(args.model, weights=weights, num_classes=args.num_classes, options=options)


def run_folder(name: str) -> None:
    """Check a folder written by surgeon, or a name on the Hub."""
    if HUB.fullmatch(name) is None:
        check_folder(name)


def converted(name: str, what: str) -> None:
    """Check that a folder's model has dynamic layers, as far as its recipe tells; `what` would be done with them."""
    if has_dynamic_layers(name) is False:
        raise InputError(f"{name} has no dynamic layer: there is nothing to {what}")


def plain(name: str, what: str) -> None:
    """Check that a folder's model has no dynamic layers, as far as its recipe tells; `what` starts from it."""
    if has_dynamic_layers(name):
        raise ConfigError(f"{what} starts from a plain model, and {name} has dynamic layers{_made_of(name)}")


def _made_of(name: str) -> str:
    """As the end of a message: how the plain model that a folder was made of is named, as far as its recipe tells."""
    base = read_object(Path(name, RECIPE), RecipeError).get("base")
    origin = base.get("weights") if isinstance(base, dict) else None
    if (
        not isinstance(base, dict)
        or not isinstance(origin, dict)
        or origin.get("kind") not in ("file", "random", "pretrained")
    ):
        return ": surgeon revert makes it one"
    kind, file = origin["kind"], Path(str(origin.get("path")))
    if kind == "file" and file.name == FOLDER_WEIGHTS:
        return f"; it was made of {file.parent}"
    words = [
        str(base.get("name")),
        *{"file": ["--weights", str(file)], "random": ["--weights", "random"]}.get(kind, []),
    ]
    for key, value in (base.get("kwargs") or {}).items():
        words += ["--num-classes", str(value)] if key == "num_classes" else ["--model-args", f"{key}={value}"]
    return f"; it was made of {shlex.join(words)}"


def trust(args: argparse.Namespace) -> None:
    """Check that a folder needs no `--trust-factory`, of commands that have the option, or that its factory's module is there."""
    named = getattr(args, "model", None) or getattr(args, "run", None)
    if not named or not hasattr(args, "trust_factory"):
        return
    if not args.trust_factory:
        check_trust(named)
    elif (factory := factory_of(named)) is not None:
        check_module_of(factory)


def repository(name: str) -> None:
    """Check the name of a repository on the Hub."""
    check_repository(name)


def search(path: str | Path) -> None:
    """Check the folder of a search."""
    check_search(path)


def folder(path: str | Path | None, option: str, error: type[DataError] | type[InputError] = DataError) -> None:
    """Check that a folder of data or images exists, if given."""
    if path is not None and not Path(path).is_dir():
        raise error(
            f"{option}: {path} is a file, not a folder" if Path(path).exists() else f"{option}: {no_folder(path)}"
        )


def file(path: str | Path | None, option: str) -> None:
    """Check that an input file exists, if given."""
    if path is not None and not Path(path).is_file():
        raise ConfigError(f"{option}: there is no file {path}")


def other_weights(weights: str | None, option: str, *, named: bool) -> None:
    """Check the weights of the network to compare with: a file, or a word of `--weights` if that network was named."""
    if not (named and weights in WEIGHTS):
        file(weights, option)


def recipe(path: str | None) -> None:
    """Check a conversion recipe: a recipe file, a folder, or zoo/NAME."""
    if path is None or (path.startswith("zoo/") and not Path(path).exists()):
        return
    place = Path(path, RECIPE) if Path(path).is_dir() else Path(path)
    read_json(place, RecipeError, "the recipe")


def training_recipe(name: str) -> None:
    """Check the name of a training recipe that ships with surgeon."""
    known = declared.training_recipes()
    if known and name not in known:
        raise declared.unknown_training_recipe(name, known)


def layer_type(kind: str | None, options: dict[str, Any] | None = None, flags: Mapping[str, str] | None = None) -> None:
    """Check a layer type and its options; `flags` are those that were given as flags of their own.

    A type that is registered at run time is left to the registry.
    """
    if kind is not None and (kind in declared.layer_types() or not _loaded()):
        declared.check_layer_options(kind, options or {}, flags or {})


def compression(kind: str | None) -> None:
    """Check that `--compress` supports a layer type."""
    if not _loaded() and (kind is None or not declared.layer_types()[kind].compressed):
        raise no_compression(kind)


def no_compression(kind: str | None) -> ConfigError:
    """The error for `--compress` with an unsupported type, or none."""
    return ConfigError(f"--compress drops the static atoms of acda layers and does not apply to {kind}")


def task(name: str | None, options: dict[str, Any], data: str | Path | None = None) -> None:
    """Check a task, its options, and the folder of its data."""
    if "data" in options:
        raise ConfigError("give the task's data with --data, not as a --task-option")
    folder(data, "--data")
    if name is not None and not _loaded():
        declared.check_task_options(name, options)


def budgets(args: argparse.Namespace) -> None:
    """Check that the budgets can be read."""
    for name in FLAGS:
        text = getattr(args, f"max_{name}")
        if text is not None:
            parse_bound(text, name)


def positives(args: argparse.Namespace, names: Iterable[str], least: int = 1) -> None:
    """Check that these counts are at least `least`."""
    for name in names:
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")


def layer_options(kind: str | None, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The --option pairs with values of the layer type's option types; lists may be written a,b,c."""
    return typed(declared.layer_types().get(kind or ""), pairs)


def typed(known: declared.Declared | None, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """KEY=VALUE pairs with values of the options' types; lists may be written a,b,c, sizes as for --input-size."""
    return {key: _as(value, known.options.get(key) if known else None, key) for key, value in pairs}


def _as(value: Any, hint: Any, key: str) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    if hint is None or fits(value, hint):
        return value
    if key == "input_size":
        size = parse_input_size(value)
        return size if len(size) == 3 else (3, size[0], size[-1])
    parts = tuple(_number(part) for part in str(value).split(","))
    return parts if fits(parts, hint) else value


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip()


def _loaded() -> bool:
    """Whether torch is already loaded, so that the registries themselves answer as fast."""
    return "torch" in sys.modules
