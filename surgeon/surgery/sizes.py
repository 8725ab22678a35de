"""Memory needed by models and layers, checked before any of it is allocated."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from surgeon.errors import SurgeonError
from surgeon.layers.base import DynamicConv2d, LayerConfig
from surgeon.layers.geometry import ConvGeometry
from surgeon.util.files import told
from surgeon.util.machine import TooLargeError, check_memory, memory

logger = logging.getLogger(__name__)

_MODULES = 100_000  # per network; the largest of timm and torchvision have a few thousand
_NUMBER = 2**24


def check_layers(layers: Iterable[tuple[type[DynamicConv2d], ConvGeometry, LayerConfig]]) -> None:
    """Raise `TooLargeError` for layers that this machine lacks the memory to build."""
    total, largest = 0, (0, "")
    for kind, geometry, config in layers:
        cls: Any = kind  # hashable, though mypy disagrees for classes of nn.Modules
        size = _layer_bytes(cls, geometry, config)
        total, largest = total + size, max(largest, (size, f"{kind.type_name} layers such as {config}"))
    check_memory(total, largest[1] or "the layers")


@lru_cache(maxsize=1024)
def _layer_bytes(kind: type[DynamicConv2d], geometry: ConvGeometry, config: LayerConfig) -> int:
    """Bytes of a layer's tensors in float32; 0 if it is unknown without building the layer."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return _bytes_of(kind(geometry, config))
    except SurgeonError:
        return 0  # building it for real reports the reason
    except RuntimeError:
        return 0  # a constructor that reads values, which tensors on the meta device lack


def _bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@contextmanager
def bounded(build: Callable[[], nn.Module], options: dict[str, Any], what: str) -> Iterator[None]:
    """Context for building a network: its memory is checked first by building it on the meta device.

    Raises `TooLargeError` if this machine has too little memory for it, or if it would have too many layers.
    """
    if _is_modest(options):
        yield
        return
    with _counting(what):
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                build()
        except TooLargeError:
            raise
        except Exception as error:  # it computes with values or rejects these options: the real build will report it
            logger.debug("%s cannot be built without memory: %s", what, error)
    with _counting(what):
        yield


@contextmanager
def _counting(what: str) -> Iterator[None]:
    """Raise `TooLargeError` as soon as too many modules, or more bytes than this machine has, are built inside."""
    limit, found = memory(), {"bytes": 0, "modules": 0}

    def count_parameter(module: nn.Module, name: str, parameter: Any) -> None:
        if isinstance(parameter, Tensor):
            found["bytes"] += parameter.numel() * parameter.element_size()
            if found["bytes"] > limit:
                check_memory(found["bytes"], f"{what} (or more of it)")

    def count_module(module: nn.Module, name: str, child: Any) -> None:
        found["modules"] += 1
        if found["modules"] > _MODULES:
            raise TooLargeError(f"{what} would have more than {_MODULES:,} modules")

    handles = [
        register_module_parameter_registration_hook(count_parameter),
        register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_modest(options: Any) -> bool:
    """Whether a network's options cannot make it much larger: most networks have no others.

    Raises `TooLargeError` for numbers larger than any network option.
    """
    for value in _numbers(options):
        if abs(value) > _NUMBER:
            raise TooLargeError(f"no option of a network is as large as {told(value)}")
    return all(
        isinstance(value, bool | str | None) or (key in ("num_classes", "in_chans") and value in range(2**16))
        for key, value in options.items()
    )


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
