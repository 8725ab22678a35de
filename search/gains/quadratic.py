"""The noisy quadratic model of a short training: the effect of its own steps on the loss, including gradient noise.

Around the converted network the loss is modeled as m·x + ½ xᵀHx in a layer's new parameters x, with m the mean gradient and H the
empirical Fisher matrix, n times the covariance V of the gradients of batches of n samples. In the eigenvectors of V, which follow
from the gradients of a few batches, the coordinates are independent: mean and variance after the training's steps (rates,
schedule, momentum) are exact, and so is the expected decrease of the loss. Steps that overshoot or only add noise make it
negative, and dominate short trainings. An optimizer that scales its steps by the gradients' size (Adam) behaves the same in
coordinates scaled by (E g²)^¼. The model is unbounded but a loss is not: predictions are compressed by asinh, which barely changes
small ones. Zhang et al., "Which Algorithmic Choices Matter at Which Batch Sizes? Insights From a Noisy Quadratic Model" (2019).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from surgeon.search.placement.problem import Floats
from surgeon.zoo.finetune import FinetuneConfig
from surgeon.zoo.finetune.parameters import ROLES, Group, new_lr_scales, slowdowns
from surgeon.zoo.finetune.schedule import Rates, RunPlan

_LINEAR = ("sgd", "momentum", "nesterov")  # timm optimizers whose steps are sums of gradients
_DIVERGED = 1e9  # displacement per unit of gradient from which no training recovers


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Steps of the new parameters in a training: learning rates by step, momentum, batches per step.

    `adaptive`: steps are scaled by the size of each parameter's gradients. The rates are multiplied by `scale`, or if None, by
    that of each layer's type; `fan_in`: the weights with which generators end are slowed (`group_parameters`).
    """

    rates: tuple[float, ...]
    momentum: float = 0.0
    accumulate: int = 1
    adaptive: bool = False
    scale: float | None = 1.0
    fan_in: bool = False

    def scales(self, model: nn.Module) -> dict[int, float]:
        """The multiples of the rates at which new parameters learn, by id."""
        slowed = slowdowns(model) if self.fan_in else {}
        return {key: scale / slowed.get(key, 1.0) for key, scale in new_lr_scales(model, self.scale).items()}


def walk_of(config: FinetuneConfig, samples: int) -> Walk:
    """The steps of a training on this many samples. Clipping, weight decay and Nesterov's correction are ignored."""
    # no parameters: only the plan's lengths are needed
    plan = RunPlan.make(config, samples, [Group(role, True, {}) for role in ROLES])
    group = {"params": [torch.zeros(1)], "role": "new"}
    rates = Rates(torch.optim.SGD([group], lr=config.lr), config, plan)
    moves = [rates.set(step)["new"] if "new" in plan.active(step) else 0.0 for step in range(plan.total)]
    adaptive = config.opt not in _LINEAR
    # Adam's average is normalized: it delays a gradient's step but does not lengthen it
    momentum = 0.0 if adaptive else config.momentum
    return Walk(
        rates=tuple(moves),
        momentum=momentum,
        accumulate=config.accumulate,
        adaptive=adaptive,
        scale=config.new_lr_scale,
        fan_in=config.fan_in_lr,
    )


def scaled(gradients: Floats) -> Floats:
    """(B, P) gradients in the coordinates in which an adaptive optimizer's steps are plain ones."""
    size = np.mean(gradients * gradients, axis=0)
    found: Floats = gradients * np.where(size > 0, size, np.inf) ** -0.25
    return found


def decrease(gram: Floats, walk: Walk, samples: int) -> float:
    """The expected decrease, compressed, from the (B, B) inner products of the gradients of B >= 3 batches of `samples` each.

    Directions in which the batches do not differ are left out: their curvature is unknown.
    """
    if not np.isfinite(gram).all():
        return float("nan")  # rejected by the gain table; such a matrix has no eigenvalues
    count = len(gram)
    centered = gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean()
    values, vectors = np.linalg.eigh(centered)
    kept = values > values[-1] * 1e-9
    if not kept.any() or values[-1] <= 0:
        return 0.0
    variance: Floats = values[kept] / (count - 1)
    # coordinates of the mean gradient
    toward = (gram.mean(axis=1) - gram.mean()) @ vectors[:, kept] / np.sqrt(values[kept])
    mean, spread = _end(samples * variance, variance / walk.accumulate, walk)
    square = toward**2 - variance / count  # unbiased
    change = (mean + 0.5 * samples * variance * mean**2) * square + 0.5 * samples * variance * spread
    return -float(np.arcsinh(change.sum()))


def _end(curvature: Floats, noise: Floats, walk: Walk) -> tuple[Floats, Floats]:
    """Displacement per unit of mean gradient, and variance of the displacement, after all steps, per coordinate."""
    speed, place = np.zeros_like(curvature), np.zeros_like(curvature)
    place_place, place_speed, speed_speed = np.zeros_like(noise), np.zeros_like(noise), np.zeros_like(noise)
    for rate in walk.rates:
        if np.abs(place).max() > _DIVERGED:
            break
        speed = walk.momentum * speed + curvature * place + 1.0
        place = place - rate * speed
        # covariance of (place, speed) under speed' = momentum·speed + curvature·place + noise, place' = place − rate·speed'
        across = walk.momentum * place_speed + curvature * place_place  # of place and speed'
        speed_speed = (
            walk.momentum * (walk.momentum * speed_speed + curvature * place_speed) + curvature * across + noise
        )
        place_place = place_place - 2 * rate * across + rate**2 * speed_speed
        place_speed = across - rate * speed_speed
    return place, place_place
