"""The main operation: replace selected convolutions of a model by equivalent dynamic layers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from surgeon.errors import (
    ConfigError,
    ModelError,
    SelectionError,
    VerificationError,
)
from surgeon.layers.base import LayerConfig
from surgeon.layers.registry import layer_class, layer_types, type_of
from surgeon.records.recipe import CONVOLUTION, Recipe, Rule, get_recipe, quoted, set_recipe, versions
from surgeon.records.report import Report, growth_notes
from surgeon.sites.select import split_items
from surgeon.sites.sites import find_sites
from surgeon.sites.trace import trace_graph
from surgeon.surgery.blocks import check_pattern, find_blocks
from surgeon.surgery.compare import compare
from surgeon.surgery.inspection import Inspection
from surgeon.surgery.operation import Surgery, count_parameters
from surgeon.surgery.plan import Planned, make_plan
from surgeon.surgery.raised import Raised
from surgeon.surgery.running import outputs
from surgeon.util.copying import check_module, copy_model, eager, uses_compiler, without_compiler
from surgeon.util.near import did_you_mean
from surgeon.util.progress import OnProgress, silent


@eager()
def convert(
    model: nn.Module,
    type: str | LayerConfig | None = None,
    *,
    layers: str | Sequence[str] | Recipe | None = None,
    pattern: str | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
    as_graph: bool = False,
    recipe: Recipe | None = None,
    input_size: Sequence[int] | int | None = None,
    calibration: Any = None,
    seed: int = 0,
    check: bool = True,
    progress: OnProgress | None = None,
    **layer_options: Any,
) -> tuple[nn.Module, Report]:
    """Replace convolutions by dynamic layers without changing the model's function.

    Args:
        type: the layer type, "acda", "pafu" or "sekg", with `layer_options`; or a config such as `ACDAConfig(atoms=2)`.
        layers: which convolutions, in the selector language of `surgeon.sites.select`, or a recipe.
        pattern: "dcb" instead of a type: residual blocks become ADFNet's DCBs (see `surgeon.surgery.blocks`) if `layers` selects
            their first convolution (default: all); `layer_options` are those of "sekg".
        example_inputs: a tensor, a tuple of arguments, a list (one argument) or a dict of keyword arguments. Without it the
            model's own input size is used, or `input_size`: (C, H, W), (H, W) or one number. A given image size is recorded.
        inplace: change the caller's model; otherwise a copy is changed. After an error the model is unchanged.
        as_graph: return a `torch.fx.GraphModule` of the converted model, traced in its current mode.
        recipe: rules that mix types and options, instead of `layers` and `type`.
        calibration: model inputs, like `example_inputs`; compressed layers are fitted to the inputs they get from it.
        check: compare outputs and layers with the original, and check that new parameters get gradients.
        progress: called with a stage's name, the amount done and the total.

    Returns:
        The converted model, and a report that covers every convolution.

    Raises:
        SelectionError, ConfigError: the selection matches nothing, or the type or an option is invalid.
        InputError: the model does not run on the inputs.
        NothingReplacedError: every selected convolution was refused; the message has the reasons.
        VerificationError: the result is not equivalent.
    """
    started = time.perf_counter()
    check_module(model)
    if pattern is not None:
        layers, type, layer_options = _of_pattern(pattern, layers, type, recipe, layer_options)
    order = _read_order(layers, type, recipe, layer_options, seed)
    tell = progress or silent
    was_compiled = uses_compiler(model)
    model = without_compiler(model)
    _is_python(model)
    _has_data(model)
    work = model if inplace else copy_model(model)
    params_before = count_parameters(work)
    functional = Raised(work)
    surgery = None
    try:
        tell("trace", 0, 1)
        sites = functional.described(find_sites(work, example_inputs, input_size, origin=model))
        tell("trace", 1, 1)
        plans = make_plan(sites.convs, order.rules)
        if pattern is not None:
            plans = _in_blocks(plans, find_blocks(work, pattern), pattern)
        surgery = Surgery(work=work, sites=sites, plans=plans, seed=order.seed, tell=tell, earlier=get_recipe(work))
        if inplace and any(plan.site.name == "" for plan in surgery.plans):
            raise ConfigError("the model itself is the selected convolution: it cannot be replaced in place")
        surgery.build(calibration)
        result, verification = surgery.operate(check=check)
        if check and not inplace and _has_functions(model):
            _check_copy(model, surgery)
        if surgery.expected is None:
            functional.keep(surgery.layers)
        else:
            functional.keep_checked(surgery.layers, surgery.expected, sites.seen.inputs, order.seed)
        given = example_inputs is not None or input_size is not None
        _remember(result, order, surgery, sites.seen.inputs.image_size if given else None)
        report = surgery.report(verification)
        report.params_before, report.params_after = params_before, count_parameters(result)
        report.model, report.input_size = model.__class__.__name__, sites.seen.inputs.image_size
        report.notes += [*sites.notes, *growth_notes(report)]
        if was_compiled and not uses_compiler(result):
            report.notes.append("the model was compiled, the converted one is not: call torch.compile on it again")
        if as_graph and not isinstance(result, fx.GraphModule):
            result = _as_graph(result, surgery, check)
    except BaseException:
        if surgery is not None:
            surgery.undo()
        functional.undo()
        raise
    if inplace:
        report.notes.append(_optimizer_note(surgery))
    report.seconds = time.perf_counter() - started
    return result, report


@eager()
def inspect(
    model: nn.Module, example_inputs: Any = None, *, input_size: Sequence[int] | int | None = None
) -> Inspection:
    """Every convolution of a model: names, geometry, stage, shapes, cost, neighbors, and what prevents its replacement.

    The model is not modified. The list prints as a table. Raises `InputError` if it does not run on the inputs.
    """
    check_module(model)
    _is_python(model)
    functional = Raised(model)
    try:
        sites = functional.described(find_sites(model, example_inputs, input_size))
        return Inspection(sites.convs, sites.seen.inputs.image_size)
    finally:
        functional.undo()


_COPY_ERROR = 1e-4  # largest relative difference of a copy's output from the given model's

OPTIMIZER_NOTE = "an optimizer made before this conversion does not know"  # so begins a note of conversions in place


def _optimizer_note(surgery: Surgery) -> str:
    count = sum(len(list(layer.parameters())) for layer in surgery.layers.values())
    return f"{OPTIMIZER_NOTE} {count} parameters of the new layers: recreate it"


def _is_python(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            inside = f"{type(model).__name__} contains a TorchScript module ({name})"
            what = inside if name else "this is a TorchScript module"
            raise ModelError(
                f"{what}, whose convolutions are no modules of Python: give the nn.Module before tracing or scripting"
            )


def _has_data(model: nn.Module) -> None:
    empty = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if empty:
        raise ModelError(
            f"{type(model).__name__} has tensors without data ({', '.join(empty[:3])}: on the meta device, or offloaded): "
            f"load its weights, or take the offloading off (accelerate.hooks.remove_hook_from_module), before it is converted"
        )


# --- the order ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Order:
    rules: tuple[Rule, ...]
    seed: int
    recipe: Recipe | None


_WORDS = ("layers", "type", "recipe")


def _read_order(
    layers: str | Sequence[str] | Recipe | None,
    type: str | LayerConfig | None,
    recipe: Recipe | None,
    options: dict[str, Any],
    seed: int,
) -> _Order:
    if isinstance(layers, Recipe):
        if recipe is not None:
            raise ConfigError("two recipes were given, as layers and as recipe")
        layers, recipe = None, layers
    if recipe is not None:
        if layers is not None or type is not None or options:
            extra = ", ".join(
                [*(["layers"] if layers is not None else []), *(["type"] if type is not None else []), *options]
            )
            raise ConfigError(f"a recipe is complete: leave out {extra}")
        if any(rule.type == CONVOLUTION for rule in recipe.rules):
            raise ConfigError("the recipe is that of a collapsed model: conversion cannot create its convolutions")
        if not recipe.rules:
            raise ConfigError("the recipe has no rules: there is nothing to replace")
        return _Order(rules=recipe.rules, seed=seed or recipe.seed, recipe=recipe)
    if layers is None or type is None:
        missing = "layers" if layers is None else "type"
        near = next(
            (f". {name!r} is none of the arguments.{hint}" for name in options if (hint := did_you_mean(name, _WORDS))),
            "",
        )
        raise ConfigError(f"{missing} is missing: give both layers ('all': what fits) and type, or pass a recipe{near}")
    if isinstance(type, LayerConfig):
        if options:
            raise ConfigError(
                f"the type is a {type.__class__.__name__}, which contains its options: leave out {', '.join(options)}"
            )
        options = type.to_dict()
        type = type_of(type)
    rule = Rule(layers=",".join(split_items(layers)), type=type, options=options)
    return _Order(rules=(rule,), seed=seed, recipe=None)


def _of_pattern(
    pattern: str, layers: Any, type: Any, recipe: Recipe | None, options: dict[str, Any]
) -> tuple[Any, str, dict[str, Any]]:
    """The selection, type and options of a pattern; raises `ConfigError` if these are also given another way."""
    if type is not None or recipe is not None or isinstance(layers, Recipe):
        raise ConfigError(f"the pattern {pattern} determines the type: leave out type and recipe")
    if "mode" in options:
        raise ConfigError(f"the pattern {pattern} says the mode itself: leave it out")
    check_pattern(pattern)
    kind = next(kind for kind in layer_types() if pattern in layer_class(kind).patterns)
    return "all" if layers is None else layers, kind, {**layer_class(kind).patterns[pattern], **options}


def _in_blocks(plans: list[Planned], blocks: dict[str, str], pattern: str) -> list[Planned]:
    """The plans for the convolutions that belong to a pattern."""
    chosen = [plan for plan in plans if plan.site.name in blocks]
    if not chosen:
        raise SelectionError(
            f"the selection contains no first convolution of a residual block; for {pattern} there are {', '.join(blocks)}"
        )
    return chosen


def _has_functions(model: nn.Module) -> bool:
    """Whether modules have hooks or functions of their own, whose variables are not copied with the model."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or any(isinstance(v, FunctionType) for v in vars(module).values())
        for module in model.modules()
    )


