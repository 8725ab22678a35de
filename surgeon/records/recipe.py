"""A recipe describes how a model is made: its base model, and the replacement of each selected convolution.

Recipes are versioned JSON. The same format serves as input (`rules` select by stage, glob, predicate) and as the record of a
conversion (`rules` name single layers, with every option resolved, so that a state dict fits).
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from surgeon.errors import ConfigError, RecipeError, SelectionError
from surgeon.records.providers import providers
from surgeon.util import files
from surgeon.util.outputs import RECIPE

if TYPE_CHECKING:
    from torch import nn

FORMAT = "surgeon-recipe"
VERSION = 2  # 1: options that a rule leaves out are those of the layer's paper

CONVOLUTION = "conv"  # rule type for a plain convolution with another window, left by `revert` or `collapse`

_SOURCES = ("timm", "torchvision", "factory", "program")  # besides the providers
INPUTS: dict[str, Any] = {  # what a task may record of its inputs, and its type
    "input_size": [int],
    "mean": [(int, float)],
    "std": [(int, float)],
    "interpolation": str,
    "crop_pct": (int, float),
    "crop_mode": str,
}
_RULES = 10_000  # per recipe; more than the layers of any network
_KINDS = ("pretrained", "random", "file", "given")
_ATTRIBUTE = "_surgeon_recipe"

_PLAIN_NAME = re.compile(r"[\w.-]*")

T = TypeVar("T")


def quoted(name: str) -> str:
    """A module's name as an item of a selection."""
    return name if _PLAIN_NAME.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def unquoted(item: str) -> str:
    """The name in a quoted item; other items are returned unchanged. Raises `SelectionError` for an incomplete quotation."""
    if not item.startswith('"'):
        return item
    try:
        return str(json.loads(item))
    except json.JSONDecodeError as error:
        raise SelectionError(f"{item} is not a name in double quotes: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Origin of the base model's weights. `sha256` is over the state dict (names, dtypes, shapes, bytes)."""

    kind: str  # "pretrained" | "random" | "file" | "given" (the caller's own model object)
    seed: int | None = None
    path: str | None = None  # the file, or the source of `pretrained`: a hub id, a torchvision weights name
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """How to rebuild the base model: `source` is timm, torchvision, zoo, factory or program.

    `name` is its name in that source; for a program it is the file, in a surgeon folder a file of that folder.
    `input_size` is the (C, H, W) to run it at, or () to let a conversion find one that fits.
    """

    source: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    input_size: tuple[int, ...] = (3, 224, 224)
    weights: Weights


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A selection of layers (see `surgeon.sites.select`) that become one type with these options. Later rules win.

    In the recipe of a collapsed or reverted model, type "conv" is a plain convolution with another `window`.
    """

    layers: str
    type: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The task that a network was fine-tuned on, by its name, and the options that were not its defaults, without the data's.

    `inputs`: how its inputs were made of images, by timm's names (`INPUTS`); empty if that is unknown.
    `steps`: optimizer steps of all its trainings by surgeon, on any task; None in recipes of earlier versions.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict, compare=False)
    steps: int | None = field(default=None, compare=False)


def as_published(rule: Rule) -> Rule:
    """The rule, with the options of the layer's paper for those it leaves out."""
    from surgeon.layers.registry import layer_class  # torch: most of what reads a recipe needs none

    return replace(rule, options={**layer_class(rule.type).Config.paper, **rule.options})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Rules, the base model if known, the seed of the conversion, and the versions it was made with.

    `classes`: names of a fine-tuned classifier's outputs, in order; None if unknown.
    `task`: what the network was fine-tuned on; None if it was not.
    `input_size`: the (C, H, W) chosen for the conversion of a model whose `base` is found only when it is saved; not written.
    """

    rules: tuple[Rule, ...]
    base: BaseModel | None = None
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    task: Trained | None = None
    input_size: tuple[int, ...] = field(default=(), compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, in reading order."""
        base = None
        if self.base is not None:
            base = asdict(self.base)
            base["input_size"] = list(self.base.input_size)
        return {
            "format": FORMAT,
            "version": VERSION,
            "base": base,
            "seed": self.seed,
            "versions": dict(self.versions),
            "rules": [asdict(rule) for rule in self.rules],
            **({} if self.classes is None else {"classes": list(self.classes)}),
            **({} if self.task is None else {"task": _without_empty(asdict(self.task), "inputs", "steps")}),
        }

    def to_json(self) -> str:
        """The text of a recipe file."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, values: Any, where: str = "recipe") -> "Recipe":
        """Inverse of `to_dict`; a handwritten recipe needs only format, version and rules.

        Raises `RecipeError`, with `where`, for a newer version, unknown keys, layer types and options, and wrong types.
        """
        values = _mapping(values, where)
        _check_version(values, where)
        _check_keys(
            values, ("format", "version", "base", "seed", "versions", "rules", "classes", "task", "artefact"), where
        )
        rules = values.get("rules")
        if not isinstance(rules, list):
            raise RecipeError(f"{where}: rules must be a list of {{layers, type, options}}, got {files.told(rules)}")
        if len(rules) > _RULES:
            raise RecipeError(f"{where}: got {len(rules):,} rules, the maximum is {_RULES:,}")
        base = values.get("base")
        return cls(
            rules=tuple(_rule(rule, f"{where}: rule {i}", values["version"]) for i, rule in enumerate(rules, start=1)),
            base=None if base is None else _base(base, f"{where}: base"),
            seed=_typed(values, "seed", int, where, default=0),
            versions=_string_map(values.get("versions", {}), f"{where}: versions"),
            classes=_classes(values.get("classes"), where),
            task=trained(values.get("task"), f"{where}: task"),
        )

    @classmethod
    def from_json(cls, text: str, where: str = "recipe") -> "Recipe":
        """Inverse of `to_json`; raises `RecipeError`."""
        return cls.from_dict(parse_json(text, where), where)

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """Read a recipe file, the recipe of a surgeon folder, or zoo/NAME: the recipe of that network from its plain one.

        Raises `RecipeError`.
        """
        prefix, _, name = str(path).partition("/")
        if name and not Path(path).exists() and prefix in providers():
            rules = providers()[prefix].rules(name)
            return cls(rules=tuple(as_published(rule) for rule in rules))
        path = Path(path)
        if path.is_dir():
            return cls.from_json(read_text(path / RECIPE), str(path / RECIPE)).located(path)
        return cls.from_json(read_text(path), str(path))

    def located(self, folder: Path) -> "Recipe":
        """The recipe of this folder, with its base program's path resolved. Raises `RecipeError` for a path outside the folder."""
        if self.base is None or self.base.source != "program":
            return self
        return replace(self, base=replace(self.base, name=str(files.inside(folder, self.base.name, RecipeError))))


def parse_json(text: str, where: str) -> Any:
    """The JSON values of a string; raises `RecipeError` with the line of an error."""
    return files.parse_json(text, where, RecipeError)


def read_text(path: Path) -> str:
    """The text of a recipe file; raises `RecipeError`."""
    return files.read_text(path, RecipeError, "the recipe")


def versions() -> dict[str, str]:
    """Versions of a conversion's dependencies: surgeon, torch, torchvision, timm, python."""
    import surgeon  # it offers Recipe itself

    found = {"surgeon": surgeon.__version__}
    found |= {name: _installed(name) for name in ("torch", "torchvision", "timm")}
    found["python"] = sys.version.split()[0]
    return found


@cache
def _installed(name: str) -> str:
    """The version of a package, which takes milliseconds to read."""
    from importlib.metadata import PackageNotFoundError, version  # which would slow every --help down

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def get_recipe(model: "nn.Module") -> Recipe | None:
    """The recipe attached to a converted model; None for a model that was never converted."""
    found = _attributes(model).get(_ATTRIBUTE)
    return found if isinstance(found, Recipe) else None


def set_recipe(model: "nn.Module", recipe: Recipe | None) -> None:
    """Attach a recipe to the model; None removes it."""
    if recipe is not None:
        _attributes(model)[_ATTRIBUTE] = recipe
    else:
        _attributes(model).pop(_ATTRIBUTE, None)


def _attributes(model: "nn.Module") -> dict[str, Any]:
    """Storage that copies of a model keep: a graph's copies keep only what it computes with, and its `meta`."""
    from torch import fx

    return model.meta if isinstance(model, fx.GraphModule) else vars(model)


# --- reading ------------------------------------------------------------------------------------------------------


def _check_version(values: Mapping[str, Any], where: str) -> None:
    if values.get("format") != FORMAT:
        raise RecipeError(f'{where}: format must be "{FORMAT}", got {files.told(values.get("format"))}')
    found = values.get("version")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise RecipeError(f"{where}: version must be a positive integer, got {files.told(found)}")
    if found > VERSION:
        raise RecipeError(
            f"{where} has version {found}, newer than version {VERSION} that this surgeon "
            f"({versions()['surgeon']}) reads. Install a newer surgeon."
        )


def _rule(values: Any, where: str, version: int) -> Rule:
    from surgeon.layers.registry import layer_class  # torch: most of what reads a recipe needs none

    values = _mapping(values, where)
    _check_keys(values, ("layers", "type", "options"), where)
    layers = values.get("layers")
    if isinstance(layers, list) and layers and all(isinstance(item, str) for item in layers):
        layers = ",".join(layers)
    if not isinstance(layers, str) or not layers.strip():
        raise RecipeError(f'{where}: layers must be a selection such as "stage3,stage4", got {files.told(layers)}')
    kind = _typed(values, "type", str, where)
    options = _mapping(values.get("options", {}), f"{where}: options")
    if kind == CONVOLUTION:
        _check_window(options, f"{where} ({layers})")
        return Rule(layers=layers, type=kind, options=options)
    try:
        layer_class(kind).Config.from_dict(options)
    except (ConfigError, TypeError) as error:
        raise RecipeError(f"{where} ({layers}): {error}") from error
    rule = Rule(layers=layers, type=kind, options=options)
    return as_published(rule) if version == 1 else rule


def _check_window(options: Mapping[str, Any], where: str) -> None:
    _check_keys(options, ("window",), f"{where}: options")
    window = options.get("window")
    if not isinstance(window, list) or len(window) != 2 or not all(type(n) is int and 0 < n < 256 for n in window):
        raise RecipeError(f"{where}: window must be a kernel size [height, width], got {files.told(window)}")


def _base(values: Any, where: str) -> BaseModel:
    values = _mapping(values, where)
    _check_keys(values, ("source", "name", "kwargs", "input_size", "weights"), where)
    size = values.get("input_size", [3, 224, 224])
    if not isinstance(size, list) or not all(type(n) is int and n > 0 for n in size):
        raise RecipeError(f"{where}: input_size must be a list of positive integers, got {files.told(size)}")
    known = _SOURCES if values.get("source") in _SOURCES else (*_SOURCES, *providers())  # which import much
    return BaseModel(
        source=_one_of(values, "source", known, where),
        name=_typed(values, "name", str, where),
        kwargs=_mapping(values.get("kwargs", {}), f"{where}: kwargs"),
        input_size=tuple(size),
        weights=_weights(values.get("weights"), f"{where}: weights"),
    )


def _weights(values: Any, where: str) -> Weights:
    values = _mapping(values, where)
    _check_keys(values, ("kind", "seed", "path", "sha256"), where)
    return Weights(
        kind=_one_of(values, "kind", _KINDS, where),
        seed=None if values.get("seed") is None else _typed(values, "seed", int, where),
        path=None if values.get("path") is None else _typed(values, "path", str, where),
        sha256=None if values.get("sha256") is None else _typed(values, "sha256", str, where),
    )


def _classes(values: Any, where: str) -> tuple[str, ...] | None:
    if values is None:
        return None
    files.check_fields(values, [str], f"{where}: classes", RecipeError)
    if not values or len(set(values)) != len(values):
        raise RecipeError(f"{where}: classes must be different names, got {files.told(values)}")
    return tuple(values)


def trained(values: Any, where: str) -> Trained | None:
    """The task in a recipe, None if there is none. Raises `RecipeError`."""
    if values is None:
        return None
    values = _mapping(values, where)
    _check_keys(values, ("name", "options", "inputs", "steps"), where)
    options = _mapping(values.get("options", {}), f"{where}: options")
    name = _typed(values, "name", str, where)
    inputs = _inputs(values.get("inputs", {}), where, options)
    steps = _typed(values, "steps", int, where) if "steps" in values else None
    return Trained(name=name, options=_with_tuples(options), inputs=inputs, steps=steps)


def _inputs(values: Any, where: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """How inputs are made of images; earlier versions recorded only what the options said."""
    known = {key: options[key] for key in INPUTS if key != "input_size" and options.get(key) is not None}
    values = _mapping(values, f"{where}: inputs") or known
    _check_keys(values, tuple(INPUTS), f"{where}: inputs")
    files.check_fields(values, {key: INPUTS[key] for key in values}, f"{where}: inputs", RecipeError)
    if len(values.get("input_size", (1, 1, 1))) != 3:
        raise RecipeError(f"{where}: inputs: input_size must be [C, H, W], got {files.told(values['input_size'])}")
    return _with_tuples(values)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _without_empty(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in keys or value}


def _mapping(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise RecipeError(f"{where} must be a JSON object, got {files.told(values)}")
    return values


def _string_map(values: Any, where: str) -> dict[str, str]:
    values = _mapping(values, where)
    return {key: _typed(values, key, str, where) for key in values}


def _check_keys(values: Iterable[str], known: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RecipeError(f"{where} has no key {', '.join(map(repr, unknown))}; it may have {', '.join(known)}")


def _typed(values: Mapping[str, Any], key: str, kind: type[T], where: str, default: T | None = None) -> T:
    value = values.get(key, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RecipeError(f"{where}: {key} must be of type {kind.__name__}, got {files.told(value)}")
    return value


def _one_of(values: Mapping[str, Any], key: str, allowed: tuple[str, ...], where: str) -> str:
    value = values.get(key)
    if value not in allowed:
        raise RecipeError(f"{where}: {key} must be one of {', '.join(allowed)}, got {files.told(value)}")
    return str(value)
