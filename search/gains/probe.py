"""Gains by training: few-step probes, one-layer fine-tuning under successive halving, and grow-all-then-ablate.

    probe      only the layer is trained, for a few steps of the training's optimizer at its peak rates, with the option and
               as the original convolution; gain = difference of the losses on held-out samples
    halving    the whole network is fine-tuned with one layer replaced, and unmodified; gain = difference of the task's primary
               metric; after every round the worse half of the entries is dropped, and the rest get twice the steps
    ablation   all layers have the option at once and the network is fine-tuned; gain = drop of the primary metric when one layer
               falls back to its plain convolution, which was trained in the same run

Every entry is a mean over seeds; both sides of a difference have the same seed, and so the same samples in the same order.
The standard error is that of the mean over seeds. Higher is better for any metric.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.layers.regularizer import regularization
from surgeon.search.evaluate.training import ShortConfig, TrainingEvaluator
from surgeon.search.gains.gain import GainTable
from surgeon.search.gains.names import LEAST_SEEDS
from surgeon.search.placement.problem import Floats, Ints
from surgeon.search.space import Space
from surgeon.surgery.rewrite import static
from surgeon.util.copying import seed_torch
from surgeon.util.progress import OnProgress
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.finetune.batches import Draws, mixed, to_device
from surgeon.zoo.finetune.optimizer import make_optimizer
from surgeon.zoo.finetune.parameters import group_parameters, optimizer_groups
from surgeon.zoo.tasks import Batch, Task


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """`steps` per training (for "halving", in its first round), number of `seeds`; `batches` measure a probe's loss."""

    steps: int = 20
    seeds: int = 2
    batches: int = 4

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("seeds", LEAST_SEEDS), ("batches", 1)):
            if getattr(self, name) < least:
                why = ": the standard error is over seeds" if name == "seeds" else ""
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}{why}")


class _Values:
    """Gains of entries by seed, and the resulting table."""

    def __init__(self, space: Space, estimator: str, config: ProbeConfig) -> None:
        self.space, self.estimator, self.config = space, estimator, config
        self.gain: Floats = np.zeros(space.allowed.shape)
        self.error: Floats = np.zeros(space.allowed.shape)
        self.trainings = 0
        self._started = time.perf_counter()

    def set(self, layer: int, option: int, found: Sequence[float]) -> None:
        self.gain[layer, option] = np.mean(found)
        self.error[layer, option] = np.std(found, ddof=1) / np.sqrt(len(found))

    def table(self, **facts: Any) -> GainTable:
        config = self.config
        return GainTable(
            layers=self.space.layers,
            options=self.space.labels,
            gain=self.gain,
            error=self.error,
            estimator=self.estimator,
            facts={
                "seconds": time.perf_counter() - self._started,
                "steps": config.steps,
                "seeds": config.seeds,
                "trainings": self.trainings,
                **facts,
            },
        )


def _seeds(evaluator: TrainingEvaluator, config: ProbeConfig) -> range:
    """The requested number of seeds, starting at the training's own."""
    first = evaluator.config.base.seed
    return range(first, first + config.seeds)


def entries(space: Space) -> list[tuple[int, int]]:
    """(layer, option) of all allowed replacements, by layer."""
    return [(int(i), int(j)) for i, j in zip(*np.nonzero(space.allowed), strict=True) if j]


def single(space: Space, layer: int, option: int) -> Ints:
    """The placement that replaces one layer."""
    placement = np.zeros(len(space.layers), dtype=np.int64)
    placement[layer] = option
    return placement


# --- few-step probes ----------------------------------------------------------------------------------------------


def probe_gains(evaluator: TrainingEvaluator, config: ProbeConfig, progress: OnProgress | None = None) -> GainTable:
    """Train one layer for a few steps, with each option and as a convolution; normalization uses its running statistics."""
    space, values = evaluator.space, _Values(evaluator.space, "probe", config)
    batches = [_Batches(evaluator, config, seed) for seed in _seeds(evaluator, config)]
    todo = entries(space)
    plain: dict[int, list[float]] = {}
    for number, (layer, option) in enumerate(todo):
        if progress is not None:
            progress("gains: layers and options", number, len(todo))
        if layer not in plain:
            plain[layer] = [_probe(evaluator, single(space, layer, 0), layer, own) for own in batches]
            values.trainings += config.seeds
        found = [_probe(evaluator, single(space, layer, option), layer, own) for own in batches]
        values.trainings += config.seeds
        values.set(layer, option, [before - after for before, after in zip(plain[layer], found, strict=True)])
    return values.table(unit="decrease of the loss")


