"""Small arguments for every operator, to check which backend would run them and whether its result is right."""

from collections.abc import Callable
from typing import Any

import torch

from surgeon.layers.acda.operator import ACDA_CONV
from surgeon.layers.ops.dispatch import Operator
from surgeon.layers.pafu.operator import PAFU_CONV
from surgeon.layers.sekg.operator import DCONV, DCONV_LAYER

Make = Callable[..., torch.Tensor]

_N, _C, _SIZE = 2, 16, 12
_SAME = ((1, 1), (1, 1), (1, 1))  # stride, padding and dilation of a 3×3 kernel that keeps the size


def operators() -> list[Operator]:
    """Every operator that has a dispatcher."""
    return list(_EXAMPLES)


def example(operator: Operator, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments for a call of the operator: 2 images of 16 channels and 12×12 pixels, a 3×3 kernel; always the same."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return _EXAMPLES[operator](make)


def _acda(make: Make) -> tuple[Any, ...]:
    atoms, elements, static = 4, 6, 2
    x, alpha, psi = make(_N, _C, _SIZE, _SIZE), make(_N, atoms * elements, _SIZE, _SIZE), make(elements, 3, 3)
    return x, alpha, psi, make(static, 3, 3), make(_C, _C, atoms + static), *_SAME, 1


def _dconv(make: Make) -> tuple[Any, ...]:
    return make(_N, _C, _SIZE, _SIZE), make(_N, _C, 9, _SIZE, _SIZE), (3, 3), *_SAME


def _dconv_layer(make: Make) -> tuple[Any, ...]:
    x, features = make(_N, _C, _SIZE, _SIZE), make(_N, _C, _SIZE, _SIZE)
    return x, features, make(9 * _C, _C), make(_C, 1, 3, 3), make(_C), *_SAME


def _pafu(make: Make) -> tuple[Any, ...]:
    kernels = 4
    x = make(_N, _C, _SIZE, _SIZE)
    index = torch.arange(_N * _SIZE * _SIZE, device=x.device).view(_N, _SIZE, _SIZE) % kernels
    return x, make(_C, _C, 3, 3), make(kernels - 1, _C, _C, 3, 3), index, None, *_SAME, 1


_EXAMPLES: dict[Operator, Callable[[Make], tuple[Any, ...]]] = {
    ACDA_CONV: _acda,
    DCONV: _dconv,
    DCONV_LAYER: _dconv_layer,
    PAFU_CONV: _pafu,
}