def _check_copy(model: nn.Module, surgery: Surgery) -> None:
    """Raise `VerificationError` if the copy that was converted never computed what the given model computes."""
    assert surgery.expected is not None
    found = compare(outputs(model, surgery.sites.seen.inputs, surgery.seed), surgery.expected)
    if found.max_rel > _COPY_ERROR:
        raise VerificationError(
            f"a copy of {type(model).__name__} computes something else (relative error {found.max_rel:.1e}): hooks or "
            "functions set on it hold what is not copied with it. Convert it in place (inplace=True)"
        )


def _remember(result: nn.Module, order: _Order, surgery: Surgery, chosen: tuple[int, ...] | None) -> None:
    """Record the conversion in the model: one rule per layer, after those of earlier conversions, and the chosen image size."""
    earlier = surgery.earlier
    base = order.recipe.base if order.recipe is not None else None
    rules = earlier.rules if earlier is not None else ()
    if base is None and earlier is not None:
        base = earlier.base
    new = tuple(
        Rule(layers=quoted(name), type=layer.type_name, options=layer.config.to_dict())
        for name, layer in surgery.layers.items()
    )
    size = chosen or (earlier.input_size if earlier is not None else ())
    if base is not None and chosen is not None:
        base = replace(base, input_size=chosen)
    made = Recipe(rules=rules + new, base=base, seed=order.seed, versions=versions(), input_size=size)
    if earlier is not None:
        made = replace(made, classes=earlier.classes, task=earlier.task)
    set_recipe(result, made)


def _as_graph(result: nn.Module, surgery: Surgery, check: bool) -> nn.Module:
    graph = trace_graph(result)
    if check:
        inputs = surgery.sites.seen.inputs
        difference = compare(outputs(result, inputs, surgery.seed), outputs(graph, inputs, surgery.seed))
        if difference.max_rel > 1e-6:
            raise VerificationError(
                f"the traced graph is not equivalent to the model (relative error {difference.max_rel:.1e}): "
                f"the model's forward depends on its inputs or mode. Omit as_graph."
            )
    set_recipe(graph, get_recipe(result))
    return graph
