"""Normalization of the signal inside a generator, without which it hardly sees its input (docs/gains.md)."""

import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError

NORMS = ("batch",)


class SignalNorm(nn.BatchNorm2d):
    """BatchNorm over the maps (N, C, H, W) inside a generator.

    Batch statistics need two values per channel. Given a single one (one image, one pixel), training uses the running statistics
    and leaves them alone, as eval mode does. `freeze_bn` of a fine-tuning does not apply: the norm comes with the conversion and
    has no statistics worth keeping yet.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def check_norm(owner: str, norm: str | None) -> None:
    """Raise `ConfigError` unless `norm` names a normalization or is None."""
    if norm is not None and norm not in NORMS:
        raise ConfigError(f"{owner}: norm must be {', '.join(map(repr, NORMS))} or None, got {norm!r}")


def batch_statistics(module: nn.Module) -> bool:
    """Whether a norm inside of a module normalizes by what is in the batch, so that no part of an image can be computed alone."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules())
