"""Normalization inside a generator, which without it hardly sees its input (docs/gains.md)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError

NORMS = ("batch",)


class SignalNorm(nn.BatchNorm2d):
    """BatchNorm over the maps (N, C, H, W) inside a generator.

    The running statistics start as those of the first batch: if they started at (0, 1), eval mode would not see small features for
    about a hundred steps. Batch statistics need two values per channel: given only one (one image, one pixel), training uses the
    running statistics and leaves them unchanged, as eval mode does. Fine-tuning's `freeze_bn` does not apply: the norm is new
    and has no statistics worth keeping.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        normalized = F.batch_norm(input, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = self.num_batches_tracked.to(mean.dtype).reciprocal().clamp(min=self.momentum or 0.0)
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance, share)
        return normalized


def check_norm(owner: str, norm: str | None) -> None:
    """Raise `ConfigError` unless `norm` names a normalization or is None."""
    if norm is not None and norm not in NORMS:
        raise ConfigError(f"{owner}: norm must be {', '.join(map(repr, NORMS))} or None, got {norm!r}")


def batch_statistics(module: nn.Module) -> bool:
    """Whether a norm inside the module uses batch statistics, so that no part of an image can be computed alone."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules())
