"""Parameter groups: new parameters, selectors, and the rest; with and without weight decay."""

import fnmatch
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from surgeon.errors import ConfigError
from surgeon.layers.base import DynamicConv2d
from surgeon.zoo.finetune.config import FinetuneConfig

Role = Literal["selector", "new", "other"]
ROLES: tuple[Role, ...] = ("selector", "new", "other")  # selectors are new parameters, too
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True)
class Group:
    """Parameters by name that share a role and whether they decay."""

    role: Role
    decays: bool
    parameters: dict[str, nn.Parameter]


def group_parameters(model: nn.Module) -> list[Group]:
    """Every parameter that requires a gradient, in exactly one group; empty groups are omitted.

    No decay for biases and other vectors, norms, and names in a module's `no_weight_decay()` (timm's convention).
    Raises `ConfigError` if there is nothing to train.
    """
    roles = _roles(model)
    spared = _spared(model)
    groups = []
    for role in ROLES:
        for decays in (True, False):
            members = {
                name: parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
                and roles.get(id(parameter), "other") == role
                and (parameter.ndim > 1 and not name.endswith(".bias") and id(parameter) not in spared) == decays
            }
            if members:
                groups.append(Group(role, decays, members))
    if not groups:
        raise ConfigError("the model has no parameter that requires a gradient: there is nothing to train")
    return groups


def optimizer_groups(groups: list[Group], config: FinetuneConfig) -> list[dict[str, Any]]:
    """The groups in an optimizer's format; timm's schedules multiply a group's rate by its `lr_scale`."""
    return [
        {
            "params": list(group.parameters.values()),
            "weight_decay": config.weight_decay if group.decays else 0.0,
            "lr_scale": 1.0 if group.role == "other" else config.new_lr_scale,
            "role": group.role,
        }
        for group in groups
    ]


def dynamic_modules(model: nn.Module) -> Iterator[tuple[str, DynamicConv2d]]:
    """The dynamic layers with their names, each layer once."""
    for name, module in model.named_modules():
        if isinstance(module, DynamicConv2d):
            yield name, module


def _roles(model: nn.Module) -> dict[int, Role]:
    roles: dict[int, Role] = {}
    for _, layer in dynamic_modules(model):
        roles |= {id(parameter): "new" for _, parameter in layer.new_parameters()}
        roles |= {id(parameter): "selector" for _, parameter in layer.selector_parameters()}
    return roles


def _spared(model: nn.Module) -> set[int]:
    """Parameters of norms, and those that modules exclude from weight decay, by id."""
    spared: set[int] = set()
    for module in model.modules():
        if isinstance(module, NORMS):
            spared |= {id(parameter) for parameter in module.parameters(recurse=False)}
        named = getattr(module, "no_weight_decay", None)
        patterns: Collection[str] = named() if callable(named) else ()
        if patterns:
            spared |= {
                id(parameter)
                for name, parameter in module.named_parameters()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            }
    return spared
