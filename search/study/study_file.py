"""A study in a local file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage
from optuna.trial import FrozenTrial

from surgeon.errors import SurgeonError
from surgeon.search.study.journal import Lease, StudyError, StudyJournal, file_lock, forget_dead, is_alive
from surgeon.search.study.study import Study


class StudyFile(Study):
    """A study in a journal file: the fastest storage, by an order of magnitude for many layers (benchmarks.stores).

    Its lock and the workers' leases are the kernel's (`journal.py`); everything written under the lock appears at once.
    """

    shared = False

    def __init__(self, path: Path, name: str = "search") -> None:
        self.path = Path(path)
        self.name, self.notes = name, {}
        self.folder = self.path.with_name(self.path.name + ".workers")
        self._storage: JournalStorage | None = None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def flag(self) -> str:
        return "--resume"

    def exists(self) -> bool:
        return self.path.is_file() and super().exists()

    def names(self) -> list[str]:
        return super().names() if self.path.is_file() else []

    def storage(self) -> BaseStorage:
        if self._storage is None:
            with self.errors():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._journal = StudyJournal(self.path)
                self._storage = JournalStorage(self._journal)
        return self._storage

    def close(self) -> None:
        """A file is open only while it is read or written: there is nothing to close."""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Writes become visible together."""
        self.storage()
        with self._journal.exclusive():
            yield

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn Optuna's errors for an invalid journal into a `StudyError`: it takes every line for one of its own."""
        try:
            yield
        except (OSError, ValueError, AssertionError, LookupError, TypeError, AttributeError, RecursionError) as error:
            if self._worker is not None or isinstance(error, SurgeonError):  # errors of a training pass through
                raise
            raise StudyError(f"cannot read the study {self.path}: {type(error).__name__}: {error}") from error

    def dead(self, trials: Sequence[FrozenTrial]) -> set[int]:
        names = {one.number: one.user_attrs.get("worker") for one in trials}
        left = (None, self._worker)  # half-written, or of this worker, which is idle when it asks
        return {number for number, name in names.items() if name in left or not is_alive(self.folder, name)}

    @contextmanager
    def leased(self) -> Iterator[None]:
        """A lease ends with the process, for any reason."""
        with file_lock(self.path.with_name(self.path.name + ".lock")):
            forget_dead(self.folder)
            lease = Lease(self.folder, self.worker)
        with lease:
            yield
