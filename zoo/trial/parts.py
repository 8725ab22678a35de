"""A task restricted to part of its validation samples: one part selects settings, the other one judges."""

from surgeon.zoo.tasks import Sample, Split, Task, TaskDataset


class _Part(Task):
    """Mixed into a task's class by `part_of`. Every `stride`-th validation sample starting at `first`, at most `count`."""

    kind: type[Task]  # the task's own class
    first: int
    stride: int
    count: int | None

    def dataset(self, split: Split) -> TaskDataset:
        whole = self.kind.dataset(self, split)
        if split != "val":
            return whole
        return Chosen(whole, spread(range(self.first, len(whole), self.stride), self.count))

    def check(self) -> None:
        """The whole task was checked before its parts are made."""


class Chosen(TaskDataset):
    """Selected samples of a data set whose samples are the same at every draw."""

    def __init__(self, whole: TaskDataset, numbers: list[int]) -> None:
        self.whole, self.numbers, self.seed = whole, numbers, whole.seed

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, draw: int) -> Sample:
        return self.whole[self.numbers[draw % len(self.numbers)]]


def part_of(task: Task, first: int, stride: int, count: int | None = None, purpose: str = "") -> Task:
    """A task with the same options and the validation samples `first`, `first + stride`, ..., at most `count`, evenly spread.

    `purpose`: what these are for, in words.
    """
    kind = type(task)
    values = {"kind": kind, "first": first, "stride": stride, "count": count, "purpose": purpose}
    part: Task = type(f"Part{kind.__name__}", (_Part, kind), values)(task.config, seed=task.seed)
    return part


def spread(numbers: range, count: int | None) -> list[int]:
    """At most `count` of the numbers, evenly spread."""
    if count is None or count >= len(numbers):
        return list(numbers)
    return [numbers[index * len(numbers) // count] for index in range(count)]
