"""Fit a model to the data's classes: a new last layer if their number differs."""

from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import InputError
from surgeon.layers.base import DynamicConv2d
from surgeon.zoo.tasks.support.probe import describe, outputs_of, replace_module, trial, with_outputs


def fit_classifier(
    task: str, model: nn.Module, classes: int, size: tuple[int, int, int], seed: int, *, fresh: bool = False
) -> nn.Module:
    """The same model, returning logits (N, classes) for inputs of this size.

    timm's models reset their classifier; in others, the last linear layer or convolution with the old number of outputs is
    replaced, and auxiliary classifiers, too; with `fresh` even if the number is right. New layers are initialized from the
    seed. Raises `InputError` if that fails.
    """
    logits = _logits(task, trial(task, model, lambda x: model(x), *size), size)
    if logits.shape[1] == classes and not fresh:
        return model
    if callable(getattr(model, "reset_classifier", None)):
        _reset(model, classes, seed)
    else:
        for name in _heads(task, model, int(logits.shape[1]), classes):
            replace_module(model, name, with_outputs(model.get_submodule(name), classes, seed))
    after = _logits(task, trial(task, model, lambda x: model(x), *size), size)
    if after.shape[1] != classes:
        raise InputError(
            f"task {task}: the model returns {describe(after)} after its head was replaced, not {classes} classes"
        )
    return model


def _reset(model: Any, classes: int, seed: int) -> None:
    """timm's own way to a new head; new parameters take over device, dtype and mode."""
    known = {id(part) for part in (*model.modules(), *model.parameters())}
    like = next(p for p in model.parameters() if p.is_floating_point())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(classes)
    for parameter in model.parameters():
        if id(parameter) not in known:
            parameter.data = parameter.data.to(like.device, like.dtype)
    for module in model.modules():
        if id(module) not in known:
            module.training = model.training


def _logits(task: str, output: Any, size: tuple[int, int, int]) -> Tensor:
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor) or first.dim() != 2:
        raise InputError(
            f"task {task}: the model returns {describe(first)} for images of {size}, not logits (N, classes); "
            "is it a classifier?"
        )
    return first


def _heads(task: str, model: nn.Module, old: int, classes: int) -> list[str]:
    """Names of the last layer and of those of auxiliary classifiers."""
    named = [(name, module) for name, module in model.named_modules() if name]
    last = ""
    auxiliary: dict[str, str] = {}
    for name, module in named:
        if outputs_of(module) == old:
            top = name.split(".")[0].lower()
            if "aux" in top:
                auxiliary[top] = name
            else:
                last = name
    if not last:
        dynamic = [name for name, module in named if isinstance(module, DynamicConv2d) and module.out_channels == old]
        why = f"; {dynamic[-1]} was converted: leave the classifier out of the conversion" if dynamic else ""
        raise InputError(
            f"task {task}: the model has {old} classes, the data {classes}, and no last linear layer or convolution with "
            f"{old} outputs was found to replace{why}"
        )
    return [last, *auxiliary.values()]
