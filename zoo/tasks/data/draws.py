"""Random draws that depend only on their generator."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """A number in [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def integer(low: int, high: int, generator: torch.Generator) -> int:
    """An integer in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))


@contextmanager
def global_seed(generator: torch.Generator) -> Iterator[None]:
    """Seed the global state of `random`, numpy and torch (CPU) from `generator`; it is restored afterward."""
    seed = int(torch.randint(0, 2**31, (), generator=generator))
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def turned(x: Tensor, turn: int) -> Tensor:
    """One of the 8 symmetries of the square, on the last two dimensions: `turn` quarter turns; mirrored first from 4 on."""
    if turn >= 4:
        x = x.flip(-1)
    return x.rot90(turn % 4, (-2, -1))


def turned_back(x: Tensor, turn: int) -> Tensor:
    """Inverse of `turned`."""
    x = x.rot90(-(turn % 4), (-2, -1))
    return x.flip(-1) if turn >= 4 else x
