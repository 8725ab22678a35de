"""Class weights of a loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from surgeon.errors import ConfigError


def checked_weights(
    task: str, values: Sequence[float] | None, classes: int, device: torch.device | str = "cpu"
) -> Tensor | None:
    """The weights (classes) as float32, None if there are none. Raises `ConfigError` for a wrong number or negative values."""
    if values is None:
        return None
    if len(values) != classes or min(values) < 0 or max(values) == 0:
        raise ConfigError(
            f"task {task}: class_weights must be {classes} numbers >= 0, one per class, got {tuple(values)}"
        )
    return torch.tensor(values, dtype=torch.float32, device=device)
