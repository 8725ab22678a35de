"""Camera noise: Gaussian and signal-dependent."""

import math

import torch
from torch import Tensor

from surgeon.zoo.tasks.data.draws import uniform


def gaussian(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """x with white Gaussian noise of standard deviation `sigma` (in the units of [0, 1]); not clipped."""
    return x + sigma * torch.randn(x.shape, generator=generator)


def heteroskedastic(x: Tensor, shot: float, read: float, generator: torch.Generator) -> Tensor:
    """x with Gaussian noise of variance shot * x + read² (Foi et al. 2008); values in [0, 1], not clipped."""
    return x + torch.sqrt(shot * x + read**2) * torch.randn(x.shape, generator=generator)


def log_uniform(bounds: tuple[float, float], generator: torch.Generator) -> float:
    """A log-uniform number from a range; uniform if the range starts at 0."""
    low, high = bounds
    if low == high:
        return low
    if low == 0:
        return uniform(low, high, generator)
    return math.exp(uniform(math.log(low), math.log(high), generator))
