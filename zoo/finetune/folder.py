"""The folder of a run: a surgeon folder when it is complete, and `training/` beside the model from the beginning.

`training/` holds run.json (model, task, options), checkpoints/, log.jsonl, tensorboard/ and, at the end, summary.json.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.errors import CheckpointError, ConfigError, DataError
from surgeon.models.checkpoint import save
from surgeon.records.collapse_report import CollapseReport
from surgeon.records.recipe import FILE as RECIPE
from surgeon.records.recipe import BaseModel, versions
from surgeon.records.report import Report
from surgeon.util.files import check_fields, read_object, sync
from surgeon.util.outputs import RUN, check_run_output
from surgeon.zoo.finetune.config import FREE, TOLD, FinetuneConfig
from surgeon.zoo.finetune.state import read_log, write_text
from surgeon.zoo.tasks import Task
from surgeon.zoo.tasks.data.fingerprint import changes, fingerprint

FORMAT = "surgeon-finetune"
VERSION = 1
LOCK = ".lock"
_PLACES = ("data", "train", "val")  # options that say where the data lie
_FIELDS = {
    **dict.fromkeys(("model", "weights", "task"), str),
    **dict.fromkeys(("options", "config", "versions"), dict),
    "processes": int,
}

_HELD: set[int] = set()  # descriptors of the locks that this process has


@cache
def _free_in_children() -> None:
    """Have processes that are forked (those that load data) close the locks: they may live a little longer than a killed run."""

    def close() -> None:
        while _HELD:
            with contextlib.suppress(OSError):
                os.close(_HELD.pop())

    os.register_at_fork(after_in_child=close)


@contextlib.contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder, by a file in it, against other processes; raises `CheckpointError` where one has `what`."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    try:
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(f"{what} is going on in another process") from error
        _free_in_children()
        _HELD.add(lock.fileno())
        try:
            yield
        finally:
            _HELD.discard(lock.fileno())
            fcntl.flock(lock, fcntl.LOCK_UN)  # for copies in children, too


class RunFolder:
    """Paths of a run, and what may be done with a folder that is there already."""

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.training = self.output / "training"
        self.record = self.output / RUN
        self.checkpoints = self.training / "checkpoints"
        self.summary = self.training / "summary.json"

    def check(self, *, resume: bool, force: bool) -> None:
        """Raise unless a run may be started, or taken up again, here: before any work."""
        check_run_output(self.output, resume=resume, force=force)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run against other processes; raises `CheckpointError` where one has it. A folder without a run is free."""
        if not self.training.is_dir():
            yield
            return
        with held(self.training, f"the run in {self.output}"):
            yield

    def create(self, record: dict[str, Any]) -> None:
        """Start a run: write down what is run, in the place of what `check` allowed to replace.

        The folder appears with its record in it, or not at all.
        """
        fresh, old = (self.output.with_name(f".{self.output.name}.{kind}-{os.getpid()}") for kind in ("partial", "old"))
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            (fresh / "training").mkdir(parents=True)
            write_text(fresh / "training" / "run.json", json.dumps(record, indent=2) + "\n")
            if self.output.exists():
                self.output.rename(old)
            fresh.rename(self.output)
            sync(self.output.parent)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.output}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    def read_record(self) -> dict[str, Any]:
        """What run.json says; raises `CheckpointError` for what no run of this version wrote."""
        old = read_object(self.record)
        if old.get("format") != FORMAT or old.get("version") != VERSION:
            raise CheckpointError(
                f"{self.record} is not the record of a run that this version of surgeon can take up again"
            )
        check_fields(old, _FIELDS, str(self.record))
        if "data" in old:
            check_fields(old["data"], {"train": dict, "val": dict}, f"{self.record}: data")
            check_fields(old["data"].get("classes", []), [str], f"{self.record}: data: classes")
        return old

    def compare(self, record: dict[str, Any]) -> list[str]:
        """Raise `ConfigError` naming the options that are not those of the run here; returns notes on what else changed.

        What the run has left so far is looked at as well: `CheckpointError` where it cannot be used.
        """
        old = self.read_record()
        list(read_log(self.training / "log.jsonl"))
        changed = [
            f"{key} was {old[key]!r} and is {record[key]!r}" for key in ("model", "task") if old[key] != record[key]
        ]
        notes = []
        moved = _PLACES if "data" in old else ()  # what lies there tells more than where it lies
        for part, free in (("options", moved), ("config", FREE)):
            before, now = old[part], record[part]
            for key in [key for key in {**before, **now} if key not in free and before.get(key) != now.get(key)]:
                told = f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
                if part == "config" and key in TOLD:
                    notes.append(f"taken up again with another option: {told}")
                else:
                    changed.append(told)
        if changed:
            raise ConfigError(f"a run goes on with the options it began with, and {'; '.join(changed)}")
        other = changes(old["data"], record["data"]) if "data" in old else []
        if other:
            raise DataError(f"the data are not those that the run in {self.output} began with: {'; '.join(other)}")
        if old["weights"] != record["weights"]:
            raise ConfigError(
                f"the weights of {record['model']} are not those that the run in {self.output} began with"
            )
        if old["processes"] != record["processes"]:
            notes.append(
                f"begun with {old['processes']} processes, taken up with {record['processes']}: equal up to rounding"
            )
        if old["versions"] != record["versions"]:
            notes.append("begun with other versions of the libraries: no longer bit for bit the same")
        return notes

    def finish(
        self, model: nn.Module, base: BaseModel | None, report: Report | CollapseReport | None, summary: str
    ) -> None:
        """Make the folder a surgeon folder: the recipe comes last, and with it the folder is complete."""
        fresh = self.training / ".model"
        save(model, fresh, base=base, report=report, force=True)
        try:
            (self.output / RECIPE).unlink(missing_ok=True)
            for file in sorted(fresh.iterdir(), key=lambda file: file.name == RECIPE):
                file.replace(self.output / file.name)
                sync(self.output)
            fresh.rmdir()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.output}: {error.strerror or error}") from error
        write_text(self.summary, summary)


def record(name: str, weights: str, task: Task, config: FinetuneConfig, processes: int) -> dict[str, Any]:
    """What run.json says."""
    options = {key: _plain(value) for key, value in dataclasses.asdict(task.config).items()}
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": name,
        "weights": weights,
        "task": task.name,
        "options": options | {"seed of the task": task.seed},
        "data": fingerprint(task),
        "config": config.to_dict(),
        "processes": processes,
        "versions": versions(),
    }


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, os.PathLike):
        return str(Path(value).absolute())
    return list(value) if isinstance(value, tuple) else value
