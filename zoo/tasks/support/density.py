"""Density maps: every point is a Gaussian whose sum over the image is 1, even at borders.

Points are (x, y); (0, 0) is the center of the first pixel.
"""

import numpy as np
import torch
from torch import Tensor

from surgeon.zoo.tasks.data.images import Box

NEIGHBOURS, BETA = 3, 0.3  # Zhang et al. (2016), section 2.2


def adaptive_sigmas(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Spread of every point in pixels: 0.3 times the mean distance to its 3 nearest neighbors (Zhang et al. 2016, MCNN).

    Points with fewer neighbors use those that exist; a single point uses a quarter of the image's mean side as its distance,
    and a spread is at least one pixel.
    """
    from scipy.spatial import cKDTree

    alone = (height + width) / 2 / 4
    if len(points) < 2:
        return np.full(len(points), max(BETA * alone, 1.0))
    count = min(NEIGHBOURS, len(points) - 1)
    distances, _ = cKDTree(points).query(points, k=count + 1)
    sigmas: np.ndarray = np.maximum(BETA * distances[:, 1:].mean(1), 1.0)
    return sigmas


def density_map(points: np.ndarray, sigmas: np.ndarray, height: int, width: int, stride: int, box: Box) -> Tensor:
    """(1, h/stride, w/stride) of a box of an image, rounded up; the cell sums of the whole image's map.

    The box starts at a multiple of `stride`. Over the whole image, the sum is the number of points.
    """
    top, left, box_height, box_width = box
    rows = _spread(points[:, 1], sigmas, height, top, box_height, stride)
    columns = _spread(points[:, 0], sigmas, width, left, box_width, stride)
    return torch.from_numpy((rows.T @ columns).astype(np.float32))[None]


def _spread(at: np.ndarray, sigmas: np.ndarray, length: int, start: int, count: int, stride: int) -> np.ndarray:
    """(points, cells): the share of each point's one-dimensional Gaussian in cells of `stride` pixels; all cells sum to 1."""
    cells = -(-count // stride)
    if not len(at):
        return np.zeros((0, cells))
    pixels = np.arange(length)
    weights = np.exp(-0.5 * ((pixels - at[:, None]) / sigmas[:, None]) ** 2)
    weights /= weights.sum(1, keepdims=True)
    part = weights[:, start : start + count]
    part = np.pad(part, ((0, 0), (0, cells * stride - part.shape[1])))
    shares: np.ndarray = part.reshape(len(at), cells, stride).sum(2)
    return shares
