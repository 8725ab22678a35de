"""Operands of the DConv operators for tests: of any call, and of small ones."""

from typing import Any

import torch
from torch import Tensor


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def layer_tensors(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    torch.manual_seed(case["seed"])
    taps = case["kernel"][0] * case["kernel"][1]
    return [
        random(*case["x"], dtype=dtype),
        random(case["x"][0], case["features"], *case["out"], dtype=dtype),
        random(case["groups"] * taps, case["features"], dtype=dtype),
        random(case["outputs"], 1, *case["kernel"], dtype=dtype),
        random(case["outputs"], dtype=dtype) if case["bias"] else None,
    ]


def small(dtype: torch.dtype = torch.float64, *, groups: int = 4, outputs: int = 4) -> list[Tensor | None]:
    case = {"x": (2, 4, 6, 5), "out": (6, 5), "outputs": outputs, "groups": groups, "features": 3, "kernel": (3, 3)}
    return layer_tensors({**case, "bias": True, "seed": 0}, dtype)


def small_kernels(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return random(2, 4, 6, 5, dtype=dtype), random(2, 2, 9, 6, 5, dtype=dtype)
