"""Checks of whether a model fits a task: its inputs, its outputs, and its last layer."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgeon.errors import InputError
from surgeon.layers.base import DynamicConv2d
from surgeon.util.copying import evaluating


def first_channels(model: nn.Module) -> int | None:
    """Input channels of the first convolution, None if there is none."""
    return next((int(m.in_channels) for m in model.modules() if isinstance(m, nn.Conv2d | DynamicConv2d)), None)


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    try:
        return argument in inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # a forward without a signature
        return False


def trial(task: str, model: nn.Module, run: Callable[[Tensor], Any], *size: int, hint: str = "") -> Any:
    """Output of `run` for two random images of size (C, H, W), in eval mode, without side effects on the model.

    Raises `InputError` if the model cannot take them.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.rand((2, *size), generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    try:
        with evaluating(model):
            return run(x)
    except Exception as error:  # third-party code may raise anything
        shape = ", ".join(map(str, x.shape))
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"task {task}: the model does not run on an input of ({shape}): {text}{hint}") from error


def describe(output: Any) -> str:
    """The shape of a tensor, or the type of anything else, for messages."""
    return f"({', '.join(map(str, output.shape))})" if isinstance(output, Tensor) else f"a {type(output).__name__}"


def with_outputs(module: nn.Module, outputs: int, seed: int) -> nn.Module:
    """A new linear layer or convolution like this one with a different number of outputs, initialized from the seed."""
    bias = module.bias is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(module, nn.Linear):
            new: nn.Module = nn.Linear(module.in_features, outputs, bias)
        elif isinstance(module, nn.Conv2d):
            same = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            settings: dict[str, Any] = {name: getattr(module, name) for name in same}
            new = nn.Conv2d(module.in_channels, outputs, bias=bias, **settings)
        else:
            raise InputError(f"cannot change the number of outputs of a {type(module).__name__}")
    return new.to(module.weight.device, module.weight.dtype).train(module.training)


def outputs_of(module: nn.Module) -> int | None:
    """Number of outputs of a linear layer or an ungrouped convolution; None for everything else."""
    if type(module) is nn.Linear:
        return module.out_features
    return module.out_channels if type(module) is nn.Conv2d and module.groups == 1 else None


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module with this dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
