"""Converted models on disk: a folder with recipe.json, model.safetensors, README.md, report.json and report.txt.

If the base model is an exported program, its file is stored there, too. README.md is for readers and the Hub: it is never read
back and may be edited.

No pickles, and no code from the folder runs on loading. A folder appears under its name only once it is complete.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from surgeon.errors import CheckpointError, RecipeError, SurgeonError, called
from surgeon.layers.base import DynamicConv2d, LayerConfig
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.registry import layer_class
from surgeon.layers.source import ConvSource
from surgeon.models.folder import check_file, file_sha256, fresh_folder, write
from surgeon.models.identify import agree, identify
from surgeon.models.names import as_made, build_structure, factory_base
from surgeon.models.places import check_folder
from surgeon.models.programs import FILE as PROGRAM
from surgeon.models.weights import mismatches, told_mismatches
from surgeon.records.card import FILE as CARD
from surgeon.records.card import model_card
from surgeon.records.collapse_report import CollapseReport, read
from surgeon.records.preprocessing import recorded_inputs, tell_timm
from surgeon.records.recipe import (
    CONVOLUTION,
    BaseModel,
    Recipe,
    Rule,
    get_recipe,
    quoted,
    set_recipe,
    unquoted,
    versions,
)
from surgeon.records.report import Report
from surgeon.surgery.raised import Raised
from surgeon.surgery.rewrite import Rewrite, convolution_rule, dynamic_layers, folded_from, folded_windows
from surgeon.surgery.sizes import check_layers
from surgeon.util.copying import check_module, copy_model
from surgeon.util.files import check_fields, here, parse_json, read_json, read_object, told
from surgeon.util.outputs import RECIPE, WEIGHTS, check_output

logger = logging.getLogger(__name__)

REPORT = "report.json"
TEXT = "report.txt"


def save(
    model: nn.Module,
    path: str | Path,
    *,
    report: Report | CollapseReport | None = None,
    base: BaseModel | None = None,
    factory: str | None = None,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
    scores: Mapping[str, float] | None = None,
) -> None:
    """Write a model, converted or not, to the folder `path`.

    `base` describes how to build the base model; by default the model's recipe or else the model itself knows. If it is
    unknown (a custom class), a warning is logged, and `load` will need `base=`, unless `factory` names the function or class
    `module:NAME` that builds it, with the arguments `options`; it is called to check that. An existing folder is an error
    unless `force`, which replaces it only if surgeon wrote it, and only once the new one is complete. `scores`, metrics on
    the task that the model was fine-tuned on, go into its card. Raises `CheckpointError`, and `ModelError` for a factory that
    cannot be called.
    """
    check_module(model)
    path = Path(path).absolute()
    check_output(path, force=force)
    if factory is not None:
        base = _made_by(factory, options, model, base)
    recipe = describe(model, base, path)
    tensors, aliases = _tensors(model)
    with fresh_folder(path, force) as folder:
        # one entry: safetensors writes several in any order, and equal weights would make unequal files
        save_file(tensors, folder / WEIGHTS, metadata={"aliases": json.dumps(aliases)} if aliases else {"format": "pt"})
        recipe = _with_program(recipe, folder)
        artefact = {
            "files": {
                file.name: {"sha256": file_sha256(file), "bytes": file.stat().st_size} for file in folder.iterdir()
            },
            "static": [name for name, layer in dynamic_layers(model).items() if not layer.adaptive],
        }
        if recipe.base is None or recipe.base.source == "factory":
            artefact["convolutions"] = _settings(model)
        values = recipe.to_dict() | {"artefact": artefact}
        write(folder / RECIPE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        (folder / WEIGHTS).chmod((folder / RECIPE).stat().st_mode)
        write(folder / CARD, model_card(recipe, report, scores))
        if report is not None:
            write(folder / REPORT, report.to_json())
            write(folder / TEXT, report.to_text())


def load(
    path: str | Path,
    *,
    base: nn.Module | None = None,
    device: str | torch.device = "cpu",
    trust_factory: bool = False,
) -> nn.Module:
    """Load a folder written by `save`; the model is in eval mode, on `device`.

    Needs no network. `base` is a model of the original architecture (its weights do not matter; it is not modified) for
    folders whose recipe cannot build it. Raises `CheckpointError` for damaged files, `RecipeError` for an invalid
    recipe, `ModelError` for a base model that cannot be built.
    """
    path = Path(path)
    recipe, artefact = read_folder(path)
    model = _structure(recipe, base, path, trust_factory).eval()  # as convolutions are read when they are replaced
    try:
        model = apply_rules(model, recipe.rules, str(path))
        _fill(model, path / WEIGHTS)
        _check_settings(model, artefact.get("convolutions", {}), path)
    except (RecipeError, CheckpointError) as error:
        if base is not None or recipe.base is None or recipe.base.source != "factory":
            raise
        told = f"the factory {recipe.base.name} may build another network than when the folder was written"
        raise type(error)(f"{error} ({told})") from error
    static = artefact.get("static", [])
    check_fields(static, [str], f"{path / RECIPE}: artefact: static")
    for name in static:
        layer = _submodule(model, name, str(path))
        if not isinstance(layer, DynamicConv2d):
            raise CheckpointError(f"{path / RECIPE}: artefact: static: {name} is not a dynamic layer")
        layer.adaptive = False
    set_recipe(model, recipe)
    tell_timm(model, recorded_inputs(recipe))
    return model.eval().to(device)


def read_folder(path: Path) -> tuple[Recipe, dict[str, Any]]:
    """Recipe of a surgeon folder and its record of the files, which are verified. Raises `CheckpointError`, `RecipeError`."""
    check_folder(path)
    values = read_json(path / RECIPE, RecipeError, "the recipe")
    recipe = Recipe.from_dict(values, str(path / RECIPE)).located(path)
    artefact = values.get("artefact")
    if not isinstance(artefact, dict):
        raise CheckpointError(f"{path / RECIPE} is a recipe, but not that of a saved model: it has no artefact section")
    check_file(path / WEIGHTS, artefact)
    if recipe.base is not None and recipe.base.source == "program":
        check_file(path / Path(recipe.base.name).name, artefact)
    return recipe, artefact


def read_report(path: str | Path) -> Report | CollapseReport | None:
    """The report in a surgeon folder, of a conversion or a collapse; None if it has none."""
    file = Path(path) / REPORT
    if not file.is_file():
        return None
    return read(read_object(file))


def _made_by(factory: str, options: Mapping[str, Any] | None, model: nn.Module, base: BaseModel | None) -> BaseModel:
    """The base model that a factory builds, with the SHA-256 of its weights if those are what `model` was converted with.

    Raises `CheckpointError` unless it has the layers of `model`, and weights of the same names and shapes.
    """
    if base is not None:
        raise CheckpointError("base and factory both say how the base model is built: give one of them")
    carried = get_recipe(model)
    made = factory_base(factory, options)
    if carried is not None and carried.input_size:
        made = replace(made, input_size=carried.input_size)
    network, own = as_made(made)
    rules, tensors = _rules(model), _own_tensors(model)
    rebuilt = apply_rules(network, rules, factory)
    if problems := mismatches(tensors, rebuilt):
        raise CheckpointError(
            f"{factory} builds another network than this {type(model).__name__}: {told_mismatches(problems)}"
        )
    replaced = tuple(f"{unquoted(rule.layers)}." for rule in rules)
    kept = {name: value for name, value in tensors.items() if not name.startswith(replaced)}
    found = _own_tensors(rebuilt)
    known = any(value.dim() > 1 for value in kept.values())  # biases and statistics may be zero in any network
    return own if known and all(torch.equal(value.cpu(), found[name].cpu()) for name, value in kept.items()) else made


def _rules(model: nn.Module) -> tuple[Rule, ...]:
    """A rule for each dynamic layer, and for each convolution folded to another window."""
    dynamic = (
        Rule(layers=quoted(name), type=layer.type_name, options=layer.config.to_dict())
        for name, layer in dynamic_layers(model).items()
    )
    return (*dynamic, *(convolution_rule(name, window) for name, window in folded_windows(model).items()))


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def describe(model: nn.Module, base: BaseModel | None, path: Path) -> Recipe:
    """The current recipe of a model. A warning, naming the folder `path`, says what it does not describe."""
    carried, rules = get_recipe(model), _rules(model)
    known = base or (carried.base if carried is not None else None)
    found = known if known is not None and _fits(model, known, rules) else identify(model)
    if found is not None and known is not None:
        found = replace(found, weights=known.weights, input_size=known.input_size)
    elif found is not None and carried is not None and carried.input_size:
        found = replace(found, input_size=carried.input_size)
    if found is None or not _fits(model, found, rules):
        logger.warning(
            "%s: no way to rebuild this %s is known: the folder loads only %swith base=MODEL, a model of the original "
            "architecture, and no command can use it. %s",
            here(path),
            type(model).__name__,
            called("in Python, ", ""),
            _how_to_rebuild(model),
        )
        found = None
    if hooked := _with_hooks(model):
        logger.warning(
            "%s: forward hooks are not saved: what it loads computes without those of %s", here(path), ", ".join(hooked)
        )
    made = Recipe(rules=rules, base=found, versions=versions())
    if carried is None:
        return made
    return replace(made, seed=carried.seed, classes=carried.classes, task=carried.task)


def _how_to_rebuild(model: nn.Module) -> str:
    inner = dict(model.named_children())
    if inner.keys() == {"module"}:  # as torch's AveragedModel and DistributedDataParallel
        return f"It wraps a {type(inner['module']).__name__}: save its .module instead"
    return "surgeon.save(..., factory='module:NAME') records the function or class that builds it"


def apply_rules(model: nn.Module, rules: tuple[Rule, ...], where: str) -> nn.Module:
    """Put uninitialized dynamic layers, shaped by the rules' options, in the places named by the rules.

    Returns the model, another object only if the model itself is replaced. Raises `RecipeError`.
    """
    layers: dict[str, nn.Module] = {}
    Raised(model, {unquoted(rule.layers) for rule in rules})
    check_layers(_wanted(model, rules))
    for rule in rules:
        name = unquoted(rule.layers)
        old = _submodule(model, name, where)
        if rule.type == CONVOLUTION:
            layers[name] = _folded(old, rule, where)
            continue
        cls = layer_class(rule.type)
        config = cls.Config.from_dict(rule.options)
        if isinstance(old, DynamicConv2d):
            if type(old) is not cls or old.config != config:
                raise RecipeError(
                    f"{where}: {rule.layers} is a {old.type_name} layer with other options in the base model"
                )
            continue
        try:
            layers[name] = cls(ConvSource.read(old).geometry, config)
        except SurgeonError as error:
            raise RecipeError(f"{where}: {rule.layers} cannot become {rule.type}: {error}") from error
    return Rewrite(model, layers).apply()


def _wanted(
    model: nn.Module, rules: tuple[Rule, ...]
) -> Iterator[tuple[type[DynamicConv2d], ConvGeometry, LayerConfig]]:
    for rule in rules:
        with contextlib.suppress(AttributeError, SurgeonError):  # reported when it is built
            cls = layer_class(rule.type)
            yield cls, ConvSource.read(model.get_submodule(rule.layers)).geometry, cls.Config.from_dict(rule.options)


def _folded(old: nn.Module, rule: Rule, where: str) -> nn.Module:
    height, width = rule.options["window"]
    try:
        return folded_from(old, (height, width))
    except SurgeonError as error:
        raise RecipeError(f"{where}: {rule.layers} cannot become a {height}x{width} convolution: {error}") from error


# --- the model ----------------------------------------------------------------------------------------------------


def _submodule(model: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise RecipeError(f"{where}: the base model {type(model).__name__} has no layer {name!r}") from error


def _fits(model: nn.Module, base: BaseModel, rules: tuple[Rule, ...]) -> bool:
    """Whether base and rules rebuild a model that can load this one's state dict. Factories are trusted: they are code."""
    if base.source == "factory":
        return True
    try:
        rebuilt = apply_rules(build_structure(base), rules, base.name)
    except SurgeonError:
        return False
    same = agree(model, rebuilt) if base.source != "program" else _kinds(rebuilt) == _kinds(model)
    return same and not mismatches(_own_tensors(model), rebuilt)


