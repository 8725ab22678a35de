"""Identify how to build a model given as an object."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from surgeon.errors import ModelError
from surgeon.layers.base import DynamicConv2d
from surgeon.models.names import build_shapes
from surgeon.models.sources import torchvision_size
from surgeon.models.weights import state_sha256
from surgeon.records.providers import providers
from surgeon.records.recipe import BaseModel, Weights
from surgeon.surgery.rewrite import folded_window

_IGNORED = {"training", "pretrained_cfg", "default_cfg", "feature_info", "grad_checkpointing"}
_AUXILIARY = {
    "aux_loss": "aux_classifier",
    "aux_logits": "aux_logits",
}  # torchvision's options, and where a model shows them


def identify(model: nn.Module) -> BaseModel | None:
    """How to build the architecture of a timm, torchvision or zoo model; None unless it is certain.

    Every candidate is built and compared: names, shapes, module classes and all plain attributes must agree. Layers already
    replaced are not compared. The weights are recorded as given, with their SHA-256.
    """
    for base in _candidates(model):
        try:
            twin = build_shapes(base)
        except ModelError:
            continue
        if agree(model, twin):
            converted = any(_is_replaced(module) for module in model.modules())
            weights = Weights(kind="given", sha256=None if converted else state_sha256(model))
            return BaseModel(
                source=base.source, name=base.name, kwargs=base.kwargs, input_size=base.input_size, weights=weights
            )
    return None


def _candidates(model: nn.Module) -> Iterator[BaseModel]:
    unset = Weights(kind="given")
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict) and cfg.get("architecture"):
        name = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else str(cfg["architecture"])
        size = tuple(cfg.get("input_size", (3, 224, 224)))
        classes = {"num_classes": model.num_classes} if isinstance(getattr(model, "num_classes", None), int) else {}
        channels = _first_channels(model)
        chosen = {"in_chans": channels} if channels not in (None, size[0]) else {}
        shape = (channels or size[0], *size[1:])
        features = _features_only(model)
        known = (prefix for prefix, provider in providers().items() if cfg["architecture"] in provider.names())
        source = next(known, "timm")
        for full in dict.fromkeys((name, str(cfg["architecture"]))):
            for kwargs in (classes | chosen, chosen, features | chosen):
                yield BaseModel(source=source, name=full, kwargs=kwargs, input_size=shape, weights=unset)
    home = type(model).__module__
    if home.startswith("torchvision.models"):
        yield from _torchvision_candidates(model, unset)
    for prefix, provider in providers().items():
        for name in provider.made_in(home):
            options = provider.options(name, model)
            for kwargs in (options, {}) if options else ({},):
                size = provider.input_size(name)
                yield BaseModel(source=prefix, name=name, kwargs=kwargs, input_size=size, weights=unset)


def _features_only(model: nn.Module) -> dict[str, Any]:
    """timm's options of a model that returns feature maps instead of classes."""
    info: Any = getattr(model, "feature_info", None)
    if not type(model).__name__.startswith("Feature") or not hasattr(info, "out_indices"):
        return {}
    return {"features_only": True, "out_indices": list(info.out_indices)}


def _torchvision_candidates(model: nn.Module, unset: Weights) -> Iterator[BaseModel]:
    from torchvision import models

    def base(name: str, kwargs: dict[str, Any]) -> BaseModel:
        return BaseModel(
            source="torchvision", name=name, kwargs=kwargs, input_size=torchvision_size(name), weights=unset
        )

    heads = {key: bool(getattr(model, mark)) for key, mark in _AUXILIARY.items() if hasattr(model, mark)}
    own = _module_names(model)
    names = [name for name in _torchvision_names(model) if _module_names(build_shapes(base(name, heads))) == own]
    for name in names:
        yield base(name, {})
        for member in models.get_model_weights(name):
            yield base(name, {"weights": member.name})
    for name in names:
        parameters = signature(models.get_model_builder(name)).parameters
        backbone = getattr(parameters.get("weights_backbone"), "default", None)
        counts = {"num_classes": 2} | {key: 2 for key in ("num_keypoints",) if key in parameters}
        solved = {key: _solve(model, base(name, counts | heads), key) for key in counts}
        for structure in [{}, *([{"weights_backbone": backbone.name}] if backbone is not None else [])]:
            yield base(name, {key: value for key, value in solved.items() if value} | heads | structure)


def _torchvision_names(model: nn.Module) -> list[str]:
    """The names whose builder's module defines the model's class, then those where it is imported (SSD in ssdlite's)."""
    from torchvision import models

    kind = type(model)
    homes = {name: models.get_model_builder(name).__module__ for name in models.list_models()}
    names = [name for name, home in homes.items() if getattr(sys.modules[home], kind.__name__, None) is kind]
    return sorted(names, key=lambda name: homes[name] != kind.__module__)


def _module_names(model: nn.Module) -> list[str]:
    """The names of all modules, without the parts of replaced ones."""
    within = tuple(f"{name}." for name, module in model.named_modules() if _is_replaced(module))
    return [name for name, _ in model.named_modules() if not name.startswith(within)]


def _solve(model: nn.Module, base: BaseModel, count: str) -> int | None:
    """The value of an option that counts (classes), from the sizes that grow with it; None if they contradict each other.

    Sizes are linear in it (anchors x classes + a constant), so that two twins determine them.
    """
    low = int(base.kwargs[count])
    try:
        first, second = (_sizes(build_shapes(replace(base, kwargs=base.kwargs | {count: n}))) for n in (low, low + 1))
    except ModelError:
        return None
    own = _sizes(model)
    grown = [key for key in first if key in own and first[key] != second.get(key)]
    values = {low + (own[key] - first[key]) / (second[key] - first[key]) for key in grown if key in second}
    value = values.pop() if len(values) == 1 else 0
    return int(value) if value >= 1 and value == int(value) else None


def _sizes(model: nn.Module) -> dict[tuple[str, str, int], int]:
    """Every dimension of the parameters and buffers; of convolutions, also replaced ones, the channels instead."""
    found: dict[tuple[str, str, int], int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | DynamicConv2d):
            found |= {(name, "channels", 0): module.out_channels, (name, "channels", 1): module.in_channels}
        else:
            found |= {(name, key, axis): n for key, shape in _shapes(module) for axis, n in enumerate(shape)}
    return found


def _first_channels(model: nn.Module) -> int | None:
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d | DynamicConv2d)), None)


def agree(model: nn.Module, twin: nn.Module) -> bool:
    """Whether both have the same module tree: classes, plain attributes, own functions, shapes of parameters and buffers."""
    if _is_replaced(model):
        return True
    if type(model) is not type(twin):
        return False
    if _shapes(model) != _shapes(twin) or _attributes(model) != _attributes(twin):
        return False
    mine, other = dict(model.named_children()), dict(twin.named_children())
    if list(mine) != list(other):
        return False
    return all(agree(mine[name], other[name]) for name in mine)


def _is_replaced(module: nn.Module) -> bool:
    return isinstance(module, DynamicConv2d) or folded_window(module) is not None


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, tuple(value.shape)) for name, value in own]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes, and where functions that belong to this object alone, such as another `forward`, are defined."""
    plain = (bool, int, float, str, type(None))
    found: dict[str, Any] = {}
    for key, value in vars(module).items():
        if isinstance(value, FunctionType | MethodType):
            found[key] = (value.__module__, value.__qualname__)
        elif (
            not key.startswith("_")
            and key not in _IGNORED
            and (isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value)))
        ):
            found[key] = value
    return found
