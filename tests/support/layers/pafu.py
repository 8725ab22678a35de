"""Calls of the PAFU operator for tests: small, and every size can be told."""

import torch
from torch import Tensor

from surgeon.layers.pafu.frames import Window

Case = tuple[dict[str, Tensor], Window]


def make_case(
    *,
    images: int = 2,
    n: int = 3,
    size: tuple[int, int] = (7, 9),
    per_group: tuple[int, int] = (3, 4),
    groups: int = 1,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    window = Window(kernel, stride, padding, dilation, groups)
    rows, columns = window.output_size(*size)
    inputs, outputs = per_group

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(images, inputs * groups, *size),
        "kernel": normal(outputs * groups, inputs, *kernel),
        "further": normal(n - 1, outputs * groups, inputs, *kernel),
        "index": torch.randint(0, n, (images, rows, columns), generator=generator),
        "soft": normal(images, n, rows, columns).softmax(1),
    }, window
