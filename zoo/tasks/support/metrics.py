"""Metrics from torchmetrics, per image where papers average over images. Values are float32 tensors in [0, 1].

torchmetrics takes seconds to import, so it is imported on use.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import Metric

BEST_PSNR = 100.0  # dB, also for a perfect image, so that means stay finite
_WINDOW = 5  # pixels by which SSIM's 11x11 Gaussian window extends over an edge


def image_mean() -> "Metric":
    """Mean of one value per image. NaN stays NaN: it must not vanish from the mean."""
    from torchmetrics import MeanMetric

    metric: Metric = MeanMetric(nan_strategy="disable")
    return metric


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every image (N) over all its pixels, dB, at most 100; the output is clipped to [0, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    values: Tensor = peak_signal_noise_ratio(
        output.float().clamp(0, 1), target.float(), data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    return values.clamp(max=BEST_PSNR)


def ssim(output: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of every image (N), mean over channels; the output is clipped to [0, 1].

    Wang et al. (2004), window 11x11 with sigma 1.5, only where it is inside the image (as in their program and the papers;
    torchmetrics by default also averages over the mirrored border). Images of less than 11 pixels are used whole.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, values = structural_similarity_index_measure(
        output.float().clamp(0, 1), target.float(), data_range=1.0, sigma=1.5, reduction="none", return_full_image=True
    )
    if min(values.shape[-2:]) > 2 * _WINDOW:
        values = values[..., _WINDOW:-_WINDOW, _WINDOW:-_WINDOW]
    mean: Tensor = values.mean((1, 2, 3))
    return mean


def eight_bit(x: Tensor) -> Tensor:
    """Rounded to values that an 8-bit file can store."""
    return (x.float().clamp(0, 1) * 255).round() / 255


def pixel_loss(kind: str, output: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements of |d| (l1), d² (mse) or sqrt(d² + 1e-6) (charbonnier), d = output - target."""
    difference = output - target
    if kind == "l1":
        return difference.abs().mean()
    if kind == "mse":
        return difference.square().mean()
    return torch.sqrt(difference.square() + 1e-6).mean()


PIXEL_LOSSES = ("l1", "mse", "charbonnier")
