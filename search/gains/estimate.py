"""Gain estimators that need only gradients at initialization: no training step, all layers have the option at the same time.

Conversion preserves the function, so all layers can have the option at once, and one backward pass per batch gives the
gradient of every new parameter, stored in 4·B bytes per parameter. With g_b the mean gradient of batch b (n samples each,
B batches), per parameter: mean m, variance v over batches, n·v an estimate of the diagonal of the (empirical) Fisher matrix,
m² − v/B an unbiased square of the gradient.

    gradient   ‖m‖, the baseline: not comparable between layers of different scale
    fisher     ½ Σ max(m² − v/B, 0) / (n·v + damping), the form of a decrease by a diagonal natural-gradient step, but no such
               decrease: of pure noise, too, a positive part remains for every parameter, and directions that parameters share
               count once for each. It grows with their number
    snr        Σ (m² − v/B) / Σ v/B, the signal-to-noise ratio of the gradient
    nqm        the decrease predicted for the training's own steps by the noisy quadratic model: `surgeon.search.gains.quadratic`

Standard errors are from a jackknife over groups of batches.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.layers.base import DynamicConv2d
from surgeon.search.gains.gain import GainTable
from surgeon.search.gains.names import ESTIMATORS, LEAST_BATCHES
from surgeon.search.gains.quadratic import Walk, decrease, scaled
from surgeon.search.placement.problem import Floats, Ints
from surgeon.search.space import Space
from surgeon.surgery.convert import convert
from surgeon.util.copying import seed_torch
from surgeon.util.progress import OnProgress

LossCallback = Callable[[nn.Module, Any], Tensor]  # loss(model, batch) -> mean loss of the batch, a scalar
DAMPING = 0.1  # relative to the mean of a layer's Fisher diagonal
_GROUPS = 8


def gradient_gains(
    model: nn.Module,
    space: Space,
    loss: LossCallback,
    batches: Sequence[Any],
    *,
    estimators: Sequence[str] = tuple(ESTIMATORS),
    damping: float = DAMPING,
    walk: Walk | None = None,
    seed: int = 0,
    input_size: Any = None,
    progress: OnProgress | None = None,
) -> dict[str, GainTable]:
    """Gain tables by estimator, all from the same passes: one backward pass per (option, batch).

    Args:
        model: not modified; the passes run on its device. Normalization layers use their running statistics.
        loss: maps a model and a batch, an element of `batches`, to the mean loss.
        batches: at least 4, of equal size; a batch is a dict of tensors, a tensor, or a sequence of them.
        damping: for "fisher", relative to the mean of a layer's Fisher diagonal.
        walk: the training predicted by "nqm" (`walk_of`); needed only for it.
        seed: for random draws of layers in training mode (PAFU's selection).
    """
    unknown = [name for name in estimators if name not in ESTIMATORS]
    if unknown:
        raise ConfigError(f"there is no gain estimator {unknown[0]!r}; there are {', '.join(ESTIMATORS)}")
    if "nqm" in estimators and walk is None:
        raise ConfigError("the gain estimator nqm predicts a training and needs one (walk)")
    if len(batches) < LEAST_BATCHES:
        raise ConfigError(f"the variance of gradients needs at least {LEAST_BATCHES} batches, got {len(batches)}")
    samples = _samples(batches[0])
    started = time.perf_counter()
    losses: list[float] = []
    gain = {name: np.zeros(space.allowed.shape) for name in estimators}
    error = {name: np.zeros(space.allowed.shape) for name in estimators}
    for j in range(1, len(space.labels)):
        found = _gradients(model, space, j, loss, batches, walk, seed, input_size, progress, losses)
        for layer, (gradients, scales) in found.items():
            i = space.layers.index(layer)
            for name in estimators:
                gain[name][i, j], error[name][i, j] = _jackknife(
                    _statistic(name, gradients, scales, samples, damping, walk), len(batches)
                )
    facts = {"seconds": time.perf_counter() - started, "batches": len(batches), "samples": samples, "seed": seed}
    facts |= {"loss": float(np.mean(losses))} if losses and np.isfinite(losses).all() else {}
    return {
        name: GainTable(
            layers=space.layers,
            options=space.labels,
            gain=gain[name],
            error=error[name],
            estimator=name,
            facts=facts | {"unit": ESTIMATORS[name]},
        )
        for name in estimators
    }


def _samples(batch: Any) -> int:
    """Number of samples in a batch: the first dimension of its first tensor."""
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else [batch]
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return int(value.shape[0])
    raise ConfigError(
        f"a batch must contain a tensor whose first dimension is the number of samples, got {type(batch).__name__}"
    )


def _gradients(
    model: nn.Module,
    space: Space,
    option: int,
    loss: LossCallback,
    batches: Sequence[Any],
    walk: Walk | None,
    seed: int,
    input_size: Any,
    progress: OnProgress | None,
    losses: list[float],
) -> dict[str, tuple[Tensor, Tensor]]:
    """For every layer that may have this option, the gradients of its new parameters, (B, P), float32 on the CPU, and the multiples
    of the walk's rates at which they learn, (P,). Appends the loss of every batch to `losses`.
    """
    placement = np.where(space.allowed[:, option], option, 0)
    if not placement.any():
        return {}
    work, _ = convert(model, recipe=space.recipe(placement), seed=seed, check=False, input_size=input_size)
    work.eval()
    work.requires_grad_(False)
    layers: dict[str, list[Tensor]] = {}
    for layer in space.names(placement):
        module = work.get_submodule(layer)
        assert isinstance(module, DynamicConv2d)
        module.train()  # a layer that selects (PAFU) passes gradients to its selector only in training
        layers[layer] = [parameter.requires_grad_(True) for _, parameter in module.new_parameters()]
    kept = {
        layer: torch.empty(len(batches), sum(parameter.numel() for parameter in parameters))
        for layer, parameters in layers.items()
    }
    with torch.random.fork_rng():
        seed_torch(seed)
        for number, batch in enumerate(batches):
            if progress is not None:
                progress("gains: batches", (option - 1) * len(batches) + number, (len(space.labels) - 1) * len(batches))
            work.zero_grad(set_to_none=True)
            found = loss(work, batch)
            found.backward()
            losses.append(float(found.detach()))
            for layer, parameters in layers.items():
                kept[layer][number] = torch.cat([_gradient(parameter).flatten() for parameter in parameters])
    scales = walk.scales(work) if walk else {}
    return {
        layer: (kept[layer], torch.cat([torch.full((p.numel(),), scales.get(id(p), 1.0)) for p in parameters]))
        for layer, parameters in layers.items()
    }


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def _jackknife(statistic: Callable[[Ints], float], count: int) -> tuple[float, float]:
    """A statistic of all batches, and its standard error from leaving out one group of batches at a time."""
    groups = min(_GROUPS, count)
    group = np.arange(count) * groups // count
    parts: Floats = np.array([statistic(np.flatnonzero(group != left)) for left in range(groups)])
    return statistic(np.arange(count)), float(np.sqrt((groups - 1) / groups * ((parts - parts.mean()) ** 2).sum()))


def _statistic(
    estimator: str, gradients: Tensor, scales: Tensor, samples: int, damping: float, walk: Walk | None
) -> Callable[[Ints], float]:
    """A function from the numbers of some batches to the gain estimated from their gradients (B, P)."""
    gradients = gradients.double()
    if estimator == "nqm":
        assert walk is not None
        own = scaled(gradients.numpy()) if walk.adaptive else gradients.numpy()
        own = own * scales.sqrt().numpy()  # in these coordinates one rate holds for all
        gram = own @ own.T
        return lambda chosen: decrease(gram[np.ix_(chosen, chosen)], walk, samples)
    return lambda chosen: _of_moments(estimator, gradients[chosen], samples, damping)


def _of_moments(estimator: str, gradients: Tensor, samples: int, damping: float) -> float:
    mean = gradients.mean(dim=0)
    if estimator == "gradient":
        return float(mean.norm())
    variance = gradients.var(dim=0)
    square = mean * mean - variance / len(gradients)
    if estimator == "snr":
        noise = float((variance / len(gradients)).sum())
        return float(square.sum()) / noise if noise > 0 else 0.0
    fisher = samples * variance
    step = fisher + damping * fisher.mean()
    return float((square.clamp_min(0) / step.clamp_min(torch.finfo(step.dtype).tiny)).sum()) / 2
