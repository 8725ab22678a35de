"""The papers' training setups, as files: `training_recipe("adfnet").config()` and `surgeon finetune --recipe adfnet`.

A recipe is a JSON file in this folder (or anywhere): the networks it is for, the task with its options, and the options of the
run, at the scale of the paper. Presets change some of them; several presets can be combined and apply in the given order.
Every recipe has the preset `small`: a smaller network on fewer samples, minutes on a CPU.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.errors import ConfigError, RecipeError
from surgeon.layers.base import DynamicConv2d
from surgeon.models.names import build_model
from surgeon.records.recipe import parse_json, read_text
from surgeon.util.declared import unknown_training_recipe
from surgeon.util.near import did_you_mean
from surgeon.zoo import entry
from surgeon.zoo.finetune import FinetuneConfig
from surgeon.zoo.tasks import create_task

if TYPE_CHECKING:
    from torch import nn

    from surgeon.records.recipe import BaseModel
    from surgeon.zoo.finetune import FinetuneConfig
    from surgeon.zoo.tasks import Task

__all__ = ["Preset", "TrainingRecipe", "recipe_names", "recipes_for", "training_recipe"]

FORMAT = "surgeon-training"
VERSION = 1
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The changes of a preset: `networks` replaces the recipe's, options override its options."""

    summary: str = ""
    networks: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    layer_options: dict[str, Any] = field(default_factory=dict)
    task_options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """One training setup.

    `networks` are names of the zoo; the first is the default. `model` holds options of their factories, `layer_options`
    those of the dynamic layers in networks made by surgery. `train` holds fields of `FinetuneConfig`. `source` is
    the place in the paper, `assumed` lists what the paper leaves open and is chosen here, `data` describes
    the expected folder.
    """

    name: str
    summary: str
    source: str
    assumed: str
    data: str
    networks: tuple[str, ...]
    task: str
    model: dict[str, Any] = field(default_factory=dict)
    layer_options: dict[str, Any] = field(default_factory=dict)
    task_options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    presets: dict[str, Preset] = field(default_factory=dict)

    def with_presets(self, *names: str) -> "TrainingRecipe":
        """The recipe with these presets applied, later ones over earlier ones. Raises `ConfigError` for an unknown one."""
        made = self
        for name in names:
            if name not in self.presets:
                raise ConfigError(
                    f"recipe {self.name} has no preset {name!r}; it has {', '.join(self.presets)}."
                    f"{did_you_mean(name, self.presets)}"
                )
            preset = self.presets[name]
            made = replace(
                made,
                networks=preset.networks or made.networks,
                model=made.model | preset.model,
                layer_options=made.layer_options | preset.layer_options,
                task_options=made.task_options | preset.task_options,
                train=made.train | preset.train,
            )
        return made

    def config(self, model: "nn.Module | None" = None, **given: Any) -> "FinetuneConfig":
        """The options of a run, `given` over the recipe's. Raises `ConfigError`.

        Giving `epochs` or `max_steps` replaces both; giving another schedule drops the recipe's decay.
        For a `model` without PAFU, such as a plain counterpart, the alternation with selectors is dropped unless it was given.
        """
        options = dict(self.train)
        if len({"epochs", "max_steps"} & set(given)) == 1:
            options.pop("max_steps", None)
            options.pop("epochs", None)
        if given.get("sched", options.get("sched")) != options.get("sched"):
            for name in ("decay_rate", "decay_every", "milestones"):
                options.pop(name, None)
        if model is not None and not _has_selectors(model):
            options.pop("alternate", None)
        options |= given
        return FinetuneConfig.from_dict(options)

    def make_task(self, data: str | Path | None = None, *, seed: int = 0, **given: Any) -> "Task":
        """The task, `given` options over the recipe's. Raises `ConfigError`."""
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in (self.task_options | given).items()}
        return create_task(self.task, seed=seed, **(options if data is None else options | {"data": Path(data)}))

    def make_model(
        self,
        network: str | None = None,
        *,
        weights: str = "auto",
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> "tuple[nn.Module, BaseModel | None]":
        """A network and its base model, as from `surgeon.models.names.build_model`; by default the recipe's first.

        The recipe's factory options apply to its own networks, which start with random weights (from `seed`)
        unless `weights` says otherwise. Raises `ModelError`.
        """
        spec = f"zoo/{self.networks[0]}" if network is None else network
        own = spec.removeprefix("zoo/") in self.networks
        if own:
            weights = "random" if weights == "auto" else weights
        made = self._factory_options(spec.removeprefix("zoo/")) if own else {}
        return build_model(spec, weights=weights, seed=seed, options=made | dict(options or {}))

    def _factory_options(self, network: str) -> dict[str, Any]:
        by_surgery = self.layer_options and entry(network).rules
        return self.model | ({"layer_options": self.layer_options} if by_surgery else {})

    @property
    def command(self) -> str:
        """The command that runs the recipe."""
        return f"surgeon finetune --recipe {self.name} --data DIR"


def recipe_names() -> list[str]:
    """Names of the recipes that ship with surgeon, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def training_recipe(name: str | Path) -> TrainingRecipe:
    """A recipe by its name or file. Raises `RecipeError`."""
    path = Path(name)
    if path.suffix == ".json":
        return _read(path)
    known = recipe_names()
    if str(name) not in known:
        raise unknown_training_recipe(str(name), known)
    return _shipped(str(name))


@cache
def _shipped(name: str) -> TrainingRecipe:
    return _read(FOLDER / f"{name}.json")


def recipes_for(network: str) -> list[tuple[TrainingRecipe, str | None]]:
    """The recipes that train a network of the zoo, each with the preset that selects it (None: no preset)."""
    found: list[tuple[TrainingRecipe, str | None]] = []
    for recipe in map(training_recipe, recipe_names()):
        if network in recipe.networks:
            found.append((recipe, None))
        else:
            found += [(recipe, name) for name, preset in recipe.presets.items() if network in preset.networks]
    return found


def _has_selectors(model: "nn.Module") -> bool:
    layers = (module for module in model.modules() if isinstance(module, DynamicConv2d))
    return any(True for layer in layers for _ in layer.selector_parameters())


# --- reading ----------------------------------------------------------------------------------------------------------

_TEXTS = ("summary", "source", "assumed", "data", "task")
_MAPPINGS = ("model", "layer_options", "task_options", "train")


def _read(path: Path) -> TrainingRecipe:
    where = str(path)
    values = parse_json(read_text(path), where)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise RecipeError(f'{where} is no training recipe: it is not a JSON object with "format": "{FORMAT}"')
    if values.get("version") != VERSION:
        raise RecipeError(f"{where}: version must be {VERSION}, got {values.get('version')!r}")
    known = {f.name for f in fields(TrainingRecipe)} - {"name"}
    _check_keys(values, known | {"format", "version"}, where)
    presets = values.get("presets", {})
    if not isinstance(presets, dict):
        raise RecipeError(f"{where}: presets must be a JSON object, got {presets!r}")
    recipe = TrainingRecipe(
        name=path.stem if path.parent == FOLDER else where,
        presets={
            name: Preset(**_parts(preset, f"{where}: preset {name}", ("summary",))) for name, preset in presets.items()
        },
        **_parts({k: v for k, v in values.items() if k not in ("format", "version", "presets")}, where, _TEXTS),
    )
    if not recipe.networks:
        raise RecipeError(f"{where}: networks must name at least one network of the zoo")
    _check_options(recipe, where)
    return recipe


def _parts(values: Any, where: str, texts: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a recipe or a preset, type-checked."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where} must be a JSON object, got {values!r}")
    _check_keys(values, {*texts, *_MAPPINGS, "networks"}, where)
    for key in texts:
        if not isinstance(values.get(key, ""), str) or (len(texts) > 1 and key not in values):
            raise RecipeError(f"{where}: {key} must be a text, got {values.get(key)!r}")
    for key in _MAPPINGS:
        if not isinstance(values.get(key, {}), dict):
            raise RecipeError(f"{where}: {key} must be a JSON object, got {values[key]!r}")
    networks = values.get("networks", [])
    if not isinstance(networks, list) or not all(isinstance(name, str) for name in networks):
        raise RecipeError(f"{where}: networks must be a list of names, got {networks!r}")
    return values | {"networks": tuple(networks)}


def _check_options(recipe: TrainingRecipe, where: str) -> None:
    """Raise `RecipeError` for options unknown to both the run and the task, with and without each preset."""
    for preset in (None, *recipe.presets):
        changed = recipe if preset is None else recipe.with_presets(preset)
        try:
            changed.config()
            changed.make_task()
        except (ConfigError, TypeError) as error:
            raise RecipeError(f"{where}{f', preset {preset}' if preset else ''}: {error}") from error


def _check_keys(values: Iterable[str], known: Iterable[str], where: str) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise RecipeError(f"{where} has no key {', '.join(map(repr, unknown))}; it may have {', '.join(sorted(known))}")
