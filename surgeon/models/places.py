"""Checks of model locations, without building a model or loading heavy libraries."""

import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surgeon.errors import CheckpointError, ConfigError, ModelError, RecipeError, called, offered
from surgeon.records.recipe import CONVOLUTION
from surgeon.util.files import read_object, told
from surgeon.util.near import did_you_mean
from surgeon.util.outputs import RECIPE, RUN, SEARCH, TRIAL, is_surgeon_folder

HUB = re.compile(r"(hf-hub|hf_hub|local-dir):(?P<id>.+)")
LIBRARIES = ("timm", "torchvision", "zoo")  # prefixes before the / of a model's name
WEIGHTS = ("auto", "pretrained", "random")  # values of --weights other than a file


def check_folder(path: str | Path) -> None:
    """Raise `CheckpointError`, with a hint, unless the folder was written by surgeon."""
    path = Path(path)
    if not path.is_dir():
        near = near_folders(path) or " `surgeon convert`, `finetune` and others write such folders"
        raise CheckpointError(f"there is no surgeon folder {path}.{near}")
    if not is_surgeon_folder(path):
        raise CheckpointError(f"{path} is not a model: {_what_instead(path)}")


def check_model_name(spec: str) -> None:
    """Raise `ModelError` if a model's name is a path that does not exist or was not written by surgeon."""
    path = Path(spec)
    file, _, name = spec.partition(":")
    if file.endswith(".py"):
        module = ".".join(part for part in Path(file).with_suffix("").parts if part not in (".", "..", "/"))
        raise ModelError(f"{file} is a Python file: name a class or function in it as {module}:{name or 'NAME'}")
    if HUB.fullmatch(spec) or is_surgeon_folder(path):
        return
    if name:
        check_module_of(spec)
        return
    if spec.endswith(".pt2"):
        if not path.is_file():
            raise ModelError(f"there is no file {spec}")
    elif "/" in spec and spec.rpartition("/")[0] not in LIBRARIES:
        raise no_folder(spec)


def check_trust(path: str | Path) -> None:
    """Raise `ModelError` if this is a surgeon folder whose base model is built by a factory: the caller does not trust it."""
    if (factory := factory_of(path)) is not None:
        raise untrusted(factory)


def factory_of(path: str | Path) -> str | None:
    """The factory that builds the base model of a surgeon folder; None for other folders and models."""
    if HUB.fullmatch(str(path)) or not is_surgeon_folder(path):
        return None
    with suppress(RecipeError):  # what reads all of it says more
        base = read_object(Path(path, RECIPE), RecipeError).get("base")
        if isinstance(base, dict) and base.get("source") == "factory":
            return str(base.get("name"))
    return None


def has_dynamic_layers(path: str | Path) -> bool | None:
    """Whether the model of a surgeon folder has dynamic layers, as far as its recipe tells; None if it does not.

    Networks of a library have none but by rules; others may be made with them.
    """
    if HUB.fullmatch(str(path)) or not is_surgeon_folder(path):
        return None
    try:
        values = read_object(Path(path, RECIPE), RecipeError)
    except RecipeError:  # what reads all of it says more
        return None
    rules, base = values.get("rules"), values.get("base")
    if not isinstance(rules, list) or not isinstance(base, dict):
        return None
    if any(isinstance(rule, dict) and rule.get("type") != CONVOLUTION for rule in rules):
        return True
    return False if base.get("source") in ("timm", "torchvision") else None


def untrusted(factory: str) -> ModelError:
    """The error for a folder whose base model is built by foreign code."""
    return ModelError(
        f"the base model is built by the factory {factory}, which is code. If you trust it, "
        + called("say so with --trust-factory", "load the folder with base=MODEL or trust_factory=True")
    )


def check_module_of(factory: str) -> None:
    """Raise `ModelError` if the first part of the module of a factory, MODULE:NAME, is nowhere; nothing is imported."""
    first = re.split("[.:]", factory)[0]
    if first in sys.modules or not first.isidentifier():
        return
    if PathFinder.find_spec(first, [str(Path.cwd())]) is not None or find_spec(first) is not None:
        return
    near = did_you_mean(first, sorted(file.stem for file in Path.cwd().glob("*.py")))
    hint = near or " Run this in the folder that has it, or put that folder on PYTHONPATH"
    raise ModelError(f"there is no Python module {first!r} in this folder or on PYTHONPATH.{hint}")


