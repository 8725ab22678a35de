"""When the Triton kernels can run, as a list of reasons why not. Imports neither Triton nor a kernel."""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)  # bfloat16 products; the kernels are compiled ahead for 8.0 and 9.0 in the tests
MOST_ELEMENTS = 2**31 - 1  # of one image: places inside it are 32-bit numbers


def reasons_against(tensors: Sequence[Tensor | None]) -> list[str]:
    """Why no Triton kernel can take these floating-point tensors, whatever the operator; empty if one can."""
    given = [t for t in tensors if t is not None]
    reasons = [] if HAS_TRITON else ["the package triton is not installed"]
    dtypes = sorted({str(t.dtype) for t in given if t.dtype not in DTYPES})
    if dtypes:
        reasons.append(f"it computes in float32, bfloat16 and float16, not in {', '.join(dtypes)}")
    reasons += _device_reasons(sorted({t.device.type for t in given}), given[0].device)
    large = [t for t in given if t.dim() > 1 and _reach(t) > MOST_ELEMENTS]
    if large:
        reasons.append(f"one image of {tuple(large[0].shape)} reaches over more than 2^31 elements")
    return reasons


def _device_reasons(kinds: list[str], device: torch.device) -> list[str]:
    if kinds == ["cpu"] and interpreting():
        return []
    if kinds != ["cuda"]:
        return [f"it runs on CUDA, the tensors are on {' and '.join(kinds)}"]
    if not torch.cuda.is_available():
        return ["there is no CUDA here"]
    if torch.version.hip is not None:
        return ["it is written for NVIDIA's GPUs, this is ROCm"]
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) < LEAST_CAPABILITY:
        return [f"it needs compute capability 8.0, {properties.name} has {properties.major}.{properties.minor}"]
    return []


def _reach(t: Tensor) -> int:
    """How far apart in memory two elements of one image are at most."""
    return sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))


def interpreting() -> bool:
    """Whether Triton interprets its kernels, on tensors of the CPU: the environment variable TRITON_INTERPRET, set at the start."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
