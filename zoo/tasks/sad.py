"""SAD, the Spatially Adaptive Dataset: dilate black pixels, leave all others as they are (Kokkinos et al., PAFU, section 3.2)."""

import math
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
from surgeon.zoo.tasks.data.files import VAL_STREAM, limited
from surgeon.zoo.tasks.data.options import check_types
from surgeon.zoo.tasks.registry import register
from surgeon.zoo.tasks.support.synthetic import fit_same_size, picture_with_error, update_all

if TYPE_CHECKING:
    from torchmetrics import Metric

SIDE, WINDOW, SQUARE = 89, 87, 5  # pixels: image, region of the grid, side of a dilated pixel


@dataclass(frozen=True, kw_only=True)
class SadConfig(TaskConfig):
    """`images`, `val_images`: their number. `share`: fraction of the grid positions that are black.

    `beta`: errors below it are squared (smooth L1); 0 is the paper's loss. With 0, a kernel that is nearly right gets a gradient
    as large as one that is wrong, and the selection does not settle (docs/gains.md).
    """

    least: ClassVar[Mapping[str, float]] = {"images": 1, "val_images": 1, "share": 0, "beta": 0}
    most: ClassVar[Mapping[str, float]] = {"share": 1}

    images: int = 1000
    val_images: int = 100
    share: float = 0.2
    beta: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        if not math.isfinite(self.beta):
            raise ConfigError(f"beta must be a finite number, got {self.beta!r}")
        if self.data is not None:
            raise ConfigError(f"the images are generated; leave out {called('--data', 'data')}, got {self.data}")


def sad_image(share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(input, target), (3, 89, 89) each.

    Every value is uniform in (0, 1]; some grid positions are black in the input, with black 5x5 squares around them in the
    target. The grid has 17 x 17 positions, 5 pixels apart, the centers of the 5x5 cells that fill the 87x87 window from its corner
    (1, 1); so no squares overlap and none is cut off. The paper gives the window and that squares do not overlap; the spacing
    of 5 and the probability `share` of a black position are chosen here.
    """
    image = 1 - torch.rand((3, SIDE, SIDE), generator=generator)  # rand is in [0, 1)
    count = WINDOW // SQUARE
    black = torch.rand((count, count), generator=generator) < share
    first = (SIDE - WINDOW) // 2 + SQUARE // 2
    pixels = torch.zeros(SIDE, SIDE)
    pixels[first : first + SQUARE * count : SQUARE, first : first + SQUARE * count : SQUARE] = black.float()
    squares = F.max_pool2d(pixels[None], SQUARE, stride=1, padding=SQUARE // 2)[0]
    return image * (1 - pixels), image * (1 - squares)


@register
class Sad(Task):
    """Generated images, no data: training images follow from the seed, validation images are always the same.

    The loss is the mean absolute error, as in the paper, or smooth L1 with `beta`. Metrics: `l1`, `mse`. A Dirac and a zero filter
    solve it exactly.
    """

    name: ClassVar[str] = "sad"
    config_class: ClassVar[type[TaskConfig]] = SadConfig
    primary: ClassVar[str] = "l1"
    higher_is_better: ClassVar[bool] = False
    config: SadConfig

    def check(self) -> None:
        """Nothing is read."""

    def dataset(self, split: Split) -> TaskDataset:
        train = split == "train"
        config = self.config
        count, limit = (config.images, config.train_limit) if train else (config.val_images, config.val_limit)
        numbers = [(index, index) for index in limited(range(count), limit)]
        return ItemDataset(numbers, self._sample, seed=self.seed if train else VAL_STREAM, fixed=True)

    def _sample(self, item: int, generator: torch.Generator) -> Sample:
        x, y = sad_image(self.config.share, generator)
        return {"input": x, "target": y}

    def bind(self, model: nn.Module) -> nn.Module:
        return fit_same_size(self, model, 3, SIDE)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.smooth_l1_loss(output, batch["target"], beta=self.config.beta)

    def metrics(self) -> "dict[str, Metric]":
        from torchmetrics import MeanAbsoluteError, MeanSquaredError

        return {"l1": MeanAbsoluteError(), "mse": MeanSquaredError()}

    def update(self, metrics: "Mapping[str, Metric]", output: Any, batch: Batch) -> None:
        update_all(metrics, output, batch)

    def picture(self, batch: Batch, output: Any) -> Image.Image:
        return picture_with_error(batch, output)
