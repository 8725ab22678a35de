"""A search on disk: `study.jsonl` (Optuna's journal), `search.json` (the request), gains, models and finals.

study.jsonl      the trials; readable by optuna-dashboard. With --storage they are in a database instead
search.json      model, task, budgets, space: enough for status, report and export without building anything; before the trials,
                 while the gains are estimated, its `begun` is false
gains.json       the gain table used by the search
tensorboard/     curves of the search and hparams of the trials, one folder per worker
best/            the best placement with replacements trained so far, a surgeon folder
finals/          one folder per run of the final stage, and finals.json
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.costs.table import Option
from surgeon.search.space import Space
from surgeon.search.study.journal import StudyError, file_lock
from surgeon.search.study.record import Record, ranked
from surgeon.search.study.study import Study
from surgeon.search.study.study_file import StudyFile
from surgeon.util.files import check_fields, inside, read_object, write_text
from surgeon.util.outputs import SEARCH, STUDY, check_no_search

FORMAT = "surgeon-search"
VERSION = 1
NOTE = "best.json"


class SearchFolder:
    """Paths of a search, and the files next to the study."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.study = self.path / STUDY
        self.about = self.path / SEARCH
        self.gains = self.path / "gains.json"
        self.best = self.path / "best"
        self.finals = self.path / "finals"
        self.table = self.finals / "finals.json"
        self.report = self.path / "report"
        self.tensorboard = self.path / "tensorboard"

    def check(self, *, resume: bool, storage: Mapping[str, str] | None = None) -> None:
        """Raise an error unless a search may start or resume here; `storage` locates the study if it is in a database.

        `CheckpointError` if there is a search already, `StudyError` for anything else.
        """
        if storage is not None:
            known = _storage(self.about) if self.about.is_file() else storage
            if known != storage:
                where = "here" if known is None else f"named {known['name']!r} in {known['url']}"
                raise StudyError(f"{self.path} is the folder of another search, {where}: choose another -o")
        elif resume and _storage(self.about):
            raise StudyError(f"the search in {self.path} is in a database: pass its --storage")
        if storage is not None and self.about.is_file():
            return
        if resume and storage is None:
            if not self.study.is_file():
                raise StudyError(f"there is no search in {self.path} to resume; omit --resume to start one")
            return
        check_no_search(self.path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())) and not self.about.is_file():
            raise StudyError(f"{self.path} exists and is not the folder of a search: choose another -o")

    @property
    def study_name(self) -> str:
        """Name of its study in a database: the one it started or joined, otherwise its own name."""
        known = _storage(self.about)
        return known["name"] if known else self.path.absolute().name

    def final_of(self, key: str) -> Path | None:
        """The folder of an arm's first final run, from the longest training; None if there is none."""
        stem = inside(self.finals, key, StudyError).name
        runs = {
            int(name[1]): name[0]
            for path in (self.finals.iterdir() if self.finals.is_dir() else ())
            if (name := re.fullmatch(rf"{re.escape(stem)}-rung(\d{{1,3}})-seed0", path.name))
        }
        return inside(self.finals, runs[max(runs)], StudyError) if runs else None

    @contextlib.contextmanager
    def preparing(self, about: Mapping[str, Any]) -> Iterator[None]:
        """Context before the study begins: the search can be looked at; after an error its record is removed."""
        fresh = not self.path.exists()
        write_json(self.about, {**about, "begun": False})
        try:
            yield
        except BaseException:
            self.about.unlink(missing_ok=True)
            if fresh:
                with contextlib.suppress(OSError):  # something else is in it
                    self.path.rmdir()
            raise

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Context that keeps other workers of this search out of the final stage."""
        self.finals.mkdir(parents=True, exist_ok=True)
        with file_lock(self.finals / ".lock"):
            yield


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file atomically. Raises `StudyError`."""
    write_text(path, json.dumps(values, indent=1) + "\n", StudyError)


def read_kept(keep: Path) -> dict[str, Any] | None:
    """Record of the model in `best`: hash (the name of its folder), value, placement, and where it
    was recorded loss, flops and memory (bytes, peak); None before there is one.
    """
    note = keep / NOTE
    return _read(note, _KEPT) if note.is_file() else None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A search as stored on disk."""

    folder: SearchFolder
    about: Mapping[str, Any]
    space: Space
    records: list[Record]
    alive: frozenset[str]  # workers running now
    front: tuple[int, ...]  # with several objectives: the non-dominated trials according to Optuna
    finals: Mapping[str, Any] | None
    ended: str | None = None  # why there is no further placement
    begun: bool = True  # False while the gains are estimated: there is no study yet

    @property
    def higher_is_better(self) -> bool:
        """Direction of the task's primary metric."""
        return bool(self.about["task"]["higher_is_better"])

    def value(self, one: Record) -> float | None:
        """The measured value of a completed trial."""
        return one.value

    def ranked(self) -> list[Record]:
        """Completed evaluations, best first, without repetitions."""
        return ranked(self.records, higher=self.higher_is_better)

    def original(self) -> Record | None:
        """The unmodified model, trained equally."""
        return next((one for one in self.ranked() if not one.placement), None)

    def finals_done(self) -> tuple[int, int]:
        """How many arms of the finals are done, trained or refused, and how many there are."""
        arms = [] if self.finals is None else self.finals["arms"]
        return sum(bool(arm["values"] or arm["why_not"]) for arm in arms), len(arms)

    def compared(self) -> list[Mapping[str, Any]]:
        """The trained arms of the finals once all arms are done; empty before, because a part of them compares nothing."""
        done, of = self.finals_done()
        return [arm for arm in self.finals["arms"] if arm["values"]] if self.finals is not None and done == of else []

    def start(self) -> float | None:
        """The value of the unmodified model before any training; None in searches of older versions."""
        found = (one.attributes["start"] for one in self.records if "start" in one.attributes)
        return next((float(value) for value in found), None)


