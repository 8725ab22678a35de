"""Identify how to build a model given as an object."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from surgeon.errors import ModelError
from surgeon.layers.base import DynamicConv2d
from surgeon.models.names import build_shapes, torchvision_size
from surgeon.models.weights import state_sha256
from surgeon.records.providers import providers
from surgeon.records.recipe import BaseModel, Weights
from surgeon.surgery.rewrite import folded_window

_IGNORED = {"training", "pretrained_cfg", "default_cfg", "feature_info", "grad_checkpointing"}


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
        if _agree(model, twin):
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
        yield from _torchvision_candidates(model, home, unset)
    for prefix, provider in providers().items():
        for name in provider.made_in(home):
            yield BaseModel(source=prefix, name=name, input_size=provider.input_size(name), weights=unset)


def _features_only(model: nn.Module) -> dict[str, Any]:
    """timm's options of a model that returns feature maps instead of classes."""
    info: Any = getattr(model, "feature_info", None)
    if not type(model).__name__.startswith("Feature") or not hasattr(info, "out_indices"):
        return {}
    return {"features_only": True, "out_indices": list(info.out_indices)}


def _torchvision_candidates(model: nn.Module, home: str, unset: Weights) -> Iterator[BaseModel]:
    from torchvision import models

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    classes: list[dict[str, Any]] = [{}] + ([{"num_classes": linears[-1].out_features}] if linears else [])
    for name in models.list_models():
        if models.get_model_builder(name).__module__ != home or name.startswith("quantized_"):
            continue
        structures = [{}, *({"weights": member.name} for member in models.get_model_weights(name))]
        for kwargs in [a | b for b in structures for a in (classes if not b else [{}])]:
            yield BaseModel(
                source="torchvision", name=name, kwargs=kwargs, input_size=torchvision_size(name), weights=unset
            )


def _first_channels(model: nn.Module) -> int | None:
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d | DynamicConv2d)), None)


def _agree(model: nn.Module, twin: nn.Module) -> bool:
    """Whether both have the same module tree: classes, plain attributes, and shapes of parameters and buffers."""
    if _is_replaced(model):
        return True
    if type(model) is not type(twin):
        return False
    if _shapes(model) != _shapes(twin) or _attributes(model) != _attributes(twin):
        return False
    mine, other = dict(model.named_children()), dict(twin.named_children())
    if list(mine) != list(other):
        return False
    return all(_agree(mine[name], other[name]) for name in mine)


def _is_replaced(module: nn.Module) -> bool:
    return isinstance(module, DynamicConv2d) or folded_window(module) is not None


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, tuple(value.shape)) for name, value in own]


def _attributes(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and key not in _IGNORED
        and (isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value)))
    }
