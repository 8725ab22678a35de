"""Argument checks shared by all operators, made before a backend runs: one clear error instead of a crash or garbage."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import GeometryError
from surgeon.layers.geometry import Pair


def check_window(
    name: str,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Pair:
    """The output size (H', W') of a window sliding over x (N, C, H, W); N may be 0. Raises `GeometryError`."""
    for what, pair, least in (
        ("kernel", kernel_size, 1),
        ("stride", stride, 1),
        ("dilation", dilation, 1),
        ("padding", padding, 0),
    ):
        if len(pair) != 2 or pair[0] < least or pair[1] < least:
            raise GeometryError(
                f"{name}: {what} must be two integers >= {least} (vertical, horizontal), got {tuple(pair)}"
            )
    if groups < 1:
        raise GeometryError(f"{name}: groups must be at least 1, got {groups}")
    if 0 in x.shape[1:]:
        raise GeometryError(f"{name}: an image must have channels and pixels, got x {tuple(x.shape)}")
    height, width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    )
    if height < 1 or width < 1:
        raise GeometryError(
            f"{name}: a {kernel_size[0]}x{kernel_size[1]} kernel of dilation {tuple(dilation)} does not fit an input of "
            f"{x.shape[2]}x{x.shape[3]} with padding {tuple(padding)}"
        )
    return height, width


def floating(*args: Any) -> list[str]:
    """Reasons against arguments that contain a tensor without a floating-point dtype."""
    return _integers({a.dtype for a in args if isinstance(a, Tensor)})


def one_dtype(*args: Any) -> list[str]:
    """Reasons against arguments whose tensors do not share one floating dtype."""
    dtypes = {a.dtype for a in args if isinstance(a, Tensor)}
    mixed = [] if len(dtypes) == 1 else [f"its tensors are of different dtypes ({named(dtypes)})"]
    return _integers(dtypes) + mixed


def _integers(dtypes: Iterable[torch.dtype]) -> list[str]:
    wrong = [dtype for dtype in dtypes if not dtype.is_floating_point]
    return [f"needs a floating-point input, got {named(wrong)}"] if wrong else []


def named(dtypes: Iterable[torch.dtype]) -> str:
    """Dtypes as messages list them."""
    return ", ".join(sorted(map(str, dtypes)))