def no_folder(spec: str) -> ModelError:
    """The error for a path that is not a model."""
    path = Path(spec)
    if path.is_dir():
        return ModelError(f"{spec} is not a model: {_what_instead(path)}")
    module, _, factory = path.name.partition(":")
    if factory and (path.parent / f"{module}.py").is_file():
        return ModelError(f"there is no model {spec!r}: in the folder of {module}.py, write {module}:{factory}")
    told = "was not written by surgeon" if path.exists() else "does not exist"
    return ModelError(f"there is no model {spec!r}: this folder {told}.{near_folders(path)}".rstrip("."))


def check_search(path: str | Path) -> None:
    """Raise `CheckpointError`, with a hint, unless the folder contains a search."""
    path = Path(path)
    if (path / SEARCH).is_file():
        return
    others = sorted(str(one.parent) for one in path.parent.glob(f"*/{SEARCH}"))
    hint = f"; there are {', '.join(others[:5])}" if others else "; `surgeon search MODEL ... -o FOLDER` starts one"
    told = f"it has no {SEARCH}" if path.is_dir() else "there is no such folder"
    raise CheckpointError(f"there is no search in {path}: {told}{hint}")


def check_repository(name: str) -> None:
    """Raise `ConfigError` for what cannot be the name of a repository on the Hub."""
    if not re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise ConfigError(f"a repository on the Hub is named ORG/NAME, in letters, digits and -_. , got {told(name)}")


def in_file(weights: str | Path) -> tuple[Path, str | None]:
    """File and key of `FILE:KEY`, one state dict of several in a file; the key is None if only a file is named."""
    file, _, key = str(weights).rpartition(":")
    if key and not Path(weights).exists() and Path(file).is_file():
        return Path(file), key
    return Path(weights), None


def check_weights(weights: str | Path | None) -> None:
    """Raise `ModelError` if a weights file does not exist."""
    if weights is not None and str(weights) not in WEIGHTS and not in_file(weights)[0].is_file():
        raise ModelError(f"there is no weights file {weights}; --weights takes {', '.join(WEIGHTS)} or a file")


def check_own(spec: str, *, weights: str | None, num_classes: int | None, options: Mapping[str, Any] | None) -> None:
    """Raise `ModelError` if weights or options were given for a surgeon folder or a program, which have their own."""
    given = [called(f"--weights {weights}", f"weights={weights!r}")] if weights not in (None, "auto") else []
    given += [called(f"--num-classes {num_classes}", f"num_classes={num_classes}")] if num_classes is not None else []
    given += [f"{called('--model-args ', '')}{key}={value}" for key, value in (options or {}).items()]
    if given:
        beside = weights not in (None, "auto") and offered("--original-weights")
        other = called("; for the original: --original-weights", "") if beside else ""
        what = "an exported program" if spec.endswith(".pt2") else "a surgeon folder"
        raise ModelError(f"{spec} is {what} and has its own weights; {', '.join(given)} cannot apply{other}")


def near_folders(path: Path) -> str:
    """The sibling surgeon folder with the closest name, or all of them, formatted as the end of a message."""
    try:
        names = sorted(str(one.parent) for one in path.parent.glob(f"*/{RECIPE}"))
    except OSError:
        return ""
    found = did_you_mean(str(path), names)
    return found or (f" There are {', '.join(names[:5])}{', ...' if names[5:] else ''}" if names else "")


def _recorded(file: Path) -> dict[str, Any]:
    try:
        return read_object(file, CheckpointError)
    except CheckpointError:
        return {}


def _resumed(path: Path, command: str, recorded: Mapping[str, Any]) -> str:
    """How to continue what was started by a command that recorded its model."""
    model = recorded.get("model")
    return (
        f"resume it with the command that started it and --resume "
        f"(surgeon {command} {model if isinstance(model, str) else 'MODEL'} ... -o {path} --resume)"
    )


def _what_instead(path: Path) -> str:
    """The kind of a folder without a recipe: another one of surgeon, or one that surgeon did not write."""
    if is_surgeon_folder(path / "model"):
        return f"its model is in {path / 'model'}"
    if (path / RUN).is_file():
        return f"its fine-tuning is incomplete: {_resumed(path, 'finetune', _recorded(path / RUN))}"
    if (path / TRIAL).is_file():
        recorded = _recorded(path / TRIAL).get("identity")
        return f"it is an incomplete trial: {_resumed(path, 'try', recorded if isinstance(recorded, dict) else {})}"
    if (path / SEARCH).is_file():
        return f"it is a search: surgeon study export {path} -o FOLDER extracts the best model"
    return f"surgeon did not write this folder: it has no {RECIPE}"
