"""Seconds of training steps of several networks, comparable although other work runs on the machine."""

import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from surgeon.costs.measure import in_turn
from surgeon.zoo.finetune.config import FinetuneConfig
from surgeon.zoo.finetune.devices import make_accelerator, release
from surgeon.zoo.finetune.journal import TrainingJournal
from surgeon.zoo.finetune.loop import Data, Run, Trainer
from surgeon.zoo.finetune.networks import bound_to
from surgeon.zoo.finetune.run import random_state_kept
from surgeon.zoo.finetune.state import Store, TrainingProgress
from surgeon.zoo.tasks import Task


def paced(networks: Sequence[nn.Module], task: Task, config: FinetuneConfig, *, rounds: int) -> list[list[float]]:
    """Seconds of `rounds` training steps of each network, in turn, after one each to warm up. Copies are trained, nothing is kept.

    A step is as in a run of these options, with its data. Raises what a run would.
    """
    data = Data(task.dataset("train"), task.dataset("val"))
    with random_state_kept(), tempfile.TemporaryDirectory() as place:
        trainers = [Trainer(bound_to(one, task)[0], task, data, config, make_accelerator(config)) for one in networks]
        try:
            steps = [_stepping(trainer, Path(place)) for trainer in trainers]
            return in_turn(steps, rounds=rounds, device=trainers[0].accelerator.device.type)
        finally:
            for trainer in trainers:
                release(trainer.accelerator, trainer.wrapped, trainer.own_forward)


def _stepping(trainer: Trainer, place: Path) -> Callable[[], object]:
    store = Store(place, trainer.plan.checkpoint_every)
    run = Run(trainer, store, TrainingJournal(None, quiet=True), TrainingProgress())
    batches, asked = trainer.batches(0), threading.Event()
    return lambda: run.step(batches, asked)
