"""Reasons why the Triton kernels cannot run. Imports neither Triton nor a kernel."""

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from surgeon.layers.ops.inputs import named

HAS_TRITON = find_spec("triton") is not None
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
LEAST_CAPABILITY = (8, 0)  # for bfloat16 products; the tests compile the kernels ahead of time for 8.0 and 9.0
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")  # kernels, on the CPU
MOST_ELEMENTS = 2**31 - 1  # per image: offsets inside it are 32-bit


def reasons_against(tensors: Sequence[Tensor | None]) -> Iterator[str]:
    """Reasons why no Triton kernel can take these floating-point tensors; none if one can. First the one that most calls have."""
    given = [t for t in tensors if t is not None]
    on_cpu = all(t.is_cpu for t in given)
    if on_cpu and not INTERPRETED:
        yield "it runs on CUDA; the tensors are on cpu"
    if not HAS_TRITON:
        yield "the package triton is not installed"
    if dtypes := {t.dtype for t in given} - DTYPES:
        yield f"it computes in float32, bfloat16 and float16, not in {named(dtypes)}"
    if on_cpu:
        return
    yield from _device_reasons(sorted({t.device.type for t in given}), given[0].device)
    large = [t for t in given if t.dim() > 1 and _reach(t) > MOST_ELEMENTS]
    if large:
        yield f"one image of {tuple(large[0].shape)} spans more than 2^31 elements"


def _device_reasons(kinds: list[str], device: torch.device) -> list[str]:
    if kinds != ["cuda"]:
        return [f"it runs on CUDA; the tensors are on {' and '.join(kinds)}"]
    if not torch.cuda.is_available():
        return ["CUDA is not available"]
    if torch.version.hip is not None:
        return ["it supports NVIDIA GPUs only; this is ROCm"]
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < LEAST_CAPABILITY:
        return [f"it needs compute capability 8.0, {properties.name} has {properties.major}.{properties.minor}"]
    return []


def _reach(t: Tensor) -> int:
    """Largest distance in memory between two elements of one image."""
    return sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
