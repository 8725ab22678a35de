"""CIFAR-10 images of the evaluation material as a task (JPEG files, on which networks trained on the originals lose ten points)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from benchmarks import _data as data
from benchmarks._tasks import IMAGENET_MEAN, IMAGENET_STD
from surgeon.zoo.tasks import Batch, Sample, Split, Task, TaskConfig, TaskDataset

TRAIN_SET, TEST_SET = "cifar10/train_jpeg_20k.npz", "cifar10/test_jpeg_5k.npz"


class Cifar(TaskDataset):
    """Images normalized as the network wants them; in training flipped and moved by up to four pixels."""

    def __init__(self, images: data.Labeled, seed: int, *, train: bool) -> None:
        self.images, self.seed, self.train = images, seed, train
        self.mean, self.std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.images.y)

    def __getitem__(self, draw: int) -> Sample:
        index = draw % len(self)
        image = (self.images.x[index].float() / 255 - self.mean) / self.std
        if self.train:
            generator = self.generator_for(draw)
            down, right, flip = (int(torch.randint(n, (), generator=generator)) for n in (9, 9, 2))
            image = F.pad(image, (4, 4, 4, 4))[:, down : down + 32, right : right + 32]
            image = image.flip(-1) if flip else image
        return {"input": image, "target": self.images.y[index]}


class CifarTask(Task):
    """Ten classes; judged by the cross-entropy, which tells more than the accuracy on so few images."""

    name: ClassVar[str] = "cifar-study"
    config_class: ClassVar[type[TaskConfig]] = TaskConfig
    primary: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False

    def __init__(self, config: TaskConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        folder = config.data or data.data_folder()
        self.sets = {
            "train": Cifar(data.cifar_jpeg(folder / TRAIN_SET).every(config.train_limit), seed, train=True),
            "val": Cifar(data.cifar_jpeg(folder / TEST_SET).every(config.val_limit), seed, train=False),
        }

    def check(self) -> None:
        """The images were read when the task was made."""

    def dataset(self, split: Split) -> TaskDataset:
        return self.sets[split]

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch["target"])

    def metrics(self) -> dict[str, Metric]:
        return {"loss": MeanMetric(), "top1": MulticlassAccuracy(num_classes=10, average="micro")}

    def update(self, metrics: Mapping[str, Metric], output: Any, batch: Batch) -> None:
        metrics["loss"].update(F.cross_entropy(output, batch["target"], reduction="none"))
        metrics["top1"].update(output.argmax(1), batch["target"])

    def picture(self, batch: Batch, output: Any) -> Image.Image:
        pixels = batch["input"][:8].cpu() * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(
            3, 1, 1
        )
        row = torch.cat(list(pixels), dim=2).clamp(0, 1)
        return Image.fromarray((row * 255).byte().permute(1, 2, 0).numpy())
