"""Copies of models, their modes, and running a model without leaving a trace in it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy as is_lazy_tensor

from surgeon.errors import ConfigError


def copy_model(model: nn.Module) -> nn.Module:
    """Deep copy, also of models that hold computed tensors (old-style `weight_norm`), which `copy.deepcopy` refuses."""
    memo: dict[int, Any] = {}
    for tensor in _plain_tensors(model):
        if not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


def copy_to_meta(model: nn.Module) -> nn.Module:
    """Copy with the same structure whose tensors have shapes but no data."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers(), *_plain_tensors(model)]:
        if not is_lazy_tensor(tensor):
            memo[id(tensor)] = _to_meta(tensor)
    return copy.deepcopy(model, memo)


def _to_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold as plain attributes, neither parameters nor buffers."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def is_lazy(module: nn.Module) -> bool:
    """Whether a parameter or buffer below has no shape yet."""
    return any(is_lazy_tensor(t) for t in [*module.parameters(), *module.buffers()])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; afterwards every module's mode and every buffer is as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers() if not is_lazy_tensor(b)]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """With the random generators of all devices set to this seed; afterwards they are as before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def strict_float32() -> Iterator[None]:
    """Without TF32 on CUDA, which rounds products to 10 bits, and with reproducible convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def checkpoint_gradients(model: nn.Module) -> None:
    """Switch gradient checkpointing on, by timm's method. Raises `ConfigError` for a model that has none or does not support it."""
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise ConfigError(
            f"{type(model).__name__} has no set_grad_checkpointing: gradient checkpointing is for models that have it (timm's)"
        )
    try:
        switch(True)
    except (AssertionError, RuntimeError) as error:  # how timm says that a network does not support it
        raise ConfigError(f"{type(model).__name__} does not support gradient checkpointing: {error}") from error
