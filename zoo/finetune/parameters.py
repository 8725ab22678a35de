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
BASE_FAN_IN = 16  # inputs up to which the last weight of a generator learns at the rate of other new parameters
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
    """Parameters by name that share a role, whether they decay, and their rate as a multiple of `lr`.

    `slowed` is the number by which that rate is divided because of the fan-in; 1 for parameters that are not slowed.
    """

    role: Role
    decays: bool
    parameters: dict[str, nn.Parameter]
    lr_scale: float = 1.0
    slowed: float = 1.0


def group_parameters(model: nn.Module, config: FinetuneConfig | None = None) -> list[Group]:
    """Every parameter that requires a gradient, in exactly one group; empty groups are omitted.

    No decay for biases and other vectors, norms, and names in a module's `no_weight_decay()` (timm's convention).
    `config` (None: the defaults) sets the rates of new parameters (`new_lr_scales`).
    Raises `ConfigError` if there is nothing to train.
    """
    config = config or FinetuneConfig()
    roles, spared = _roles(model), _named(model, "no_weight_decay") | _norms(model)
    scales = new_lr_scales(model, config.new_lr_scale)
    slowed = slowdowns(model) if config.fan_in_lr else {}
    members: dict[tuple[Role, bool, float, float], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(".bias") and id(parameter) not in spared
            role, slow = roles.get(id(parameter), "other"), slowed.get(id(parameter), 1.0)
            key = (role, decays, scales.get(id(parameter), 1.0), slow)
            members.setdefault(key, {})[name] = parameter
    if not members:
        raise ConfigError("the model has no parameter that requires a gradient: there is nothing to train")
    ordered = sorted(members, key=lambda key: (ROLES.index(key[0]), not key[1], -key[2], key[3]))
    return [
        Group(role, decays, members[role, decays, scale, slow], scale / slow, slow)
        for role, decays, scale, slow in ordered
    ]


def optimizer_groups(groups: list[Group], config: FinetuneConfig) -> list[dict[str, Any]]:
    """The groups in an optimizer's format; timm's schedules multiply a group's rate by its `lr_scale`."""
    return [
        {
            "params": list(group.parameters.values()),
            "weight_decay": config.weight_decay if group.decays else 0.0,
            "lr_scale": group.lr_scale,
            "role": group.role,
        }
        for group in groups
    ]


def parameter_groups(
    model: nn.Module,
    *,
    lr: float = FinetuneConfig.lr,
    weight_decay: float | None = None,
    new_lr_scale: float | None = None,
    fan_in_lr: bool = True,
) -> list[dict[str, Any]]:
    """The parameters in the groups and at the rates of `finetune`, for an optimizer of your own: `AdamW(parameter_groups(model))`.

    Args:
        model: every parameter that requires a gradient is in exactly one group.
        lr: of the parameters of the original network.
        weight_decay: 0 for biases and other vectors, norms, and names in a module's `no_weight_decay()`. None: the optimizer's own
            for the others (0.01 of torch's AdamW, as in `finetune`; 0 of its Adam and SGD).
        new_lr_scale: rate of new parameters as a multiple of `lr`; None: each layer type's own, 1 for ACDA, 0.1 for PAFU and SEKG.
        fan_in_lr: slow the weights with which generators end in proportion to their inputs; for Adam and its kin.

    Returns groups with `params`, `lr`, `role` ("selector", "new" or "other") and, if it is given or 0, `weight_decay`. Raises
    `ConfigError` for values out of range, and if there is nothing to train.
    """
    decay = FinetuneConfig.weight_decay if weight_decay is None else weight_decay
    config = FinetuneConfig(lr=lr, weight_decay=decay, new_lr_scale=new_lr_scale, fan_in_lr=fan_in_lr)
    groups = optimizer_groups(group_parameters(model, config), config)
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale")
        if weight_decay is None and group["weight_decay"]:
            del group["weight_decay"]
    return groups


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


def _norms(model: nn.Module) -> set[int]:
    """Parameters of norms, by id."""
    norms = (module for module in model.modules() if isinstance(module, NORMS))
    return {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}


def _named(model: nn.Module, method: str) -> set[int]:
    """Parameters that modules name, perhaps as patterns, in a method of this name, by id."""
    found: set[int] = set()
    for module in model.modules():
        named = getattr(module, method, None)
        patterns: Collection[str] = named() if callable(named) else ()
        if patterns:
            found |= {
                id(parameter)
                for name, parameter in module.named_parameters()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            }
    return found


def new_lr_scales(model: nn.Module, scale: float | None = None) -> dict[int, float]:
    """The rates of new parameters as multiples of `lr`, by id: `scale`, or if None, that of the layer's type."""
    return {
        id(parameter): type(layer).new_lr_scale if scale is None else scale
        for _, layer in dynamic_modules(model)
        for parameters in (layer.new_parameters(), layer.selector_parameters())
        for _, parameter in parameters
    }


def slowdowns(model: nn.Module) -> dict[int, float]:
    """The numbers by which the rates of the weights with which generators end are divided, by id.

    A weight with more than `BASE_FAN_IN` inputs is slowed in proportion to these: Adam moves each by the rate, and the
    code by the sum (Yang et al., arXiv 2203.03466, table 8).
    """
    ends = _named(model, "output_weights")
    fan_ins = {id(p): p[0].numel() for p in model.parameters() if id(p) in ends}
    return {key: fan_in / BASE_FAN_IN for key, fan_in in fan_ins.items() if fan_in > BASE_FAN_IN}
