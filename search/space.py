"""The search space: the possible replacements of each layer, and why others are ruled out. A placement picks one per layer."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgeon.costs.table import KEEP, Option
from surgeon.errors import ConfigError
from surgeon.layers.registry import layer_class, layer_types
from surgeon.records.recipe import Recipe, Rule, quoted, versions
from surgeon.search.placement.problem import Bools, Ints
from surgeon.sites.select import select
from surgeon.sites.sites import find_sites
from surgeon.surgery.plan import nothing_replaced, read_config, why_not
from surgeon.util.files import read_text, told

if TYPE_CHECKING:
    from torch import nn

    from surgeon.records.recipe import BaseModel
    from surgeon.sites.sites import ConvSite

_AXES = {
    "atoms": "atoms",
    "scales": "scales",
    "group_size": "group_sizes",
    "kernel_groups": "kernel_groups",
}  # option: key
_DEPTH = 32  # nesting of lists and mappings
_KEYS = ("types", "atoms", "scales", "group_sizes", "kernel_groups", "layers", "options")


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """A description of a space. Empty values mean the defaults; every combination of a type's values is an option."""

    types: tuple[str, ...] = ()
    atoms: tuple[int, ...] = ()
    scales: tuple[int, ...] = ()
    group_sizes: tuple[int, ...] = ()
    kernel_groups: tuple[int, ...] = ()
    layers: str | None = None  # a selection (surgeon.sites.select); None: all replaceable ones except 1×1
    options: tuple[Option, ...] = ()  # additional options, used as is

    def __post_init__(self) -> None:
        self.make_options()

    def make_options(self) -> tuple[Option, ...]:
        """The options, deduplicated, each validated by its layer type. Raises `ConfigError`."""
        with _naming("types"):
            for kind in self.types:
                layer_class(kind)
        combined = self._combined()
        found = [*combined, *self.options]
        if not found:
            raise ConfigError("the search space has no option: set --types, or omit it for the defaults")
        for option in combined:
            _check_option(option)
        for number, option in enumerate(self.options, 1):
            with _naming(f"option {number}"):
                _check_option(option)
        return tuple({option.label: option for option in found}.values())

    def _combined(self) -> list[Option]:
        given = {option: getattr(self, key) for option, key in _AXES.items()}
        axes = {
            kind: [axis for axis in layer_class(kind).Config.search_axes if axis in given] for kind in layer_types()
        }
        used = {axis for names in axes.values() for axis in names if given[axis]}
        types = self.types or tuple(kind for kind, names in axes.items() if used.intersection(names))
        if not types and self.options:
            return []
        if not types:
            return default_options()
        idle = sorted(used - {axis for kind in types for axis in axes.get(kind, ())})
        if idle:
            raise ConfigError(f"{idle[0].replace('_', ' ')} is an option of none of the types {', '.join(types)}")
        options: list[Option] = []
        for kind in types:
            names = [axis for axis in axes.get(kind, ()) if given[axis]]
            if not names:
                options += default_options(kind)
                continue
            sets: list[dict[str, Any]] = [{}]
            for name in names:
                sets = [one | {name: value} for one in sets for value in given[name]]
            options += [Option(kind, one) for one in sets]
        return options

    @classmethod
    def from_dict(cls, values: Any, where: str = "space") -> "SpaceConfig":
        """From JSON or YAML values: the keys of this class, `options` as a list of {type, options}. Raises `ConfigError`."""
        if not isinstance(values, dict):
            raise ConfigError(f"{where} must be a mapping with some of {', '.join(_KEYS)}, got {told(values)}")
        unknown = sorted(str(key) for key in set(values) - set(_KEYS))
        if unknown:
            raise ConfigError(f"{where} has no key {told(unknown[0])}; it may have {', '.join(_KEYS)}")
        read: dict[str, Any] = {}
        for key, value in values.items():
            if key == "layers":
                read[key] = ",".join(value) if isinstance(value, list) else value
                if not isinstance(read[key], str):
                    raise ConfigError(f"{where}: layers must be a selection such as stage3,stage4, got {told(value)}")
            elif key == "options":
                read[key] = _options(value, where)
            else:
                read[key] = _listed(value, str if key == "types" else int, f"{where}: {key}")
        with _naming(where):
            return cls(**read)

    @classmethod
    def read(cls, path: str | Path) -> "SpaceConfig":
        """Read a YAML or JSON file; raises `ConfigError`."""
        import yaml

        text = read_text(path, ConfigError, "the space")
        try:
            _check_yaml(text)
            values = yaml.safe_load(text)  # JSON is YAML
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())[:300]}") from error
        return cls.from_dict(values, str(path))


