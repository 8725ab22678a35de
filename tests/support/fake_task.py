"""A tiny task for tests of whatever trains or judges: tell dark pictures from light ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from surgeon.errors import ConfigError, DataError
from surgeon.zoo.tasks.base import Batch, Sample, Split, Task, TaskConfig, TaskDataset

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass(frozen=True, kw_only=True)
class BrightnessConfig(TaskConfig):
    samples: int = 20
    contrast: float = 2.0
    classes: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contrast <= 0:
            raise ConfigError(f"contrast must be positive, got {self.contrast!r}")


class Brightness(TaskDataset):
    """Noise (3, 64, 64) whose mean says the class; every `limit`-th sample."""

    def __init__(self, config: BrightnessConfig, seed: int, limit: int | None) -> None:
        self.config, self.seed, self.count = config, seed, min(limit or config.samples, config.samples)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, draw: int) -> Sample:
        index = draw % self.count
        target = index % self.config.classes
        noise = torch.randn(3, 64, 64, generator=self.generator_for(index))
        return {"input": noise + self.config.contrast * target, "target": torch.tensor(target)}


class BrightnessTask(Task):
    name: ClassVar[str] = "brightness"
    config_class: ClassVar[type[TaskConfig]] = BrightnessConfig
    primary: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    config: BrightnessConfig

    def check(self) -> None:
        if self.config.data is not None and not any(self.config.data.iterdir()):
            raise DataError(f"task brightness: {self.config.data} is empty")

    def dataset(self, split: Split) -> TaskDataset:
        limit = self.config.val_limit if split == "val" else self.config.train_limit
        return Brightness(self.config, self.seed + (split == "val"), limit)

    def bind(self, model: nn.Module) -> nn.Module:
        if getattr(model, "num_classes", self.config.classes) != self.config.classes:
            model.reset_classifier(self.config.classes)
        return model

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch["target"])

    def metrics(self) -> "dict[str, Metric]":
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        return {"accuracy": MulticlassAccuracy(self.config.classes, average="micro"), "loss": MeanMetric()}

    def update(self, metrics: "Mapping[str, Metric]", output: Any, batch: Batch) -> None:
        metrics["accuracy"].update(output, batch["target"])
        metrics["loss"].update(F.cross_entropy(output, batch["target"], reduction="none"))

    def picture(self, batch: Batch, output: Any) -> Image.Image:
        return Image.new("RGB", (8, 8))
