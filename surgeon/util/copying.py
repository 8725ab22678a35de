"""Copying models, their modes, and running a model without side effects on it."""

import copy
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy as is_lazy_tensor

from surgeon.errors import ConfigError, ModelError
from surgeon.util.held import own_attributes, python_seeded, state_kept, walk


def check_module(model: Any) -> None:
    """Raise `ModelError` unless this is a module: names are for the command line, and for `surgeon.open_model`."""
    if not isinstance(model, nn.Module):
        named = isinstance(model, str)
        hint = f": surgeon.open_model({model!r}) makes one" if named else ""
        raise ModelError(
            f"the model must be a torch.nn.Module, got {repr(model) if named else type(model).__name__}{hint}"
        )


def copy_model(model: nn.Module) -> nn.Module:
    """Deep copy that also supports computed tensors (old-style `weight_norm`) and locks, which `copy.deepcopy` refuses.

    Raises `ModelError` for a model that cannot be copied.
    """
    check_module(model)
    return _uncompiled(_deep_copy(model, _what_deepcopy_refuses(model)))


def _what_deepcopy_refuses(model: nn.Module) -> dict[int, Any]:
    """By id: computed tensors anywhere below the modules' attributes and hooks (copied), and locks and nodes (shared)."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in walk(*own_attributes(module).values(), module._forward_hooks, module._forward_pre_hooks):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
            elif isinstance(value, _LOCKS):
                memo[id(value)] = value
        for node in own_attributes(module).get("input_placeholders", ()):  # of an unflattened program: read-only
            memo[id(node)] = node
    return memo


def _uncompiled(twin: nn.Module) -> nn.Module:
    """A copy without `torch.compile`: modules lose their wrapper; compiled methods are bound to the copy, not the original."""
    twin = without_compiler(twin)
    for module in list(twin.modules()):
        for key, child in module._modules.items():
            if child is not None and _is_compiled(child):
                module._modules[key] = without_compiler(child)
        for key, value in own_attributes(module).items():
            method = getattr(value, "_torchdynamo_orig_callable", None)
            if isinstance(method, types.MethodType):
                module.__dict__[key] = method.__func__.__get__(module)
    return twin


def without_compiler(model: nn.Module) -> nn.Module:
    """The model itself, without the wrapper of `torch.compile`."""
    return model.get_submodule("_orig_mod") if _is_compiled(model) else model


def uses_compiler(model: nn.Module) -> bool:
    """Whether the model or a module in it is compiled by `torch.compile` or `nn.Module.compile`, which copies are not."""
    return any(_is_compiled(module) or module._compiled_call_impl is not None for module in model.modules())


def _is_compiled(module: Any) -> bool:
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def _deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}. Remove what cannot be copied "
            f"(open files, processes, handles) from the model during the conversion"
        ) from error
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in twin.named_modules():  # copies of graphs come out in training mode
        module.training = modes.get(name, module.training)
    return twin


def copy_to_meta(model: nn.Module) -> nn.Module:
    """Copy with the same structure whose tensors have shapes but no data."""
    memo = _what_deepcopy_refuses(model)
    for tensor in [*model.parameters(), *model.buffers(), *_plain_tensors(model)]:
        if not is_lazy_tensor(tensor):
            memo[id(tensor)] = _to_meta(tensor)
    return _uncompiled(_deep_copy(model, memo))


def _to_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors stored as plain attributes of modules, neither parameters nor buffers."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def is_lazy(module: nn.Module) -> bool:
    """Whether a parameter or buffer in the module has no shape yet."""
    return any(is_lazy_tensor(t) for t in [*module.parameters(), *module.buffers()])


_AUTOCAST = ("cpu", "cuda", "mps")
_LOCKS = (type(threading.Lock()), type(threading.RLock()))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in eval mode without gradients; afterward every module's mode, buffers and other state are restored."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers() if not is_lazy_tensor(b)]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad(), state_kept(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context that seeds torch (all devices), Python and numpy, and restores their generators afterward."""
    with torch.random.fork_rng(), python_seeded(seed):
        seed_torch(seed)
        yield


def seed_torch(seed: int) -> None:
    """`torch.manual_seed`, except that without an accelerator only the CPU's generator is seeded.

    `torch.manual_seed` would format the stack for each kind of device that is not in use, which takes milliseconds.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def quiet_eager() -> Iterator[None]:
    """Like `eager`, without warnings."""
    with warnings.catch_warnings(), eager():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def eager() -> Iterator[None]:
    """Context without autocast, inference mode, compilation (compiled code runs eagerly), and meta as default device."""
    with ExitStack() as stack:
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if "torch._dynamo" in sys.modules:  # otherwise nothing can be compiled, and its import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def strict_float32() -> Iterator[None]:
    """Context without TF32 on CUDA, which rounds products to 10 bits, and with reproducible convolutions."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def checkpoint_gradients(model: nn.Module) -> None:
    """Enable gradient checkpointing by timm's method. Raises `ConfigError` if the model does not have or support it."""
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise ConfigError(
            f"{type(model).__name__} has no set_grad_checkpointing: gradient checkpointing needs a model that has it (timm's do)"
        )
    try:
        switch(True)
    except (AssertionError, RuntimeError) as error:  # timm's way to report that a network does not support it
        raise ConfigError(f"{type(model).__name__} does not support gradient checkpointing: {error}") from error
