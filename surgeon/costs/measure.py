"""Measurements of a real step on a real device: peak memory from the allocator, and interleaved timings."""

import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import nn

from surgeon.costs.emulate import to_channels_last
from surgeon.costs.settings import Settings, default_loss, image_dtype, make_optimizer
from surgeon.errors import BackendError
from surgeon.sites.inputs import call_arguments
from surgeon.util.copying import checkpoint_gradients


class NoDeviceError(BackendError):
    """A measurement needs a CUDA device."""

    exit_code = 1


@dataclass(frozen=True)
class MeasuredStep:
    """CUDA's memory statistics for a steady step, bytes."""

    peak_bytes: int
    reserved_bytes: int


class Step:
    """One training step or inference of a model on a device, repeatable."""

    def __init__(self, model: nn.Module, settings: Settings, device: str) -> None:
        self.settings = settings
        self.device = device
        self.model = deepcopy(model).to(device).train(settings.mode == "train")
        if settings.checkpointing:
            checkpoint_gradients(self.model)
        self.x = torch.randn((settings.batch_size, *settings.input_size), device=device).to(image_dtype(model))
        if settings.channels_last:
            to_channels_last(self.model)
            self.x = self.x.to(memory_format=torch.channels_last)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(settings, trainable) if settings.mode == "train" else None

    def __call__(self) -> None:
        """Run the step."""
        settings = self.settings
        dtype = torch.bfloat16 if self.device == "cpu" else settings.amp
        autocast = torch.autocast(self.device, dtype=dtype, enabled=settings.amp is not None)
        if settings.mode == "infer":
            with torch.no_grad(), autocast:
                self.model(*call_arguments(self.model, self.x, train=False))
            return
        for _ in range(settings.accumulate):
            with autocast:
                out = self.model(*call_arguments(self.model, self.x, train=True))
                loss = (settings.loss or default_loss)(out)
            del out
            loss.backward()
            del loss
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def has_device() -> bool:
    """Whether this machine has a CUDA device."""
    return torch.cuda.is_available()


def measure(model: nn.Module, settings: Settings, *, warmup: int = 2) -> MeasuredStep:
    """Peak memory of a steady step on the CUDA device; raises `NoDeviceError` if there is none."""
    if not has_device():
        raise NoDeviceError("measuring memory needs a CUDA device, and this machine has none")
    torch.cuda.empty_cache()
    step = Step(model, settings, "cuda")
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    result = MeasuredStep(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    del step
    torch.cuda.empty_cache()
    return result


@dataclass(frozen=True)
class Timing:
    """Seconds of single steps, interleaved with those of the other models."""

    seconds: tuple[float, ...]
    batch_size: int

    @property
    def median(self) -> float:
        """Median seconds of one step."""
        return statistics.median(self.seconds)

    @property
    def throughput(self) -> float:
        """Images per second."""
        return self.batch_size / self.median

    @property
    def spread(self) -> float:
        """Interquartile range relative to the median; 0 for fewer than four steps."""
        if len(self.seconds) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


def interleaved(models: list[nn.Module], settings: Settings, *, rounds: int, device: str) -> list[Timing]:
    """Time one step of each model in turn, `rounds` times after one warm-up, so that drift of the machine affects all alike."""
    steps = [Step(model, settings, device) for model in models]
    return [Timing(tuple(kept), settings.batch_size) for kept in in_turn(steps, rounds=rounds, device=device)]


def in_turn(steps: Sequence[Callable[[], object]], *, rounds: int, device: str) -> list[list[float]]:
    """Seconds of each step, run in turn with the others, `rounds` times after one warm-up."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(rounds + 1):
        for step, kept in zip(steps, seconds, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            if number:
                kept.append(time.perf_counter() - start)
    return seconds


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
