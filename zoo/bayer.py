"""The Bayer sensor: which color it measures at each pixel. Used by the task and by networks that need to know."""

import torch
from torch import Tensor, nn

from surgeon.errors import ConfigError

PATTERNS = ("RGGB", "BGGR", "GRBG", "GBRG")


def bayer_cell(pattern: str) -> Tensor:
    """(3, 2, 2), 1 where the sensor measures a color; `pattern` reads its 2x2 cell row by row. Raises `ConfigError`."""
    if pattern not in PATTERNS:
        raise ConfigError(f"pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    cell = torch.zeros(3, 2, 2)
    for index, color in enumerate(pattern):
        cell["RGB".index(color), index // 2, index % 2] = 1
    return cell


def bayer_mask(pattern: str, height: int, width: int) -> Tensor:
    """(3, H, W), the cell of `pattern` tiled from the top left corner."""
    mask = torch.zeros(3, height, width)
    for index, color in enumerate(pattern):
        mask["RGB".index(color), index // 2 :: 2, index % 2 :: 2] = 1
    return mask


def tell_pattern(model: nn.Module, pattern: str) -> None:
    """Pass the sensor's pattern to the parts of a model that need it; one built for another sensor raises an error."""
    for module in model.modules():
        if callable(use_pattern := getattr(module, "use_pattern", None)):
            use_pattern(pattern)
