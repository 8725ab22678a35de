"""The networks of a run: where the model comes from, its copy that is trained, its original, and what their recipes record."""

from dataclasses import dataclass, replace

from torch import nn

from surgeon.errors import ConfigError, ModelError, called
from surgeon.models.names import restore
from surgeon.models.weights import state_sha256
from surgeon.records.collapse_report import CollapseReport
from surgeon.records.preprocessing import tell_timm
from surgeon.records.recipe import BaseModel, Recipe, Trained, get_recipe, set_recipe
from surgeon.records.report import Report
from surgeon.surgery.rewrite import dynamic_layers
from surgeon.util.copying import copy_model, seed_torch
from surgeon.zoo.finetune.config import FinetuneConfig
from surgeon.zoo.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Source:
    """Origin of the model: its name for the record, how to build it, the report of its conversion.

    `trust_factory` allows to run the factory of the original network, and `original_weights` is a file of its weights; by default
    they are looked for where the conversion found them.
    """

    name: str = "model"
    base: BaseModel | None = None
    report: Report | CollapseReport | None = None
    trust_factory: bool = False
    original_weights: str | None = None


def bound_to(model: nn.Module, task: Task) -> tuple[nn.Module, str, list[str]]:
    """A copy that fits the task, the hash of its weights, and a note on those that are new."""
    work = copy_model(model)
    seed_torch(task.seed)  # of a new head
    fitted, given = task.fitted(work)
    bound = with_recipe(fitted, model)
    return bound, state_sha256(bound), [] if given is None else [f"the network was given {given}"]


def original_of(
    work: nn.Module, task: Task, given: nn.Module | None, config: FinetuneConfig, source: Source
) -> tuple[nn.Module | None, list[str]]:
    """The network before its conversion, bound to the task, and a note if it is unavailable.

    Raises `ConfigError` if it is needed as a teacher but unavailable, `ModelError` for weights that were named and do not fit.
    """
    note = None
    original: nn.Module | None = None
    if given is not None:
        original = copy_model(given)
    elif not dynamic_layers(work):
        if config.distill:
            return copy_model(work), []
    else:
        recipe = get_recipe(work)
        if recipe is None:
            if config.distill:
                note = "The network was made with its dynamic layers: it has no original"
        elif recipe.base is None:
            note = "the original network is not known: the model's recipe does not name it"
        else:
            try:
                original = restore(
                    recipe.base,
                    weights=source.original_weights,
                    trust_factory=source.trust_factory,
                    head="weights",  # the task gives it another one
                    flag=called("--original-weights FILE", "") or None,
                )
            except ModelError as error:
                if source.original_weights is not None:
                    raise
                note = f"the original network is unavailable: {error}"
    if original is None:
        if config.distill:
            raise ConfigError(f"distill needs the original network. {note}")
        return None, [] if note is None else [note]
    tell_timm(original, task.preprocessing())  # both see the same images
    seed_torch(task.seed)  # a new head is the same as that of the converted network
    return task.bind(original), []


def with_recipe(model: nn.Module, carrier: nn.Module) -> nn.Module:
    """The model with the recipe of another one."""
    recipe = get_recipe(carrier)
    if recipe is not None:
        set_recipe(model, recipe)
    return model


def earlier_steps(model: nn.Module) -> int:
    """Optimizer steps of a model's trainings by surgeon so far, as far as its recipe records them."""
    recipe = get_recipe(model)
    return 0 if recipe is None or recipe.task is None else recipe.task.steps or 0


def with_task(model: nn.Module, task: Task, size: tuple[int, ...], steps: int) -> nn.Module:
    """The model, with its task, training size and output names in its recipe, and `steps` more optimizer steps."""
    recipe = get_recipe(model) or Recipe(rules=())
    total = earlier_steps(model) + steps
    trained = Trained(name=task.name, options=task.options(), inputs=task.preprocessing(), steps=total)
    classes = task.outputs() or recipe.classes
    sized = size if len(size) == 3 else recipe.input_size
    tell_timm(model, trained.inputs)
    set_recipe(model, replace(recipe, base=at_size(recipe.base, size), input_size=sized, task=trained, classes=classes))
    return model


def at_size(base: BaseModel | None, size: tuple[int, ...]) -> BaseModel | None:
    """The base model, with the size (C, H, W) of the training samples as its input size."""
    return base if base is None or len(size) != 3 else replace(base, input_size=size)
