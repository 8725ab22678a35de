"""Detects NaN and infinity and rolls training back."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from surgeon.errors import ConfigError, TrainingError
from surgeon.zoo.finetune.state import TrainingProgress
from surgeon.zoo.tasks import Batch

# A loss scaler in float16 starts at 2**16 and halves at every overflow: this many in a row are not a search for a scale.
_MOST_SKIPPED = 20


class NotFiniteError(Exception):
    """A step produced NaN or infinity; the message names the value."""


@contextmanager
def one_value_told(batch: Batch) -> Iterator[None]:
    """Report a BatchNorm that gets one value per channel in one line; raises `ConfigError`."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"a BatchNorm gets a single value per channel from a batch {tuple(batch['input'].shape)} in training, which has "
            "no variance: keep its statistics with --freeze-bn, or use a larger --batch-size"
        ) from error


class Guard:
    """Raises `NotFiniteError` for a step that must not count, and computes how the run continues after it."""

    def __init__(self, *, most: int, factor: float) -> None:
        self.most, self.factor = most, factor
        self.skipped = 0

    def check(self, loss: float, norm: float, *, scaled: bool) -> None:
        """Check a step's mean loss and gradient norm. A loss scaler (`scaled`) skips infinite gradients itself."""
        if not math.isfinite(loss):
            raise NotFiniteError(f"the loss is {loss}")
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if self.skipped > (_MOST_SKIPPED if scaled else 0):
            raise NotFiniteError(f"the norm of the gradient is {norm}")

    def check_weights(self, model: nn.Module) -> None:
        """Check all parameters before they become a state to roll back to."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
            bad = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
            raise NotFiniteError(f"the weights of {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''} are not finite")

    def rolled_back(
        self, error: NotFiniteError, failed: int, before: TrainingProgress, state: TrainingProgress
    ) -> TrainingProgress:
        """The progress with which a run continues from `state` after `failed`; raises `TrainingError` after too many rollbacks."""
        rollbacks = before.rollbacks + 1
        if rollbacks > self.most:
            raise TrainingError(
                f"step {failed}: {error}, after {before.rollbacks} rollbacks to earlier checkpoints with lower rates (the last: "
                f"times {before.lr_factor:g}). Lower --lr or --new-lr-scale, lengthen --warmup, or check the data"
            )
        self.skipped = 0
        state.rollbacks, state.lr_factor, state.seconds = rollbacks, before.lr_factor * self.factor, before.seconds
        return state
