"""A search of real trainings that takes seconds: its network, its task, and a worker process that can be killed."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from torch import nn

from surgeon.cli import main
from surgeon.zoo.tasks import registry
from tests.support.training.tasks import TinyClassification, TinyRegression, make_restorer

if TYPE_CHECKING:
    import pytest

FACTORY = "tests.support.search.tasks:make_plain"
SPACE = ["--types", "acda,sekg", "--atoms", "2", "--scales", "1"]
SHORT = ["--steps", "4", "--batch-size", "4", "--lr", "0.01", "--device", "cpu", "--gains", "uniform"]
RANDOM = ("--sampler", "random", "--no-pruning")
FOUR = (*RANDOM, "--trials", "4")


def make_plain(width: int = 6) -> nn.Module:
    """The network: three convolutions."""
    return make_restorer(norm=False, width=width)


class Forgetful(optuna.samplers.RandomSampler):
    """A sampler that has no answer."""

    def sample_independent(self, *args: Any, **options: Any) -> Any:
        return None


def unseeded() -> optuna.samplers.BaseSampler:
    """A sampler that takes no seed."""
    return optuna.samplers.RandomSampler(seed=1)


def add_tasks() -> None:
    """Make the tiny tasks known."""
    registry.task_names()  # the real ones first
    registry._TASKS |= {cls.name: cls for cls in (TinyRegression, TinyClassification)}


def search_arguments(folder: str | Path, *more: str) -> list[str]:
    """`surgeon search` on the tiny task."""
    return ["search", FACTORY, "--task", "tiny-regression", *SPACE, *SHORT, "-o", str(folder), *more]


def document(capsys: "pytest.CaptureFixture[str]") -> Any:
    """What a command has printed with --json."""
    return json.loads(capsys.readouterr().out)


if __name__ in ("__main__", "__mp_main__"):  # the latter is what a worker of --jobs calls it
    add_tasks()
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
