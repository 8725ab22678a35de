"""The samples of each step, and all randomness in it: functions of only the seed, the step and the process.

So a killed run needs only the number of its next step to continue exactly as it would have.
"""

import hashlib
import random
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from surgeon.util.copying import seed_torch
from surgeon.zoo.tasks import Batch, Task, TaskDataset
from surgeon.zoo.tasks.data.loading import loaded

# Signals that ask a run to stop: Ctrl-C, a batch system, a terminal that is closed.
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def mixed(*numbers: int | str) -> int:
    """A 63-bit number that depends on all arguments."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_everything(*numbers: int | str) -> None:
    """Seed the global generators of Python, numpy and torch (all devices), from which layers draw (dropout, Gumbel noise)."""
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    seed_torch(seed)


class Draws(Sampler[list[int]]):
    """Draw numbers (see `TaskDataset`) of one process's micro-batches, starting at micro-step `start`, without end.

    Every epoch is a new permutation. Batches continue across epoch boundaries: none is short, and no sample is left out.
    """

    def __init__(self, samples: int, batch: int, *, seed: int, start: int, rank: int = 0, processes: int = 1) -> None:
        self.samples, self.batch, self.seed, self.start = samples, batch, seed, start
        self.rank, self.part = rank, batch // processes
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.start
        while True:
            first = micro * self.batch + self.rank * self.part
            yield [self.draw(position) for position in range(first, first + self.part)]
            micro += 1

    def draw(self, position: int) -> int:
        """The draw at a position of the endless sequence of samples."""
        epoch, place = divmod(position, self.samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(mixed(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.samples, generator=generator)
        return epoch * self.samples + int(self._order[place])


def training_batches(task: Task, dataset: TaskDataset, draws: Draws, workers: int) -> Iterator[Batch]:
    """This process's micro-batches, collated, on the CPU, starting at the sampler's start."""
    yield from loaded(_loader(dataset, task, workers, draws))


def validation_batches(
    task: Task, dataset: TaskDataset, batch: int, workers: int, *, rank: int = 0, processes: int = 1
) -> Iterator[Batch]:
    """Every sample of the set once, in order; several processes share them."""
    mine = range(rank, len(dataset), processes)
    parts = [list(mine[first : first + batch]) for first in range(0, len(mine), batch)]
    yield from loaded(_loader(dataset, task, workers, parts))


def _loader(dataset: TaskDataset, task: Task, workers: int, batches: Iterable[list[int]]) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=task.collate,
        worker_init_fn=_leave_signals_to_parent if workers else None,
        generator=torch.Generator(),  # a separate one: by default a loader draws from the global one
        pin_memory=torch.cuda.is_available(),
    )


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore the group's first stop signal: training handles it and needs data for one more step; a second SIGTERM ends."""

    def once(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in STOPS:
        signal.signal(number, once if number == signal.SIGTERM else signal.SIG_IGN)


def to_device(batch: Batch, device: torch.device, *, channels_last: bool) -> Batch:
    """The batch on a device; images in the model's memory format."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if channels_last and value.dim() == 4:
            return value.to(device, non_blocking=True, memory_format=torch.channels_last)
        return value.to(device, non_blocking=True)

    return {name: moved(value) for name, value in batch.items()}
