"""Metrics of a network on a task's validation samples, and recalibration of its BatchNorms."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgeon.layers.norm import SignalNorm
from surgeon.util.copying import evaluating
from surgeon.visualize.adaptivity import Adaptivity, observed
from surgeon.zoo.evaluate import running
from surgeon.zoo.finetune.batches import to_device, validation_batches
from surgeon.zoo.finetune.config import FinetuneConfig
from surgeon.zoo.tasks import Batch, Task, TaskDataset

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL.Image import Image

BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name; seconds for the pass over all samples, including data loading.

    If requested, from the first batch: a picture, and how adaptive the dynamic layers are.
    """

    metrics: dict[str, float]
    seconds: float
    picture: "Image | None" = field(default=None, compare=False)
    layers: tuple[Adaptivity, ...] = field(default=(), compare=False)


def evaluate(
    model: nn.Module,
    task: Task,
    dataset: TaskDataset,
    config: FinetuneConfig,
    accelerator: "Accelerator",
    *,
    look: bool = False,
    most: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Evaluate every validation sample once, split over the processes, in eval mode; preserves the global random state.

    `most` limits the number of batches. Raises `InputError` if the model does not run on one.
    """
    from accelerate.utils import convert_to_fp32

    started = time.perf_counter()
    metrics = {name: metric.to(accelerator.device) for name, metric in task.metrics().items()}
    drawn = None
    processes, rank = accelerator.num_processes, accelerator.process_index
    if len(dataset) < processes:  # too few to split: every process takes them all
        processes, rank = 1, 0
    size = config.eval_batch_size or config.batch_size
    batches = validation_batches(task, dataset, size, config.workers, rank=rank, processes=processes)
    count = math.ceil(len(dataset) / (size * processes))
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with evaluating(model), torch.random.fork_rng(devices=cuda), ExitStack() as stack:
        layers = stack.enter_context(observed(model)) if look else []
        for done, batch in enumerate(itertools.islice(batches, most), 1):
            batch = to_device(batch, accelerator.device, channels_last=config.channels_last)
            with accelerator.autocast(), running(model, batch, task):
                output = task.predict(model, batch)
            output = convert_to_fp32(output)
            task.update(metrics, output, batch)
            if look and drawn is None:
                drawn = task.picture(batch, output)
            if progress is not None:
                progress("evaluate", done, count)
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    return Evaluation(values, time.perf_counter() - started, drawn, tuple(layers))


def freeze_batch_norms(model: nn.Module) -> None:
    """Make BatchNorms use and keep their statistics until the next `train()`, except in generators, which have none yet."""
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and not isinstance(module, SignalNorm):
            module.eval()


def measures_statistics(model: nn.Module) -> bool:
    """Whether a BatchNorm in the model tracks statistics."""
    return any(isinstance(module, BATCH_NORMS) and module.track_running_stats for module in model.modules())


@torch.no_grad()
def recalibrate(model: nn.Module, task: Task, batches: Iterator[Batch], count: int, forward: Any) -> None:
    """Recompute the statistics of all BatchNorms as plain averages over `count` batches.

    Everything else is in eval mode: if layers behave differently in training (PAFU samples its selection), statistics
    gathered in training mode are not those of the network in use. `forward` runs the model on a batch.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    try:
        for batch in itertools.islice(batches, count):
            forward(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