class _Batches:
    """The samples of one seed: `training` ones, and held-out ones for measuring."""

    def __init__(self, evaluator: TrainingEvaluator, config: ProbeConfig, seed: int) -> None:
        self.seed, base = seed, evaluator.config.base
        samples = evaluator.task.dataset("train")
        held = max(len(samples) // 4, 1) if len(samples) > 1 else 0
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(mixed(seed, "held"))).tolist()
        apart, rest = order[:held] or order, order[held:]
        size, task = base.batch_size, evaluator.task
        self.training = [
            task.collate([samples[rest[d % len(rest)] + d // len(rest) * len(samples)] for d in draws])
            for draws in _first(Draws(len(rest), size, seed=seed, start=0), config.steps)
        ]
        chosen = apart[: config.batches * size]
        self.held = [task.collate([samples[d] for d in chosen[i : i + size]]) for i in range(0, len(chosen), size)]


def _first(batches: Iterable[list[int]], count: int) -> list[list[int]]:
    return [batch for batch, _ in zip(batches, range(count), strict=False)]


def _probe(evaluator: TrainingEvaluator, placement: Ints, layer: int, batches: _Batches) -> float:
    """The loss on held-out samples after a few steps of one layer alone."""
    base, task = evaluator.config.base, evaluator.task
    device = torch.device("cuda" if torch.cuda.is_available() and base.device != "cpu" else "cpu")
    model = evaluator.converted(placement, seed=batches.seed)[0].to(device).eval().requires_grad_(False)
    module = model.get_submodule(evaluator.space.layers[layer])
    module.requires_grad_(True).train()  # a selector (PAFU's) learns only in training mode
    optimizer = make_optimizer(optimizer_groups(group_parameters(model, base), base), base)
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    # a probe must not change even the global generators
    with torch.random.fork_rng():
        for step, batch in enumerate(batches.training):
            seed_torch(mixed(batches.seed, "probe", step))
            batch = to_device(batch, device, channels_last=False)
            batch = task.augment(batch, torch.Generator().manual_seed(mixed(batches.seed, "augment", step)))
            loss = task.loss(task.forward(model, batch), batch) + base.regularization * regularization(model)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if base.clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), base.clip)
            optimizer.step()
    return _loss(model.eval(), task, batches.held, device)


def _loss(model: nn.Module, task: Task, batches: Sequence[Batch], device: torch.device) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            batch = to_device(batch, device, channels_last=False)
            size = len(batch["input"])
            loss: Tensor = task.loss(task.forward(model, batch), batch)
            total, count = total + float(loss) * size, count + size
    return total / count


# --- one-layer fine-tuning under successive halving ---------------------------------------------------------------


def halving_gains(evaluator: TrainingEvaluator, config: ProbeConfig, progress: OnProgress | None = None) -> GainTable:
    """Fine-tune the whole network with one layer replaced; an entry's gain is that of its last round."""
    values = _Values(evaluator.space, "halving", config)
    short = _with_steps(evaluator, config.steps)
    left, rung, seeds = entries(evaluator.space), 0, _seeds(evaluator, config)
    while left:
        plain = [_value(short, single(evaluator.space, 0, 0), rung, seed) for seed in seeds]
        values.trainings += config.seeds
        for number, (layer, option) in enumerate(left):
            if progress is not None:
                progress(f"gains, round {rung + 1}: layers and options", number, len(left))
            placement = single(evaluator.space, layer, option)
            found = [_value(short, placement, rung, seed) - before for seed, before in zip(seeds, plain, strict=True)]
            values.trainings += config.seeds
            values.set(layer, option, found)
        if len(left) <= 2:
            break
        left = sorted(left, key=lambda entry: -values.gain[entry])[: (len(left) + 1) // 2]
        rung += 1
    return values.table(unit=evaluator.task.primary, rounds=rung + 1)


def _with_steps(evaluator: TrainingEvaluator, steps: int) -> TrainingEvaluator:
    config = ShortConfig(steps=steps, evaluations=1, base=evaluator.config.base)
    return TrainingEvaluator(evaluator.model, evaluator.task, evaluator.space, config, base=evaluator.base)


def _value(evaluator: TrainingEvaluator, placement: Ints, rung: int, seed: int) -> float:
    """The primary metric after fine-tuning, higher being better."""
    value = evaluator.train(placement, rung=rung, seed=seed).metrics[evaluator.task.primary]
    return float(value if evaluator.task.higher_is_better else -value)


# --- grow all, then ablate ----------------------------------------------------------------------------------------


def ablation_gains(evaluator: TrainingEvaluator, config: ProbeConfig, progress: OnProgress | None = None) -> GainTable:
    """One fine-tuning run per option and seed, with the option in all allowed layers; then with one layer at a time without it."""
    space, task = evaluator.space, evaluator.task
    values = _Values(space, "ablation", config)
    short, sign = _with_steps(evaluator, config.steps), 1.0 if task.higher_is_better else -1.0
    total = (len(space.labels) - 1) * config.seeds
    for option in range(1, len(space.labels)):
        placement = np.where(space.allowed[:, option], option, 0)
        layers = np.flatnonzero(placement)
        lost: dict[int, list[float]] = {int(layer): [] for layer in layers}
        for number, seed in enumerate(_seeds(evaluator, config) if len(layers) else ()):
            if progress is not None:
                progress("gains: trainings", (option - 1) * config.seeds + number, total)
            model = short.train(placement, seed=seed).model
            values.trainings += 1
            whole = _metric(model, evaluator)
            for layer, found in lost.items():
                with static(model, [space.layers[layer]]):
                    found.append(sign * (whole - _metric(model, evaluator)))
        for layer, found in lost.items():
            values.set(layer, option, found)
    return values.table(unit=task.primary)


def _metric(model: nn.Module, evaluator: TrainingEvaluator) -> float:
    base = evaluator.config.base
    found = evaluate(model, evaluator.task, batch_size=base.eval_batch_size or base.batch_size, workers=base.workers)
    return found[evaluator.task.primary]


def training_batches(task: Task, count: int, size: int, seed: int) -> list[Batch]:
    """`count` training batches of equal size, without batch augmentation."""
    samples = task.dataset("train")
    draws = _first(Draws(len(samples), size, seed=seed, start=0), count)
    return [task.collate([samples[d] for d in batch]) for batch in draws]
