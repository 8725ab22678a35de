"""Tiny tasks for the tests of fine-tuning: generated, seeded, small enough to train in a blink."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

import surgeon
from surgeon.errors import ConfigError, DataError
from surgeon.zoo.tasks import Batch, Sample, Split, Task, TaskConfig, TaskDataset

SIZE = 8


@dataclass(frozen=True, kw_only=True)
class TinyConfig(TaskConfig):
    """`samples` to train on; `poison` is a draw from which on inputs are NaN, once each (None: never)."""

    samples: int = 12
    noise: float = 0.1
    broken: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ConfigError(f"samples must be >= 1, got {self.samples!r}")


class Blur(TaskDataset):
    """Images and their blurred copies; noise differs from draw to draw."""

    def __init__(self, count: int, seed: int, noise: float) -> None:
        self.count, self.seed, self.noise = count, seed, noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, draw: int) -> Sample:
        image = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(draw % self.count))
        target = F.avg_pool2d(image[None], 3, 1, 1)[0]
        noise = torch.randn(image.shape, generator=self.generator_for(draw)) * self.noise
        return {"input": image + noise, "target": target}


class TinyRegression(Task):
    """Blur a noisy image; MSE."""

    name: ClassVar[str] = "tiny-regression"
    config_class: ClassVar[type[TaskConfig]] = TinyConfig
    config: TinyConfig
    primary: ClassVar[str] = "mse"
    higher_is_better: ClassVar[bool] = False

    def check(self) -> None:
        if self.config.broken:
            raise DataError("image 3 of the training set cannot be read")

    def dataset(self, split: Split) -> TaskDataset:
        if split == "train":
            return Blur(self.config.samples, self.seed, self.config.noise)
        return Blur(5, 99, 0.0)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.mse_loss(output, batch["target"])

    def metrics(self) -> dict[str, Metric]:
        return {"mse": MeanMetric()}

    def update(self, metrics: Mapping[str, Metric], output: Any, batch: Batch) -> None:
        error = (output - batch["target"]).square().mean(dim=(1, 2, 3))
        metrics["mse"].update(error)

    def picture(self, batch: Batch, output: Any) -> Image.Image:
        pixels = (batch["input"][0].clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
        return Image.fromarray(pixels)


class Colors(TaskDataset):
    """Images whose mean color is their class."""

    def __init__(self, count: int, seed: int, noise: float) -> None:
        self.count, self.seed, self.noise = count, seed, noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, draw: int) -> Sample:
        label = draw % self.count % 3
        image = torch.randn(3, SIZE, SIZE, generator=self.generator_for(draw)) * self.noise
        image[label] += 0.5
        return {"input": image, "target": torch.tensor(label)}


class TinyClassification(TinyRegression):
    """Which color? Mixup of each batch with itself reversed, by a weight that the batch's generator draws."""

    name: ClassVar[str] = "tiny-classification"
    primary: ClassVar[str] = "top1"
    higher_is_better: ClassVar[bool] = True

    def dataset(self, split: Split) -> TaskDataset:
        return Colors(self.config.samples if split == "train" else 9, self.seed, self.config.noise)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        weight = 0.8 + 0.2 * torch.rand((), generator=generator)
        mixed = weight * batch["input"] + (1 - weight) * batch["input"].flip(0)
        return batch | {"input": mixed}

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch["target"])

    def metrics(self) -> dict[str, Metric]:
        return {"top1": MulticlassAccuracy(num_classes=3, average="micro")}

    def update(self, metrics: Mapping[str, Metric], output: Any, batch: Batch) -> None:
        metrics["top1"].update(output.argmax(1), batch["target"])


def regression(**options: Any) -> TinyRegression:
    """The task."""
    return TinyRegression(TinyConfig(**options))


def classification(**options: Any) -> TinyClassification:
    """The task."""
    return TinyClassification(TinyConfig(**options))


class Restorer(nn.Module):
    """Three convolutions, BatchNorm, dropout; an image in, an image out."""

    def __init__(self, norm: bool = True, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.1 if norm else 0.0)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = self.drop(torch.relu(self.middle(x)))
        out: Tensor = self.last(x)
        return out


class Classifier(Restorer):
    """The same with a mean at the end."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(dim=(2, 3))


def make_restorer(norm: bool = True, width: int = 6) -> nn.Module:
    """Factory for recipes: the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Restorer(norm, width).eval()


def converted(type: str = "pafu", *, layers: str = "middle", norms: bool = True, **options: Any) -> nn.Module:
    """A restorer with one dynamic layer, small."""
    defaults: dict[str, dict[str, Any]] = {
        "pafu": {"group_size": 3, "hidden": 4},
        "acda": {"atoms": 2, "scales": 1, "basis_size": 3, "hidden": 4},
        "sekg": {},
    }
    return copy.deepcopy(_converted(norms, layers, type, **(defaults[type] | options)))


@cache
def _converted(norms: bool, layers: str, type: str, **options: Any) -> nn.Module:
    return surgeon.convert(make_restorer(norms), layers=layers, type=type, input_size=(3, SIZE, SIZE), **options)[0]
