"""Argument checks shared by all operators, made before a backend runs: one clear error instead of a crash or garbage."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import GeometryError
from surgeon.layers.geometry import Pair

FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


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
    _check_pair(name, "kernel", kernel_size, 1)
    _check_pair(name, "stride", stride, 1)
    _check_pair(name, "dilation", dilation, 1)
    _check_pair(name, "padding", padding, 0)
    if groups < 1:
        raise GeometryError(f"{name}: groups must be at least 1, got {groups}")
    _, channels, height, width = x.shape
    if channels == 0 or height == 0 or width == 0:
        raise GeometryError(f"{name}: an image must have channels and pixels, got x {tuple(x.shape)}")
    height = (height + 2 * padding[0] - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    width = (width + 2 * padding[1] - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    if height < 1 or width < 1:
        raise GeometryError(
            f"{name}: a {kernel_size[0]}x{kernel_size[1]} kernel of dilation {tuple(dilation)} does not fit an input of "
            f"{x.shape[2]}x{x.shape[3]} with padding {tuple(padding)}"
        )
    return height, width


def _check_pair(name: str, what: str, pair: Sequence[int], least: int) -> None:
    if len(pair) != 2 or pair[0] < least or pair[1] < least:
        raise GeometryError(f"{name}: {what} must be two integers >= {least} (vertical, horizontal), got {tuple(pair)}")


def floating(*args: Any) -> list[str]:
    """Reasons against arguments that contain a tensor without a floating-point dtype."""
    return _integers({a.dtype for a in args if isinstance(a, Tensor)})


def one_dtype(*args: Any) -> list[str]:
    """Reasons against arguments whose tensors do not share one floating dtype."""
    dtypes = {a.dtype for a in args if isinstance(a, Tensor)}
    if len(dtypes) == 1 and dtypes <= FLOATING:
        return []
    mixed = [] if len(dtypes) == 1 else [f"its tensors are of different dtypes ({named(dtypes)})"]
    return _integers(dtypes) + mixed


def _integers(dtypes: Iterable[torch.dtype]) -> list[str]:
    wrong = [dtype for dtype in dtypes if not dtype.is_floating_point]
    return [f"needs a floating-point input, got {named(wrong)}"] if wrong else []


def named(dtypes: Iterable[torch.dtype]) -> str:
    """Dtypes as messages list them."""
    return ", ".join(sorted(map(str, dtypes)))
