"""Multi-scale Fourier-Bessel bases for ACDA's atoms (ACDA §3.2 "Multi-scale atom bases", appendix A.2).

On a box of l_h × l_w grid points the elements are J_k(λ r) cos(kθ) and, for k > 0, J_k(λ r) sin(kθ), where λ is a positive zero
of the Bessel function J_k and r = 1 on the circle of radius l/2; outside the circle they are zero. Elements are ordered by λ and
are unit vectors (n, l_h, l_w) in float64.
"""

from functools import lru_cache

import numpy as np
import torch
from scipy.special import jn_zeros, jv
from torch import Tensor

from surgeon.layers.geometry import Pair

# An element with less than this share of its norm left counts as zero on the grid, or as a combination of earlier ones.
_NEGLIGIBLE = 1e-4


def scale_boxes(kernel_size: Pair, scales: int) -> list[Pair]:
    """Boxes (h, w) of the scales, smallest first: 3, 5, 7, … along an odd axis; 2, 4, 6, … along an even one.

    An axis of size 1 stays 1, so that a 1×k kernel stays one-dimensional; only 1×1 kernels grow (3, 5, 7, …).
    """
    return [(_scale(kernel_size[0], kernel_size, s), _scale(kernel_size[1], kernel_size, s)) for s in range(scales)]


def _scale(size: int, kernel_size: Pair, s: int) -> int:
    if size == 1 and kernel_size != (1, 1):
        return 1
    return 2 * s + 2 + size % 2


def window_size(kernel_size: Pair, scales: int) -> Pair:
    """The box (h, w) of a whole atom: the larger of the kernel and the largest scale along each axis."""
    h, w = scale_boxes(kernel_size, scales)[-1]
    return max(h, kernel_size[0]), max(w, kernel_size[1])


def centered(elements: Tensor, window: Pair) -> Tensor:
    """Pad (…, h, w) with zeros, or crop it, to the window around the same center; the parities must agree."""
    bottom, right = ((window[i] - elements.shape[i - 2]) // 2 for i in (0, 1))
    return torch.nn.functional.pad(elements, (right, right, bottom, bottom))


def basis_elements(kernel_size: Pair, scales: int, basis_size: int) -> Tensor:
    """The whole basis ψ (K, l_h, l_w), up to `basis_size` elements per scale, in the window of `window_size`.

    K is smaller than scales · basis_size if a box has fewer dimensions than that.
    """
    window = window_size(kernel_size, scales)
    return torch.cat([centered(fourier_bessel(box, basis_size), window) for box in scale_boxes(kernel_size, scales)])


def fitting_elements(kernel_size: Pair, scales: int, basis_size: int) -> int:
    """Number of leading elements of ψ that vanish outside the kernel's own box because their scale fits into it."""
    return sum(
        len(fourier_bessel(box, basis_size))
        for box in scale_boxes(kernel_size, scales)
        if box[0] <= kernel_size[0] and box[1] <= kernel_size[1]
    )


@lru_cache(maxsize=128)
def fourier_bessel(box: Pair, count: int) -> Tensor:
    """The first `count` linearly independent elements (n, h, w) on a box; n < count if the box has no more. Do not modify.

    Elements that vanish on the grid, or depend linearly on earlier ones, are skipped.
    If the sides of the box differ, the circle becomes an ellipse that touches all four.
    """
    y, x = (np.arange(size) - (size - 1) / 2 for size in box)
    y, x = np.meshgrid(y / (box[0] / 2), x / (box[1] / 2), indexing="ij")
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    inside = radius <= 1
    chosen: list[np.ndarray] = []
    orthonormal = np.zeros((0, inside.size))
    for zero, order, wave in _frequencies(max(box), count):
        if len(chosen) == min(count, int(inside.sum())):
            break
        element = (inside * jv(order, zero * radius) * wave(order * angle)).ravel()
        size = np.linalg.norm(element)
        if size < _NEGLIGIBLE:
            continue
        element /= size
        rest = element
        for _ in range(2):  # the second pass removes the first one's rounding error
            rest = rest - orthonormal.T @ (orthonormal @ rest)
        size = np.linalg.norm(rest)
        if size < _NEGLIGIBLE:
            continue
        chosen.append(element)
        orthonormal = np.vstack([orthonormal, rest / size])
    return torch.from_numpy(np.stack(chosen)).view(-1, *box)


def _frequencies(size: int, count: int) -> list[tuple[float, int, np.ufunc]]:
    """(λ, k, cos or sin) ordered by λ, complete up to a λ beyond what a grid of this size can resolve."""
    orders = 8 + 2 * size + int(2 * count**0.5)
    limit = jn_zeros(orders, 1)[0]
    found: list[tuple[float, int, np.ufunc]] = []
    for order in range(orders):
        for zero in jn_zeros(order, orders):
            if zero > limit:
                break
            found.append((zero, order, np.cos))
            if order > 0:
                found.append((zero, order, np.sin))
    return sorted(found, key=lambda item: (item[0], item[2] is np.sin))
