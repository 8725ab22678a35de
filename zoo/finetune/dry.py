"""A run without training: the data checked, one step and one validation batch tried, the cost of a step predicted."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.costs import Cost, cost
from surgeon.errors import SurgeonError
from surgeon.zoo.finetune.config import FinetuneConfig
from surgeon.zoo.finetune.devices import make_accelerator, release
from surgeon.zoo.finetune.evaluation import evaluate
from surgeon.zoo.finetune.journal import TrainingJournal
from surgeon.zoo.finetune.loop import Data, Run, Trainer
from surgeon.zoo.finetune.networks import Source, bound_to, original_of
from surgeon.zoo.finetune.optimizer import make_optimizer
from surgeon.zoo.finetune.run import random_state_kept, told_data
from surgeon.zoo.finetune.schedule import describe
from surgeon.zoo.finetune.state import Store, TrainingProgress
from surgeon.zoo.tasks import Task


@dataclass(kw_only=True)
class DryRun:
    """Preview of a run: its length, its parameter groups, one step tried on a copy (`loss`, `seconds`), the cost of a step."""

    steps: int
    epochs: float
    train_samples: int
    val_samples: int
    loss: float
    seconds: float
    groups: list[dict[str, Any]]
    cost: Cost | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {key: value for key, value in vars(self).items() if key != "cost"}
        return values | {"cost": None if self.cost is None else self.cost.to_dict()}


def dry_run(
    model: nn.Module,
    task: Task,
    config: FinetuneConfig | None = None,
    *,
    original: nn.Module | None = None,
    source: Source | None = None,
) -> DryRun:
    """Check the data, try one validation batch and one step on a copy, and predict the cost of a step on a GPU.

    Nothing is written. Raises what a run would: `DataError`, `ConfigError`, `InputError`.
    """
    config = config or FinetuneConfig()
    task.check()
    accelerator = make_accelerator(config)
    with random_state_kept(), tempfile.TemporaryDirectory() as place:
        work, _, notes = bound_to(model, task)
        original, more = original_of(work, task, original, config, source or Source())
        data = Data(task.dataset("train"), task.dataset("val"))
        found, note = _predicted(work, tuple(data.train[0]["input"].shape), config)
        teacher = original if config.distill else None
        trainer = Trainer(work, task, data, config, accelerator, teacher)
        store = Store(Path(place), trainer.plan.checkpoint_every)
        run = Run(trainer, store, TrainingJournal(None, quiet=True), TrainingProgress())
        evaluate(trainer.result, task, data.val, config, accelerator, most=1)  # a run begins with an evaluation
        loss = run.once()
        groups = describe(trainer.optimizer, trainer.groups)
        told = task.told_images(work, None if source is None else source.base)
        release(accelerator, trainer.wrapped, trainer.own_forward)
    return DryRun(
        steps=trainer.plan.total,
        epochs=trainer.plan.epoch(trainer.plan.total),
        train_samples=len(data.train),
        val_samples=len(data.val),
        loss=loss,
        seconds=run.progress.seconds,
        groups=groups,
        cost=found,
        notes=[*told, *notes, *more, *told_data(work, task, data), *note],
    )


def _predicted(model: nn.Module, size: tuple[int, ...], config: FinetuneConfig) -> tuple[Cost | None, list[str]]:
    """The cost of a training step for one process, or a note explaining why it is unknown."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return make_optimizer([{"params": list(parameters)}], config)

    optimizer.__name__ = config.opt
    try:
        found = cost(
            model,
            input_size=size,
            batch_size=config.batch_size,
            optimizer=optimizer,
            amp=config.amp_dtype or False,
            channels_last=config.channels_last,
            weight_decay=config.weight_decay,
            accumulate=config.accumulate,
            checkpointing=config.checkpointing,
        )
    except SurgeonError as error:
        return None, [f"the cost of a step cannot be predicted: {error}"]
    notes = ["the predicted memory covers the model and the optimizer; averages (ema) and a teacher are extra"]
    return found, notes if config.ema or config.distill else []