def _check_option(option: Option) -> None:
    read_config(layer_class(option.type), Rule(layers="all", type=option.type, options=dict(option.options)))


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put the place, a file or a key, before a `ConfigError`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def default_options(*types: str) -> list[Option]:
    """Options that a search tries by default for the layer types (default: all), as declared by their configs."""
    return [
        Option(kind, dict(one)) for kind in types or layer_types() for one in layer_class(kind).Config.search_defaults
    ]


def _check_yaml(text: str) -> None:
    """Raise `YAMLError` for constructs that make a short text huge or endless to parse: aliases, deep nesting."""
    import yaml

    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        name = type(token).__name__
        if name.startswith(("Flow", "Block")):
            depth += ("Start" in name) - ("End" in name)
        if isinstance(token, yaml.AliasToken):
            raise yaml.YAMLError("it has aliases (*name), which can expand a short text to a huge one")
        if depth > _DEPTH:
            raise yaml.YAMLError("it is nested too deeply")


def _options(value: Any, where: str) -> tuple[Option, ...]:
    if not isinstance(value, list) or not all(
        isinstance(one, dict) and set(one) <= {"type", "options"} and isinstance(one.get("type"), str) for one in value
    ):
        raise ConfigError(f"{where}: options must be a list of {{type, options}}, got {told(value)}")
    return tuple(Option(one["type"], dict(one.get("options") or {})) for one in value)


def _listed(value: Any, kind: type, where: str) -> tuple[Any, ...]:
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, kind) and not isinstance(item, bool) for item in items):
        raise ConfigError(f"{where} must be a list of {'names' if kind is str else 'whole numbers'}, got {told(value)}")
    return tuple(items)


# --- the space of one model ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Space:
    """L replaceable layers, O - 1 options in addition to "keep". `allowed` (L, O); `refused` has the reasons."""

    layers: tuple[str, ...]
    stages: tuple[str | None, ...]
    options: tuple[Option, ...]
    allowed: Bools
    refused: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)  # (layer, option label) → why not
    selection: str | None = None
    papers: Mapping[str, frozenset[str]] = field(default_factory=dict)  # type → where its paper has it; not in the hash

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Labels of all options, "keep" first."""
        return (KEEP, *(option.label for option in self.options))

    @cached_property
    def types(self) -> tuple[str, ...]:
        """Layer type of every option, "keep" first."""
        return (KEEP, *(option.type for option in self.options))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, from which the hash is computed."""
        return {
            "layers": list(self.layers),
            "options": [{"type": option.type, "options": dict(option.options)} for option in self.options],
            "allowed": [[int(j) for j in np.flatnonzero(row)] for row in self.allowed],
        }

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {layer: i for i, layer in enumerate(self.layers)}

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {label: j for j, label in enumerate(self.labels)}

    @cached_property
    def hash(self) -> str:
        """Stable over runs and machines."""
        return _sha(self.to_dict())

    def names(self, placement: Sequence[int] | Ints) -> dict[str, str]:
        """Layer → option label of the replaced layers."""
        self.check(placement)
        return {layer: self.labels[int(j)] for layer, j in zip(self.layers, placement, strict=True) if j}

    def placement(self, chosen: Mapping[str, str]) -> Ints:
        """Inverse of `names`; raises `ConfigError` for an unknown layer or option, or one that is not allowed."""
        result = np.zeros(len(self.layers), dtype=np.int64)
        for layer, label in chosen.items():
            if layer not in self._rows or label not in self._columns:
                what = repr(layer) if layer not in self._rows else repr(label)
                raise ConfigError(f"the search space has no {what}; its options are {', '.join(self.labels)}")
            result[self._rows[layer]] = self._columns[label]
        self.check(result)
        return result

    def check(self, placement: Sequence[int] | Ints) -> None:
        """Raise `ConfigError` unless these are L existing and allowed options."""
        if len(placement) != len(self.layers):
            raise ConfigError(f"a placement names an option for {len(self.layers)} layers, got {len(placement)}")
        chosen = np.asarray(placement)
        if (chosen >= 0).all() and (chosen < len(self.labels)).all() and self.allowed[range(len(chosen)), chosen].all():
            return
        for i, j in enumerate(placement):
            if not 0 <= j < len(self.labels):
                raise ConfigError(f"{self.layers[i]}: there is no option {j}; there are 0 to {len(self.options)}")
            if not self.allowed[i, j]:
                label = self.labels[j]
                raise ConfigError(f"{self.layers[i]} cannot become {label}: {'; '.join(self.why_not(i, int(j)))}")

    def why_not(self, layer: int, option: int) -> tuple[str, ...]:
        """The reasons against an option of a layer."""
        return tuple(self.refused.get((self.layers[layer], self.labels[option]), ()))

    def hash_of(self, placement: Sequence[int] | Ints) -> str:
        """Stable name of a placement: what its layers become, independent of the order and number of the space's options."""
        chosen = {}
        for layer, j in zip(self.layers, placement, strict=True):
            if j:
                option = self.options[int(j) - 1]
                chosen[layer] = [option.type, dict(option.options)]
        return _sha(chosen)[:16]

    def recipe(self, placement: Sequence[int] | Ints, base: "BaseModel | None" = None, seed: int = 0) -> Recipe:
        """The recipe for `surgeon convert --recipe`: one rule per replaced layer."""
        self.check(placement)
        rules = tuple(
            Rule(
                layers=quoted(layer), type=self.options[int(j) - 1].type, options=dict(self.options[int(j) - 1].options)
            )
            for layer, j in zip(self.layers, placement, strict=True)
            if j
        )
        return Recipe(rules=rules, base=base, seed=seed, versions=versions())


