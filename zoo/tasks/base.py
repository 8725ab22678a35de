"""Interface of a task: its data, loss, metrics and pictures. Trainers use tasks only through this.

Samples are dictionaries of tensors without a batch dimension, batches the same with one. `"input"` is the model's input,
`"target"` the loss's target; a task may add keys, which its own methods read.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from surgeon.errors import called
from surgeon.records.preprocessing import recorded_inputs
from surgeon.records.recipe import BaseModel, get_recipe
from surgeon.util.files import here
from surgeon.util.limits import check_choice, check_limits, check_range, choices_of, limits_of, ranges_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchmetrics import Metric

Sample = dict[str, Tensor]
Batch = dict[str, Tensor]
Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Options that every task has; a task's config adds its own. Invalid values raise a `ConfigError`.

    `data` is a folder whose layout the task's docstring describes (None only for tasks that generate their data).
    `input_size`, `mean` and `std` default to the model's, if it has its own. `least`, `above`, `most` and `below` hold limits of
    numbers, `choices` the words that an option may be, `ranges` options that are a number or a range (`surgeon.util.limits`), read
    from the source, too; a subclass adds its own.
    """

    least: ClassVar[Mapping[str, float]] = {"train_limit": 1, "val_limit": 1}

    data: Path | None = None
    input_size: tuple[int, int, int] | None = None  # (C, H, W) of a training sample
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    train_limit: int | None = None  # use only this many samples, spread evenly over the set
    val_limit: int | None = None

    def __post_init__(self) -> None:
        for name, limits in limits_of(type(self)).items():
            check_limits(name, getattr(self, name), limits)
        for name, known in choices_of(type(self)).items():
            check_choice(name, getattr(self, name), known)
        for name in ranges_of(type(self)):
            check_range(name, getattr(self, name))


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


_FORMS: dict[str, Callable[[Any], str]] = {  # of the values of `Task.preprocessing`
    "input_size": lambda size: "x".join(map(str, size[1:])),
    "interpolation": str,
    "crop_pct": lambda share: f"crop {share:g}",
    "crop_mode": lambda mode: "" if mode == "center" else f"crop mode {mode}",
    "mean": lambda values: f"mean {_numbers(values)}",
    "std": lambda values: f"std {_numbers(values)}",
}

_TRAINED = {"mean": "mean", "std": "std", "input_size": "size"}  # options that weights are trained with, in words


class TaskDataset(Dataset[Sample]):
    """Samples, indexed by draw.

    Draw d is sample d % len(self); draws of the same sample differ in augmentation and noise. A draw depends only on
    its number and the task's seed (no global random state, worker or order), so that an interrupted run can resume exactly.
    Implementations ensure this by drawing everything from `generator_for`.
    """

    seed: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, draw: int) -> Sample: ...

    def generator_for(self, draw: int) -> torch.Generator:
        """Random generator of one draw."""
        return torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + draw * 0xBF58476D1CE4E5B9 + 1) % 2**63)


