"""Code shared by tasks with generated data: model checks, metric updates, pictures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor, nn

from surgeon.errors import InputError
from surgeon.zoo.tasks.base import Batch, Task
from surgeon.zoo.tasks.support.pictures import heat, sheet, to_image
from surgeon.zoo.tasks.support.probe import describe, trial

if TYPE_CHECKING:
    from torchmetrics import Metric

PICTURES = 3


def fit_same_size(task: Task, model: nn.Module, channels: int, side: int) -> nn.Module:
    """The model, if its output has its input's shape (channels, side, side); otherwise an `InputError`."""
    output = trial(task.name, model, model, channels, side, side)
    if not isinstance(output, Tensor) or output.shape != (2, channels, side, side):
        wanted = (2, channels, side, side)
        raise InputError(f"task {task.name}: the model returns {describe(output)} for {wanted}; it must keep the shape")
    return model


def update_all(metrics: "Mapping[str, Metric]", output: Any, batch: Batch) -> None:
    """Update every metric with output and target."""
    for metric in metrics.values():
        metric.update(output.float().contiguous(), batch["target"])


def picture_with_error(batch: Batch, output: Any) -> Image.Image:
    """Input, output, target, and the mean absolute error over the channels (0 to 1)."""
    rows = []
    for x, y, target in list(zip(batch["input"], output, batch["target"], strict=True))[:PICTURES]:
        rows.append([to_image(x), to_image(y), to_image(target), heat((y - target).abs().mean(0), 1.0)])
    return sheet(rows, ("input", "output", "target", "error"))
