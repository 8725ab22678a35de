"""Quick runs of finetune, and looking at them: what its tests share."""

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgeon.zoo.finetune import FinetuneConfig, finetune
from surgeon.zoo.finetune.loop import Interrupted, Run, Trainer
from surgeon.zoo.finetune.state import read_log
from surgeon.zoo.tasks import Batch, Task
from tests.support.training.tasks import make_restorer

QUICK = FinetuneConfig(
    epochs=4, batch_size=4, lr=1e-2, log_every=1, eval_every="4", checkpoint_every="5", recalibrate=2
)


def with_(config: FinetuneConfig = QUICK, **changes: Any) -> FinetuneConfig:
    return dataclasses.replace(config, **changes)


SHORT = with_(max_steps=5, recalibrate=0)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder: Path, key: str) -> list[dict[str, Any]]:
    return [row for row in read_log(folder / "training" / "log.jsonl") if key in row]


class Watch:
    """The parameters before and after every optimizer step of the runs that follow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moved: list[set[str]] = []
        step = Run.step

        def watched(run: Run, *args: Any) -> Any:
            before = {name: p.detach().clone() for name, p in run.trainer.model.named_parameters()}
            result = step(run, *args)
            after = dict(run.trainer.model.named_parameters())
            self.moved.append({name for name in before if not torch.equal(before[name], after[name])})
            return result

        monkeypatch.setattr(Run, "step", watched)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Have the process signalled in the middle of a step."""
    backward = Trainer.backward

    def signalled(trainer: Trainer, index: int, batches: Iterator[Batch]) -> Tensor:
        if index == step:
            os.kill(os.getpid(), number)
        return backward(trainer, index, batches)

    monkeypatch.setattr(Trainer, "backward", signalled)


def interrupted(monkeypatch: pytest.MonkeyPatch, task: Task, output: Path, step: int = 2) -> nn.Module:
    """A run that was stopped on the way; returns its model."""
    model = make_restorer()
    with monkeypatch.context() as patched:
        interrupt_at(patched, step)
        with pytest.raises(Interrupted):
            finetune(model, task, SHORT, output)
    return model


def failing(error: BaseException, number: int) -> Callable[[Run], None]:
    """`Run.train` that fails at its so-manieth call, from 0."""
    train, calls = Run.train, iter(range(10**6))

    def call(self: Run) -> None:
        if next(calls) == number:
            raise error
        train(self)

    return call
