"""Calls of the ACDA operator for tests: small, and every size can be told."""

from typing import Any

import torch
from torch import Tensor

Problem = tuple[tuple[Tensor, ...], tuple[Any, ...]]


def problem(
    *,
    size: tuple[int, int] = (7, 8),
    window: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    multiplier: int = 2,
    images: int = 2,
    channels: int = 4,
    atoms: int = 2,
    static: int = 1,
    elements: int = 3,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Operands that require gradients, and the geometry."""
    torch.manual_seed(0)
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, window, stride, padding, dilation, strict=True)
    ]
    shapes = [
        (images, channels, *size),
        (images, atoms * elements, *out),
        (elements, *window),
        (static, *window),
        (channels * multiplier, channels // groups, atoms + static),
    ]
    operands = tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return operands, (stride, padding, dilation, groups)