class Task(ABC):
    """One task with its options. Created by `surgeon.zoo.tasks.create_task`; nothing is read before `check`.

    `primary` names the deciding metric (one of `metrics`), `higher_is_better` its direction; `at_models_size` says whether samples
    have the size recorded with the model unless `input_size` is given, `other_outputs` what may be wrong if the model has others.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[TaskConfig]]
    primary: ClassVar[str]
    higher_is_better: ClassVar[bool]
    at_models_size: ClassVar[bool] = False
    other_outputs: ClassVar[str] = ""
    models_own = False  # whether the bound model knows how its inputs are made
    purpose = ""  # what the validation samples are for, in words, if they are part of a set

    def __init__(self, config: TaskConfig, *, seed: int = 0) -> None:
        self.config, self.seed = config, seed

    @abstractmethod
    def check(self) -> None:
        """Check the data of both splits: files exist, are readable, and pair up. Raises `DataError` that names the problems."""

    @abstractmethod
    def dataset(self, split: Split) -> TaskDataset:
        """The samples of a split; "val" samples are the same at every draw."""

    def bind(self, model: nn.Module) -> nn.Module:
        """Fit task and model to each other: take the model's normalization, give the model the head that the data need.

        Returns the model, the same object if possible. Raises `InputError` if they cannot fit.
        """
        return model

    def fitted(self, model: nn.Module) -> tuple[nn.Module, str | None]:
        """`bind`, and in words the new, untrained parameters that the model got; None if it got none."""
        own = dict(model.named_parameters())  # kept, because a new one could have the id of one that is gone
        known = set(map(id, own.values()))
        bound = self.bind(model)
        new = {name: value for name, value in bound.named_parameters() if id(value) not in known}
        if not new:
            return bound, None
        before = {name: own[name].shape[:1] for name in new if name in own}
        sizes = [
            f"{new[k].shape[0]} outputs instead of {n[0]}" for k, n in before.items() if n and new[k].shape[:1] != n
        ]
        told = ", ".join([*list(new)[:3], *(["..."] if new.keys() - list(new)[:3] else [])])
        why = f" ({'; '.join(filter(None, [sizes[0], self.other_outputs]))})" if sizes else ""
        return bound, f"new, untrained parameters to fit the task: {told}{why}"

    def preprocessing(self) -> dict[str, Any]:
        """How a bound model's inputs are made of images: `mean`, `std`, `input_size`, ... by timm's names; empty: in [0, 1]."""
        return {}

    def images(self) -> str | None:
        """`preprocessing` in a line, with where it is from; None if there is nothing to tell."""
        values = self.preprocessing()
        if not values:
            return None
        told = [x for key, form in _FORMS.items() if key in values and (x := form(values[key]))]
        given = [key for key in values if getattr(self.config, key, None) is not None]
        whose = "the model's" if self.models_own else "the task's default"
        origin = [f"{', '.join(given)}: as given"] if given else []
        if len(given) < len(values):
            origin.append(f"the rest: {whose}" if given else whose)
        if not {"mean", "std"} <= set(given):
            origin.append(f"{called('--task-option mean=... std=...', 'mean=, std=')} for others")
        return f"{', '.join(told)} ({'; '.join(origin)})"

    def unknown_images(self, model: nn.Module, base: BaseModel | None = None) -> str | None:
        """A note on weights of a file, which does not record how their images were made, unless `mean` and `std` are given.

        None for other weights. `base` says where they are from (None: the model's recipe does). The task must be bound.
        """
        recipe = get_recipe(model)
        base = base or (None if recipe is None else recipe.base)
        values = self.preprocessing()
        lacking = {key: name for key, name in _TRAINED.items() if key in values and getattr(self.config, key) is None}
        if base is None or base.weights.kind != "file" or not base.weights.path or recorded_inputs(recipe):
            return None
        if not {"mean", "std"} & set(lacking):
            return None
        *names, last = lacking.values()
        options = called(f"--task-option {' '.join(f'{key}=...' for key in lacking)}", f"{'=, '.join(lacking)}=")
        told = (
            f"if they were trained with another {', '.join(names)}{' or ' * bool(names)}{last}, give it with {options}"
        )
        return f"the weights are from {here(base.weights.path)}: {told}"

    def told_images(self, model: nn.Module, base: BaseModel | None = None) -> list[str]:
        """The lines about the images of a bound task that are reported before any work: `images` and `unknown_images`."""
        images, unknown = self.images(), self.unknown_images(model, base)
        return [*([] if images is None else [f"images: {images}"]), *([] if unknown is None else [unknown])]

    def options(self) -> dict[str, Any]:
        """The non-default options, except those that locate or limit the data.

        `new_head` is excluded, too: it was needed only once.
        """
        left = ("data", "train", "val", "train_limit", "val_limit", "download", "new_head")
        values = {field.name: (getattr(self.config, field.name), field.default) for field in fields(self.config)}
        return {name: value for name, (value, default) in values.items() if value != default and name not in left}

    @property
    def multiple(self) -> int:
        """Pixels to a multiple of which `predict` pads the sides of an input."""
        return int(getattr(self.config, "multiple", 1))

    def padded(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The size (C, H, W) at which `predict` runs the model for an input of this size."""
        return size if self.multiple == 1 else (*size[:-2], *(side + -side % self.multiple for side in size[-2:]))

    def outputs(self) -> tuple[str, ...] | None:
        """Names of a bound model's outputs, in order, for its recipe; None if they have no names."""
        return None

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch of samples; tasks whose samples differ in size override this to pad or stack them."""
        batch: Batch = default_collate(list(samples))
        return batch

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Augmentation across a training batch (mixup, cutmix); drawn only from `generator` (on the CPU)."""
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output in training."""
        return model(batch["input"])

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar: the losses of equal parts of a batch average to it."""

    def distillation_loss(self, output: Any, teacher: Any) -> Tensor:
        """Distance between the output and that of the original network."""
        return F.mse_loss(output, teacher)

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """The model's output in evaluation (padding to a multiple, self-ensemble)."""
        return self.forward(model, batch)

    @abstractmethod
    def metrics(self) -> "dict[str, Metric]":
        """New metrics by name, including `primary`."""

    @abstractmethod
    def update(self, metrics: "Mapping[str, Metric]", output: Any, batch: Batch) -> None:
        """Add a batch's predictions to the metrics."""

    @abstractmethod
    def picture(self, batch: Batch, output: Any) -> "Image":
        """A few samples of a batch next to their predictions."""


def better(task: type[Task] | Task, a: float, b: float) -> bool:
    """Whether value a of the primary metric is better than b; NaN is never better."""
    return a > b if task.higher_is_better else a < b


def improved(task: type[Task] | Task, a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether metrics a are better than b: by the primary one, at a tie by a lower `loss` if the task measures it.

    On few samples a count ties often, while the loss still tells a trained network from an untrained one.
    """
    mine, other = a[task.primary], b[task.primary]
    return better(task, mine, other) or (mine == other and a.get("loss", math.nan) < b.get("loss", math.nan))
