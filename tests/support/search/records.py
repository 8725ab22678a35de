"""What a study holds, for comparison."""

from pathlib import Path

import optuna
from optuna.storages import JournalStorage

from surgeon.search.study.journal import StudyJournal
from surgeon.search.study.record import Record
from surgeon.search.study.study_file import StudyFile


def proposals(records: list[Record]) -> list[tuple[int, str | None, tuple[float, ...] | None]]:
    return [(one.number, one.hash, one.values) for one in records]


def read(path: Path) -> list[Record]:
    """The records of a study that is being, or was, written by others."""
    storage = JournalStorage(StudyJournal(path))
    file = StudyFile(path)
    file.study = optuna.load_study(study_name="search", storage=storage)
    return file.records()