def _with_hooks(model: nn.Module) -> list[str]:
    """Names of the modules with forward hooks that their library has not set."""
    libraries = ("torch", "timm", "torchvision", "surgeon")
    return [
        name or "the model itself"
        for name, module in model.named_modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if (getattr(hook, "__module__", None) or "").partition(".")[0] not in libraries
    ]


def _kinds(model: nn.Module) -> dict[str, tuple[type[nn.Module], str]]:
    """Class of every module, and the settings of convolutions, which shapes do not determine."""
    return {
        name: (
            fx.GraphModule if isinstance(module, fx.GraphModule) else type(module),
            module.extra_repr() if isinstance(module, nn.Conv2d) else "",
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


_SETTINGS = ("stride", "padding", "dilation", "padding_mode")


def _settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Settings of every convolution that do not show in the shapes of its weights, in JSON's types."""
    sources = {
        name: getattr(module, "geometry", module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (nn.Conv2d, DynamicConv2d))
    }
    found = {name: {key: getattr(source, key) for key in _SETTINGS} for name, source in sources.items()}
    settings: dict[str, dict[str, Any]] = json.loads(json.dumps(found))
    return settings


def _check_settings(model: nn.Module, saved: Any, path: Path) -> None:
    """A base model from elsewhere may have the right shapes, and other strides; raises `CheckpointError`."""
    check_fields(saved, {"*": {"*": object}}, f"{path / RECIPE}: artefact: convolutions")
    for name, own in _settings(model).items():
        for key, value in own.items():
            if key in (known := saved.get(name, {})) and known[key] != value:
                raise CheckpointError(
                    f"{path}: {name} has {key} {value} in the base model, and {known[key]} in the model that was saved"
                )


def _with_program(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe for a folder; a base model that is a program is copied into the folder, since nothing can rebuild it."""
    if recipe.base is None or recipe.base.source != "program":
        return recipe
    try:
        shutil.copyfile(recipe.base.name, folder / PROGRAM)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"the program {recipe.base.name} of the base model is gone: it is part of the folder"
        ) from error
    return replace(recipe, base=replace(recipe.base, name=PROGRAM))


def _structure(recipe: Recipe, base: nn.Module | None, path: Path, trust_factory: bool) -> nn.Module:
    if base is not None:
        return copy_model(base)
    if recipe.base is None:
        again = "surgeon.save(model, NEW, factory='module:NAME')"
        raise CheckpointError(
            f"{path} does not record how to build its base model: load it with "
            f"{called(f'model = surgeon.load({str(path)!r}, base=MODEL) in Python, and for the commands ', 'base=MODEL; ')}"
            f"{again} records the function or class that builds MODEL"
        )
    return build_structure(recipe.base, trust_factory=trust_factory)


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in the form required by safetensors (contiguous, no shared memory), and the names that share a tensor."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name} in the state dict is a {type(value).__name__}; only tensors can be saved")
        kind = _unsavable(value)
        if kind:
            raise CheckpointError(
                f"{name} in the state dict is {kind}; a surgeon folder can store only ordinary, dense tensors with data"
            )
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        value = value.detach().to("cpu")
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        tensors[name] = value if whole else value.clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _unsavable(value: Tensor) -> str:
    """The reason why safetensors cannot store a tensor; empty if it can."""
    made: Any = value
    if is_traceable_wrapper_subclass(made):
        return f"a {type(made).__name__}, a tensor composed of others (quantized or distributed)"
    if value.is_quantized or value.is_nested or value.layout != torch.strided:
        return f"quantized, nested or sparse ({value.layout}, {value.dtype})"
    return "on the meta device" if value.is_meta else ""


def _fill(model: nn.Module, file: Path) -> None:
    """Load the weights strictly; the model takes over their dtypes."""
    try:
        state = load_file(file)
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("aliases", "{}")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    aliases = parse_json(text, f"{file}: aliases", CheckpointError)
    check_fields(aliases, {"*": str}, f"{file}: aliases")
    unknown = [other for other in aliases.values() if other not in state]
    if unknown:
        raise CheckpointError(f"{file}: aliases: there is no tensor {told(unknown[0])}")
    state |= {name: state[other] for name, other in aliases.items()}
    problems = mismatches(state, model)
    if problems:
        raise CheckpointError(f"{file} does not fit the model of its recipe: {told_mismatches(problems)}")
    floats = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(floats) == 1:
        model.to(floats.pop())  # also converts buffers that are not in the state dict
    own = model.state_dict(keep_vars=True)  # by the names that the model's own hooks give
    for name, value in state.items():
        if own[name].dtype != value.dtype:
            own[name].data = own[name].data.to(value.dtype)
    model.load_state_dict(state)
