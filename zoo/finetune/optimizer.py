"""Optimizers by timm's names, tested before a run starts; and checks that a checkpoint's state fits a run."""

from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import CheckpointError, ConfigError
from surgeon.util.files import check_fields, told
from surgeon.util.near import did_you_mean
from surgeon.zoo.finetune.config import FinetuneConfig
from surgeon.zoo.finetune.state import storable

_STATE: dict[str, Any] = {
    "model": {"*": Tensor},
    "ema": (dict, type(None)),
    "optimizer": {"state": dict, "param_groups": [dict]},
    "scaler": (dict, type(None)),
}
_SHAPES = ((4, 4, 3, 3), (4, 4), (4,))  # of the parameters with which an optimizer is tested


def check_optimizer(name: str) -> None:
    """Raise `ConfigError` for a name that is none of timm's."""
    from timm.optim import list_optimizers

    known = [str(one) for one in list_optimizers(with_description=False)]
    if name not in known:
        raise ConfigError(f"timm has no optimizer {name!r}.{did_you_mean(name, known)}")


def make_optimizer(groups: Any, config: FinetuneConfig) -> torch.optim.Optimizer:
    """An optimizer by timm's name. Raises `ConfigError` for an unknown one, and for one that is unavailable here."""
    from timm.optim import create_optimizer_v2

    check_optimizer(config.opt)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum
        )
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"opt {config.opt} cannot be created here: {_line(error)}") from error
    return optimizer


def try_optimizer(config: FinetuneConfig, device: torch.device) -> None:
    """Raise `ConfigError` unless the optimizer can step and its state can be saved; called before the run."""
    parameters = [nn.Parameter(torch.ones(shape, device=device)) for shape in _SHAPES]
    optimizer = make_optimizer([{"params": parameters}], config)
    try:
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.01)
            optimizer.step()
        state = storable(optimizer.state_dict())
        optimizer.load_state_dict(state)
        optimizer.step()
    except Exception as error:  # third-party optimizers raise arbitrary errors
        raise ConfigError(f"opt {config.opt} cannot be used here: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_state(own: dict[str, Any], state: dict[str, Any], where: str) -> None:
    """Raise `CheckpointError`, with `where`, unless a state fits the run's `own`; nothing is changed."""
    check_fields(state, _STATE, where)
    for key in ("model", "ema"):
        _check_tensors(own[key], state[key], f"{where}: {key}")
    groups, found = own["optimizer"]["param_groups"], state["optimizer"]["param_groups"]
    if len(groups) != len(found):
        raise CheckpointError(f"{where}: optimizer has {len(found)} groups of parameters, expected {len(groups)}")
    for number, (group, other) in enumerate(zip(groups, found, strict=True)):
        if set(group) - set(other) or group["params"] != other.get("params"):
            raise CheckpointError(f"{where}: optimizer: group {number} differs from this run's")
    known = {number for group in groups for number in group["params"]}
    for key, values in state["optimizer"]["state"].items():
        if key not in known or not isinstance(values, dict):
            raise CheckpointError(f"{where}: optimizer: state has {told(key)}, which is not a parameter of this run")
    if own["scaler"] and state["scaler"]:
        check_fields(state["scaler"], {"scale": float, "_growth_tracker": int}, f"{where}: scaler")


def _check_tensors(own: dict[str, Any] | None, found: dict[str, Any] | None, where: str) -> None:
    if (own is None) != (found is None):
        raise CheckpointError(f"{where} is {'not ' if found is None else ''}there, against the options of this run")
    if own is None or found is None:
        return
    other = sorted(map(str, set(own) ^ set(found)))
    if other:
        raise CheckpointError(
            f"{where}: {', '.join(other[:3])} is only in {'the run' if other[0] in own else 'the file'}"
        )
    for name, tensor in own.items():
        if not isinstance(tensor, Tensor):
            continue
        if (
            not isinstance(found[name], Tensor)
            or found[name].shape != tensor.shape
            or found[name].dtype != tensor.dtype
        ):
            raise CheckpointError(f"{where}: {name} is not a tensor {tuple(tensor.shape)} of {tensor.dtype}")
