"""What a task is: its data, loss, metrics and pictures. A trainer knows tasks only by this.

Samples are dictionaries of tensors without a batch dimension, batches the same with one. `"input"` is what the model gets,
`"target"` what the loss wants; a task may add further keys, which its own methods read.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from surgeon.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchmetrics import Metric

Sample = dict[str, Tensor]
Batch = dict[str, Tensor]
Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Options that every task has; a task's own config adds its own. Wrong values are a `ConfigError`.

    `data` is a folder whose layout the task's docstring describes (None only for tasks that generate theirs).
    `input_size`, `mean` and `std` are the model's where it has its own and nothing is given here.
    """

    data: Path | None = None
    input_size: tuple[int, int, int] | None = None  # (C, H, W) of a training sample
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    train_limit: int | None = None  # use only the first so many samples, spread evenly over the set
    val_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("train_limit", "val_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be a positive number of samples, got {value!r}")


class TaskDataset(Dataset[Sample]):
    """Samples by the number of a draw.

    Draw d is sample d % len(self); draws of the same sample differ in augmentation and noise. A draw depends on nothing but
    its number and the task's seed (no global random state, no worker, no order), so that an interrupted run can go on exactly.
    Implementations get that by drawing everything from `generator_for`.
    """

    seed: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, draw: int) -> Sample: ...

    def generator_for(self, draw: int) -> torch.Generator:
        """Random numbers of one draw."""
        return torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + draw * 0xBF58476D1CE4E5B9 + 1) % 2**63)


class Task(ABC):
    """One task with its options. Made by `surgeon.zoo.tasks.create_task`; nothing is read before `check`.

    `primary` names the metric that decides (of `metrics`), `higher_is_better` which way.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[TaskConfig]]
    primary: ClassVar[str]
    higher_is_better: ClassVar[bool]

    def __init__(self, config: TaskConfig, *, seed: int = 0) -> None:
        self.config, self.seed = config, seed

    @abstractmethod
    def check(self) -> None:
        """Look through the data of both splits: all files there, readable, in pairs. Raises `DataError` naming what is wrong."""

    @abstractmethod
    def dataset(self, split: Split) -> TaskDataset:
        """The samples of a split; "val" ones are the same at every draw."""

    def bind(self, model: nn.Module) -> nn.Module:
        """Make task and model fit each other: take the model's normalization, give the model the head that the data need.

        Returns the model, the same object where that is possible. Raises `InputError` where they cannot fit.
        """
        return model

    def options(self) -> dict[str, Any]:
        """The options that are not the defaults, without those that say where the data lie or how many are taken.

        A new classifier was wanted once.
        """
        left = ("data", "train", "val", "train_limit", "val_limit", "download", "new_head")
        values = {field.name: (getattr(self.config, field.name), field.default) for field in fields(self.config)}
        return {name: value for name, (value, default) in values.items() if value != default and name not in left}

    def outputs(self) -> tuple[str, ...] | None:
        """Names of what a bound model's outputs stand for, in their order, for its recipe; None where they have none."""
        return None

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch of samples; tasks whose samples differ in size pad or stack by themselves."""
        batch: Batch = default_collate(list(samples))
        return batch

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """What is random over a whole training batch (mixup, cutmix); drawn from `generator` (on the CPU) alone."""
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output in training."""
        return model(batch["input"])

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar: equal parts of a batch have losses that average to it."""

    def distillation_loss(self, output: Any, teacher: Any) -> Tensor:
        """How far the output is from that of the original network."""
        return F.mse_loss(output, teacher)

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output in evaluation (padding to a multiple, self-ensemble)."""
        return self.forward(model, batch)

    @abstractmethod
    def metrics(self) -> "dict[str, Metric]":
        """Fresh metrics by name, among them `primary`."""

    @abstractmethod
    def update(self, metrics: "Mapping[str, Metric]", output: Any, batch: Batch) -> None:
        """Count a batch's predictions."""

    @abstractmethod
    def picture(self, batch: Batch, output: Any) -> "Image":
        """A few samples of a batch beside their predictions, for people."""


def better(task: type[Task] | Task, a: float, b: float) -> bool:
    """Whether value a of the primary metric is better than b; nan is never better."""
    return a > b if task.higher_is_better else a < b