def make_space(
    model: "nn.Module", config: SpaceConfig | None = None, *, sites: "Iterable[ConvSite] | None" = None
) -> Space:
    """The space of a model. `sites` are its convolutions if they are already known.

    Raises `SelectionError` for a selection that matches nothing, `NothingReplacedError` if no layer can be replaced.
    """
    config = config or SpaceConfig()
    options = config.make_options()
    convs = list(find_sites(model).convs) if sites is None else list(sites)
    reached = [site for site in convs if site.calls]
    chosen = select(reached, config.layers) if config.layers is not None else [s for s in reached if not s.is_pointwise]
    configs = [
        read_config(layer_class(o.type), Rule(layers="all", type=o.type, options=dict(o.options))) for o in options
    ]
    reasons = {
        site.name: [tuple(why_not(site, layer_class(o.type), c)) for o, c in zip(options, configs, strict=True)]
        for site in chosen
    }
    kept = [site for site in chosen if not all(reasons[site.name])]
    if not kept:
        if not chosen:
            raise ConfigError(
                "the search space is empty: the model has no convolution with k >= 2 that a forward pass reaches"
            )
        raise nothing_replaced([(site, list(dict.fromkeys(sum(reasons[site.name], ())))) for site in chosen])
    allowed = np.array([[True, *(not why for why in reasons[site.name])] for site in kept], dtype=np.bool_)
    refused = {
        (site.name, option.label): why
        for site in chosen
        for option, why in zip(options, reasons[site.name], strict=True)
        if why
    }
    return Space(
        layers=tuple(site.name for site in kept),
        stages=tuple(site.stage for site in kept),
        options=options,
        allowed=allowed,
        refused=refused,
        selection=config.layers,
        papers=_papers(kept, options),
    )


def _papers(sites: Sequence["ConvSite"], options: Sequence[Option]) -> dict[str, frozenset[str]]:
    """Where the papers of the options' types have them; types whose papers name no place are left out."""
    stages = [site.stage for site in sites if site.stage is not None]
    places = {
        "last stage": [site.name for site in sites if stages and site.stage == stages[-1]],
        "first of stages": [site.name for site in sites if site.first_of_stage],
    }
    kinds = {option.type: layer_class(option.type).placed for option in options}
    return {kind: frozenset(places[where]) for kind, where in kinds.items() if where}


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
