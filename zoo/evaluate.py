"""Metrics of a model on a split of a task, reproducible from call to call."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from surgeon.errors import ConfigError, DataError, InputError, SurgeonError, called
from surgeon.util.copying import check_module, evaluating, seeded
from surgeon.util.machine import tell_slow_bfloat16
from surgeon.util.progress import OnProgress
from surgeon.visualize.adaptivity import Adaptivity, observed
from surgeon.zoo.tasks.base import Batch, Sample, Split, Task
from surgeon.zoo.tasks.data.loading import loaded

AMP = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def evaluate(
    model: nn.Module,
    task: Task,
    *,
    split: Split = "val",
    batch_size: int = 32,
    device: str | torch.device | None = None,
    amp: str | None = None,
    workers: int = 0,
    progress: OnProgress | None = None,
    layers: list[Adaptivity] | None = None,
) -> dict[str, float]:
    """Metrics of a model on a split of a task, by name, including the task's `primary`.

    The model must already fit the task (`task.bind`). It runs in eval mode without gradients; mode, buffers and random state
    are restored afterward. Two calls return the same numbers on the same device.

    Args:
        device: where to evaluate; the model is moved there and stays. None: where it is.
        amp: autocast to "float16" or "bfloat16".
        workers: number of data-loading processes; 0 loads in this one.
        progress: called with ("evaluate", batches done, total batches).
        layers: filled with how adaptive each dynamic layer is on the first batch.

    Raises:
        DataError: the split is empty.
        InputError: the model does not run on the task's data.
    """
    check_module(model)
    if amp is not None and amp not in AMP:
        raise ConfigError(f"amp must be one of {', '.join(AMP)}, got {amp!r}")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    where = _device(model, device)
    if amp == "bfloat16":
        tell_slow_bfloat16(where.type)
    model.to(where)
    samples = task.dataset(split)
    if not len(samples):
        raise DataError(f"task {task.name}: the {split} split has no samples")
    # A separate generator: a loader draws one number from the global one each time it starts.
    loader: DataLoader[Sample] = DataLoader(
        samples, batch_size, collate_fn=task.collate, num_workers=workers, generator=torch.Generator().manual_seed(0)
    )
    metrics = {name: metric.to(where) for name, metric in task.metrics().items()}
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    if amp is not None:
        autocast = partial(torch.autocast, where.type, dtype=AMP[amp])
    with evaluating(model), seeded(0), ExitStack() as stack:
        found = stack.enter_context(observed(model)) if layers is not None else []
        for done, batch in enumerate(loaded(loader)):
            if progress is not None:
                progress("evaluate", done, len(loader))
            batch = to_device(batch, where)
            with autocast(), running(model, batch, task):
                output = task.predict(model, batch)
            task.update(metrics, output, batch)
    if layers is not None:
        layers += found
    if progress is not None:
        progress("evaluate", len(loader), len(loader))
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


_OTHER_FLOATS = (torch.float64, torch.float16, torch.bfloat16)
_MULTIPLES = (2, 4, 8, 16, 32)  # of which networks may need the sides of an image to be multiples
_NAMED = 3  # sizes of a batch's images in a message


@contextmanager
def running(model: nn.Module, batch: Batch, task: Task) -> Iterator[None]:
    """Context in which a model that cannot take the batch raises an `InputError`, with the padding that would help if one does."""
    try:
        yield
    except (SurgeonError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        other = next((p.dtype for p in model.parameters() if p.dtype in _OTHER_FLOATS), None)
        hint = _padding(model, batch, task)
        if other is not None:
            hint = f". Its weights are {other}, and tasks are for torch.float32: call .float() on it"
        raise InputError(
            f"{type(model).__name__} does not run on {_told(batch)} of task {task.name}: {type(error).__name__}: {error}"
            f"{hint}"
        ) from error


def _sides(batch: Batch) -> list[tuple[int, int]]:
    """The different (height, width) of a batch's images, without the padding of `collate_padded`."""
    sizes = batch.get("input_size")
    found = [batch["input"].shape[-2:]] if sizes is None else sizes.tolist()
    return list(dict.fromkeys((int(height), int(width)) for height, width in found))


def _told(batch: Batch) -> str:
    """The shape of a batch, or the sizes of its images if they differ."""
    if "input_size" not in batch:
        return f"a batch {tuple(batch['input'].shape)}"
    sides = _sides(batch)
    names = [f"{width}x{height}" for height, width in sides[:_NAMED]]
    if more := len(sides) - len(names):
        names.append(f"{more} other size{'s' * (more != 1)}")
    told = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"a batch of {len(batch['input'])} images of {told} pixels"


def _padding(model: nn.Module, batch: Batch, task: Task) -> str:
    """The smallest `multiple` with which the model runs on the batch's sizes; "" if they are not why it does not run.

    Tried on parts of an image whose sides leave the same remainders.
    """
    if model.training or not hasattr(task.config, "multiple"):  # training does not pad
        return ""
    parts = {tuple(min(side, 64 + side % _MULTIPLES[-1]) for side in sides) for sides in _sides(batch)}

    def runs(multiple: int) -> bool:
        padding = copy.copy(task)
        option: dict[str, Any] = {"multiple": multiple}
        padding.config = replace(task.config, **option)
        try:
            with torch.no_grad():
                for height, width in parts:
                    padding.predict(model, {"input": batch["input"][:1, ..., :height, :width]})
        except Exception:  # third-party code may raise anything
            return False
        return True

    now = task.multiple
    found = None if runs(now) else next((one for one in _MULTIPLES if one > now and runs(one)), None)
    if found is None:
        return ""
    option = called(f"--task-option multiple={found}", f"multiple={found}")
    return (
        f". Networks that halve the image k times need sides that are multiples of 2^k; this one runs with {option}, which pads "
        "them and cuts the output"
    )


def _device(model: nn.Module, wanted: str | torch.device | None) -> torch.device:
    if wanted is None:
        first = next((p for p in model.parameters()), None)
        return torch.device("cpu") if first is None else first.device
    try:
        found = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {str(wanted)!r}; expected cpu, cuda, cuda:N or mps") from error
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"device {found} not found: this machine has {torch.cuda.device_count()} CUDA devices")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device mps not found")
    return found