def study_of(folder: SearchFolder, known: Mapping[str, str] | None, url: str | None = None) -> Study:
    """The study of a search: its file, or the `known` database; `url` replaces the known URL, for its password."""
    if known is None:
        return StudyFile(folder.study)
    from surgeon.search.study.database import StudyDatabase  # SQLAlchemy: only for a study in a database
    from surgeon.search.study.database_url import check_named  # SQLAlchemy: only for a study in a database

    if not url:
        check_named(known["url"], str(folder.about))
    return StudyDatabase(url or known["url"], known["name"])


def _settled(one: Record, alive: frozenset[str]) -> Record:
    """The trial, interrupted if no worker that is alive runs it."""
    dead = one.state == "running" and one.worker not in alive
    return replace(one, state="interrupted") if dead else one


def read_search(path: str | Path, storage: str | None = None) -> Finished:
    """Read a search, finished or running. `storage`: the database's URL with its password. Raises `StudyError`."""
    folder = SearchFolder(path)
    if not folder.about.is_file():
        raise StudyError(f"there is no search in {folder.path}: it has no {folder.about.name}")
    about = read_object(folder.about, StudyError)
    begun = about.get("begun") is not False
    if begun and about.get("storage") is None and not folder.study.is_file():
        raise StudyError(f"there is no search in {folder.path}: it has no {folder.study.name}")
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise StudyError(f"{folder.about} is not the record of a search that this version of surgeon can read")
    about.setdefault("sampler", about.get("mode"))  # its name when trials had no parameters
    about.setdefault("objectives", ["metric"])
    check_fields(about, _ABOUT, str(folder.about), StudyError)
    space = _space(about["space"], str(folder.about))
    if not begun:
        return Finished(
            folder=folder, about=about, space=space, records=[], alive=frozenset(), front=(), finals=None, begun=False
        )
    file = study_of(folder, _storage(folder.about), storage)
    try:
        records, alive, front, ended = file.view(), file.running(), file.front(), file.ended
    finally:
        file.close()
    return Finished(
        folder=folder,
        about=about,
        space=space,
        records=[_settled(one, alive) for one in records],
        alive=alive,
        front=front,
        ended=ended,
        finals=_read(folder.table, _FINALS) if folder.table.is_file() else None,
    )


# Schemas of these files, for `check_fields`.
_NUMBER = (int, float)
_ABOUT = {
    "model": {"name": str},
    "task": {"name": str, "primary": str, "higher_is_better": bool},
    "budgets": str,
    "limits": {"*": (int, float, type(None))},
    "original": {"*": _NUMBER},
    "space": {
        "layers": [str],
        "stages": [(str, type(None))],
        "options": [{"type": str, "options": dict}],
        "allowed": [[int]],
    },
    "sampler": str,
    "objectives": [str],
    "seed": int,
    "steps": int,
    "gains": str,
}
_KEPT = {"hash": str, "value": _NUMBER, "placement": {"*": str}} | dict.fromkeys(
    ("loss", "flops", "memory"), (int, float, type(None))
)
_FINALS = {
    "steps": int,
    "seeds": int,
    "arms": [
        {
            "role": str,
            "hash": str,
            "placement": {"*": str},
            "values": [_NUMBER],
            "trial": int,
            "why_not": (str, type(None)),
        }
    ],
}
_STORAGE = {"url": str, "name": str}


def _read(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    values = read_object(path, StudyError)
    check_fields(values, fields, str(path), StudyError)
    return values


def _storage(path: Path) -> dict[str, str] | None:
    """The database that contains the study, from search.json; None if it is in the folder."""
    known = read_object(path, StudyError).get("storage") if path.is_file() else None
    if known is not None:
        check_fields(known, _STORAGE, f"{path}: storage", StudyError)
    return known


def space_values(space: Space) -> dict[str, Any]:
    """A space as JSON, with the stages that its hash leaves out."""
    return space.to_dict() | {"stages": list(space.stages)}


def _space(values: Mapping[str, Any], where: str) -> Space:
    options = tuple(Option(one["type"], dict(one["options"])) for one in values["options"])
    allowed = np.zeros((len(values["layers"]), len(options) + 1), dtype=np.bool_)
    if not len(values["layers"]) == len(values["stages"]) == len(values["allowed"]):
        raise StudyError(f"{where}: space: layers, stages and allowed are not of one length")
    for row, columns in zip(allowed, values["allowed"], strict=True):
        if not all(0 <= column <= len(options) for column in columns):
            raise StudyError(f"{where}: space: allowed contains an unknown option")
        row[columns] = True
    return Space(layers=tuple(values["layers"]), stages=tuple(values["stages"]), options=options, allowed=allowed)
