"""Multi-scale pattern detection, the toy experiment of ACDA (Wang et al. 2021, section 3.3, figure 6)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from surgeon.errors import ConfigError, called
from surgeon.zoo.tasks.base import Batch, Sample, Split, Task, TaskConfig, TaskDataset
from surgeon.zoo.tasks.data.datasets import ItemDataset
from surgeon.zoo.tasks.data.draws import integer
from surgeon.zoo.tasks.data.files import limited
from surgeon.zoo.tasks.data.options import check_types
from surgeon.zoo.tasks.registry import register
from surgeon.zoo.tasks.support.synthetic import fit_same_size, picture_with_error

if TYPE_CHECKING:
    from torchmetrics import Metric

SIDE, PATTERNS, SCALES = 100, 25, (3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class PatternConfig(TaskConfig):
    """`images`: distinct training images (the paper has one). `repeats`: how often a pass over the set uses each.

    `noise`: standard deviation of the background. `shift`: pixels by which validation images are moved down and right.
    """

    least: ClassVar[Mapping[str, float]] = {"images": 1, "repeats": 1, "noise": 0, "shift": 0}
    most: ClassVar[Mapping[str, float]] = {"shift": 40}  # leaves room for the patterns

    images: int = 1
    repeats: int = 100
    noise: float = 0.1
    shift: int = 20

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        if self.data is not None:
            raise ConfigError(f"the images are generated; leave out {called('--data', 'data')}, got {self.data}")


def pattern(side: int) -> Tensor:
    """(side, side): a frame of ones around zeros, with a one in the middle."""
    p = torch.zeros(side, side)
    p[[0, -1], :] = 1
    p[:, [0, -1]] = 1
    p[side // 2, side // 2] = 1
    return p


def pattern_image(noise: float, shift: int, moved: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(input, target), (1, 100, 100) each: 25 patterns of 3x3, 5x5 and 7x7 on noise, and ones at their middles.

    The paper shows the patterns only in a figure. Chosen here: each is the frame of `pattern`, with one free pixel around it;
    the scales alternate (9, 8 and 8 of them); all are in the upper left part that stays inside the image when it is moved by
    `shift`; and the background is Gaussian noise, also added to the patterns. Moving an image moves its background with it; what
    enters from above and left is new noise.
    """
    inside = SIDE - shift
    taken = torch.zeros(inside, inside, dtype=torch.bool)
    clean, target = torch.zeros(1, SIDE, SIDE), torch.zeros(1, SIDE, SIDE)
    for number in sorted(range(PATTERNS), key=lambda n: -SCALES[n % 3]):  # large ones first, while there is room
        side = SCALES[number % 3]
        while True:
            top, left = (integer(0, inside - side, generator) for _ in range(2))
            around = taken[max(top - 1, 0) : top + side + 1, max(left - 1, 0) : left + side + 1]
            if not around.any():
                break
        taken[top : top + side, left : left + side] = True
        clean[0, top : top + side, left : left + side] = pattern(side)
        target[0, top + side // 2, left + side // 2] = 1
    image = clean + noise * torch.randn(clean.shape, generator=generator)
    if not moved or shift == 0:
        return image, target
    fresh = noise * torch.randn(clean.shape, generator=generator)
    fresh[:, shift:, shift:] = image[:, :-shift, :-shift]
    return fresh, F.pad(target[:, :-shift, :-shift], (shift, 0, shift, 0))


@register
class PatternDetection(Task):
    """Generated images, no data. Training images follow from the seed; validation images are the same ones, moved by `shift`.

    The loss is the mean squared error, as in the paper. Metrics: `mse`, and `f1` of the centers found with a
    threshold of one half.
    """

    name: ClassVar[str] = "pattern-detection"
    config_class: ClassVar[type[TaskConfig]] = PatternConfig
    primary: ClassVar[str] = "mse"
    higher_is_better: ClassVar[bool] = False
    config: PatternConfig

    def check(self) -> None:
        """Nothing is read."""

    def dataset(self, split: Split) -> TaskDataset:
        train = split == "train"
        limit = self.config.train_limit if train else self.config.val_limit
        numbers = [(index, index) for index in limited(range(self.config.images), limit)]
        repeats = self.config.repeats if train and limit is None else 1
        make = self._still if train else self._moved
        return ItemDataset(numbers, make, seed=self.seed, fixed=True, repeats=repeats)

    def _still(self, item: int, generator: torch.Generator) -> Sample:
        x, y = pattern_image(self.config.noise, self.config.shift, False, generator)
        return {"input": x, "target": y}

    def _moved(self, item: int, generator: torch.Generator) -> Sample:
        x, y = pattern_image(self.config.noise, self.config.shift, True, generator)
        return {"input": x, "target": y}

    def bind(self, model: nn.Module) -> nn.Module:
        return fit_same_size(self, model, 1, SIDE)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.mse_loss(output, batch["target"])

    def metrics(self) -> "dict[str, Metric]":
        from torchmetrics import MeanSquaredError
        from torchmetrics.classification import BinaryF1Score

        return {"mse": MeanSquaredError(), "f1": BinaryF1Score()}

    def update(self, metrics: "Mapping[str, Metric]", output: Any, batch: Batch) -> None:
        metrics["mse"].update(output.float().contiguous(), batch["target"])
        metrics["f1"].update((output.float() > 0.5).long(), batch["target"].long())

    def picture(self, batch: Batch, output: Any) -> Image.Image:
        return picture_with_error(batch, output)
