"""Batches from a multi-process loader, with failures of a process reported in one line."""

import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

from surgeon.errors import DataError, SurgeonError, TrainingError

T = TypeVar("T")


def loaded(loader: Iterable[T]) -> Iterator[T]:
    """The batches. Raises `DataError` for an unusable file, `TrainingError` for a process that was killed."""
    try:
        yield from loader
    except SurgeonError as error:
        lines = str(error).strip().splitlines()
        if "DataLoader worker process" not in lines[0]:
            raise
        raise DataError(lines[-1].partition(": ")[2] or lines[-1]) from error
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        raise TrainingError(
            f"a data-loading process died, possibly out of memory ({str(error).splitlines()[0]}); give fewer --workers"
        ) from error
