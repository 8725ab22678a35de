"""Data set for tasks that make each sample from one item of a list."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from surgeon.zoo.tasks.base import Sample, TaskDataset

T = TypeVar("T")


class ItemDataset(TaskDataset, Generic[T]):
    """`make(item, generator)` for every item, `repeats` times.

    Items come with their number in the whole set. Draws from a fixed set take their random numbers from that number, so
    they are the same at every draw and with every limit; other draws take them from the number of the draw.
    """

    def __init__(
        self,
        items: Sequence[tuple[int, T]],
        make: Callable[[T, torch.Generator], Sample],
        *,
        seed: int,
        fixed: bool,
        repeats: int = 1,
    ) -> None:
        self.items, self.make, self.seed, self.fixed, self.repeats = items, make, seed, fixed, repeats

    def __len__(self) -> int:
        return len(self.items) * self.repeats

    def __getitem__(self, draw: int) -> Sample:
        number, item = self.items[draw % len(self) // self.repeats]
        return self.make(item, self.generator_for(number if self.fixed else draw))
