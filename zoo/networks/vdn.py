"""Variational denoising: Yue et al., "Variational Denoising Network" (2019), as used in ACDA's Table 5 ("ACDA + VDNet").

One network predicts a Gaussian (mean, variance) for every value of the clean image, another an inverse Gamma distribution
(alpha, beta) for every value of the noise variance. The loss is the negative lower bound of the likelihood. Only the first network
is needed to denoise. It is the restoration network of `restorer`; the other is a chain of five 3×3 convolutions.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.records.recipe import Rule
from surgeon.zoo.comparators import start_at_zero
from surgeon.zoo.networks.ad_resnet import ACDA
from surgeon.zoo.networks.restorer import BLOCKS, INNER, WIDTH, Trunk
from surgeon.zoo.registry import Published, register
from surgeon.zoo.surgery import operate

_SIZE = (3, 64, 64)
_LOG_RANGE = (math.log(1e-8), math.log(1e4))  # as the authors' code has it
_SPREAD = 3.0  # standard deviation of the window in which the true noise is estimated, pixels; the authors' code
RULES = (Rule(layers="re:denoiser\\.blocks\\..*\\.conv2$", type="acda", options=ACDA),)


class NoisePosterior(NamedTuple):
    """Parameters of the clean image: `mean`, `variance`; of the noise variance: `alpha`, `beta`. All (N, C, H, W)."""

    mean: Tensor
    variance: Tensor
    alpha: Tensor
    beta: Tensor


class VDN(nn.Module):
    """Noisy image (N, C, H, W) in [0, 1] -> the mean of the clean image, same shape, not clipped. Starts at the identity.

    With `posterior` it returns the loss's inputs, a `NoisePosterior`; see the method of that name.
    """

    def __init__(self, channels: int = 3, width: int = WIDTH, inner: int = INNER, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.denoiser = Trunk(channels, 2 * channels, width, inner, blocks)
        start_at_zero(self.denoiser.up2)
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(3):
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.LeakyReLU(0.2)]
        self.noise = nn.Sequential(*layers, nn.Conv2d(64, 2 * channels, 3, padding=1))

    def forward(self, x: Tensor, posterior: bool = False) -> Tensor | NoisePosterior:
        if posterior:
            return self.posterior(x)
        correction: Tensor = self.denoiser(x)[:, : x.shape[1]]
        return x + correction

    def posterior(self, x: Tensor) -> NoisePosterior:
        """Inputs of the loss."""
        correction, log_variance = self.denoiser(x).chunk(2, dim=1)
        log_alpha, log_beta = self.noise(x).clamp(*_LOG_RANGE).chunk(2, dim=1)
        variance = log_variance.clamp(*_LOG_RANGE).exp()
        return NoisePosterior(x + correction, variance, log_alpha.exp(), log_beta.exp())


def variational_loss(
    found: NoisePosterior, noisy: Tensor, clean: Tensor, *, window: int = 7, prior_variance: float = 1e-6
) -> Tensor:
    """The negative evidence lower bound per element (Yue et al., Eq. 12-15), a scalar.

    `window` p is the side of the Gaussian window in which the true noise variance is estimated; `prior_variance` is the variance
    of the clean image around its true value.
    """
    mean, variance, alpha, beta = found
    half_window = window * window / 2
    truth = half_window * _blurred((noisy - clean).square(), window).clamp_min(1e-10)
    prior_alpha = half_window - 1
    expected = torch.log(beta) - torch.digamma(alpha)  # of the logarithm of the noise variance
    precision = alpha / beta
    likelihood = 0.5 * (expected + precision * ((noisy - mean).square() + variance))
    ratio = variance / prior_variance
    gaussian = 0.5 * ((mean - clean).square() / prior_variance + ratio - ratio.log() - 1)
    inverse_gamma = (
        (alpha - prior_alpha) * torch.digamma(alpha)
        + torch.lgamma(alpha.new_tensor(prior_alpha))
        - torch.lgamma(alpha)
        + prior_alpha * (torch.log(beta) - torch.log(truth))
        + alpha * (truth / beta - 1)
    )
    return (likelihood + gaussian + inverse_gamma).mean()


def _blurred(x: Tensor, window: int) -> Tensor:
    """x (N, C, H, W) under a Gaussian window of this odd side, reflecting at the border."""
    at = torch.arange(window, dtype=x.dtype, device=x.device) - window // 2
    line = torch.exp(-0.5 * (at / _SPREAD) ** 2)
    line = line / line.sum()
    r, channels = window // 2, x.shape[1]
    x = F.pad(x, (r, r, r, r), mode="reflect")
    x = F.conv2d(x, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


@register("vdn_conv", input_size=_SIZE)
def vdn_conv(channels: int = 3, width: int = WIDTH, inner: int = INNER, blocks: int = BLOCKS) -> nn.Module:
    """The convolutional counterpart of acda_vdn."""
    return VDN(channels, width, inner, blocks)


@register(
    "acda_vdn",
    input_size=_SIZE,
    plain="vdn_conv",
    rules=RULES,
    uncounted=r"^noise\.",
    published=Published(where="ACDA Table 5", params=1.97e6),
    difference="the published number is for the denoising network alone; the network for the noise, 116,038 parameters, is "
    "needed only for training",
)
def acda_vdn(
    channels: int = 3,
    width: int = WIDTH,
    inner: int = INNER,
    blocks: int = BLOCKS,
    layer_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Variational denoising with ACDA (ACDA Table 5, "ACDA + VDNet")."""
    return operate(VDN(channels, width, inner, blocks), RULES, (channels, *_SIZE[1:]), layer_options)
