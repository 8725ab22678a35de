"""Measures of how much a layer varies over one image."""

from typing import Any

import torch
from torch import Tensor

from surgeon.layers import ACDAConv2d, PAFUConv2d, SEKGConv2d
from surgeon.layers.acda.bases import fourier_bessel, scale_boxes
from surgeon.layers.base import CodedConv2d
from surgeon.visualize.capture import Captured

FROM_WEIGHTS = "weights"


def numbers(seen: Captured) -> dict[str, Any]:
    """Measurements of a layer as JSON values; they depend on its type."""
    found: dict[str, Any] = {"name": seen.name, "type": seen.layer.type_name, "variation": seen.variation}
    if seen.code is None or not isinstance(seen.layer, CodedConv2d):
        return found
    found |= {"content": content_share(seen.layer.signal(seen.input[None].to(next(seen.layer.parameters()))))}
    if isinstance(seen.layer, ACDAConv2d):
        found |= {
            "cosine_distance": code_distance(seen.layer, seen.code),
            "cosine_distance_by_scale": distance_by_scale(seen.layer, seen.code),
        }
    if isinstance(seen.layer, PAFUConv2d):
        shares = seen.code.mean((1, 2))
        entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
        found |= {"shares": [round(float(s), 6) for s in shares], "effective_kernels": float(entropy.exp())}
    if isinstance(seen.layer, SEKGConv2d):
        about_static, about_mean = kernel_energy(seen.layer, seen.code)
        found |= {"energy_about_static": float(about_static.mean()), "energy_about_mean": float(about_mean.mean())}
    return found


@torch.no_grad()
def content_share(signal: Tensor) -> float:
    """Fraction of the energy of a generator's map (N, features, H, W) that varies over the pixels of an image, 0 to 1."""
    signal = signal.float()
    energy = signal.square().mean((1, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny)
    return float((signal.flatten(2).var(2, correction=0).mean(1) / energy).mean())


def alpha_by_scale(layer: ACDAConv2d, code: Tensor) -> dict[str, Tensor]:
    """The coefficients (m, elements, H, W) of each scale, by the size of its box; those of the extra elements as "weights"."""
    alpha = code.unflatten(0, (layer.config.atoms, -1))
    found: dict[str, Tensor] = {}
    first = 0
    for height, width in scale_boxes(layer.geometry.kernel_size, layer.config.scales):
        elements = len(fourier_bessel((height, width), layer.config.basis_size))
        found[f"{height}x{width}"] = alpha[:, first : first + elements]
        first += elements
    if first < alpha.shape[1]:
        found[FROM_WEIGHTS] = alpha[:, first:]
    return found


def distance_by_scale(layer: ACDAConv2d, code: Tensor) -> dict[str, float | None]:
    """The cosine distance of each scale's coefficients, for the code (V, H, W) of one image."""
    scales = alpha_by_scale(layer, code)
    return {name: cosine_distance(alpha.flatten(0, 1).flatten(1)) for name, alpha in scales.items()}


def code_distance(layer: CodedConv2d, code: Tensor) -> float | None:
    """1 - cos of two pixels' codes, averaged over all pairs of an image (ACDA, A.5); code (V, H, W).

    For ACDA, the mean over its scales, without the elements derived from weights. For PAFU, the probability that two pixels select
    different kernels.
    """
    if not isinstance(layer, ACDAConv2d):
        return cosine_distance(code.flatten(1))
    told = [d for name, d in distance_by_scale(layer, code).items() if name != FROM_WEIGHTS and d is not None]
    return sum(told) / len(told) if told else None


def cosine_distance(vectors: Tensor) -> float | None:
    """Average of 1 - cos over all pairs of different columns of (V, P): ACDA, appendix A.5, for one scale of one image.

    The sum over all pairs follows from the sum of the unit vectors, so no pair is left out. Zero vectors have no direction;
    None if fewer than two columns have one.
    """
    columns = vectors.double()
    lengths = columns.norm(dim=0)
    units = columns[:, lengths > 0] / lengths[lengths > 0]
    n = units.shape[1]
    if n < 2:
        return None
    pairs: float = float(units.sum(1).square().sum()) - n
    distance: float = 1 - pairs / (n * (n - 1))
    return max(0.0, distance)


def kernel_energy(layer: SEKGConv2d, code: Tensor) -> tuple[Tensor, Tensor]:
    """Energy (H, W) of the DConv's kernels minus their static part, and minus their mean over the image.

    Both are summed over channels, as fractions of the energy of the static kernels.
    """
    with torch.no_grad():
        scale = layer.static_energy().float().clamp_min(torch.finfo(torch.float32).tiny)
        rows = code.movedim(0, -1)
        mean = rows.mean((0, 1))
        return layer.energy_of(rows) / scale, layer.energy_of(rows - mean) / scale


def told(values: dict[str, Any]) -> str:
    """The most important number, for a table."""
    if values.get("cosine_distance") is not None:
        return f"cosine distance {values['cosine_distance']:.2g}"
    if "effective_kernels" in values:
        return f"{values['effective_kernels']:.2f} of {len(values['shares'])} kernels"
    if "energy_about_mean" in values:
        return f"kernel energy {values['energy_about_mean']:.2g}"
    return "-"
