"""The folder of a run: `training/` from the start, and a surgeon folder once the run is complete.

`training/` contains run.json (model, task, options), checkpoints/, log.jsonl, tensorboard/ and, at the end, summary.json.
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
from surgeon.records.recipe import BaseModel, versions
from surgeon.records.report import Report
from surgeon.records.training import check_same_options
from surgeon.util.files import check_fields, read_object, sync
from surgeon.util.outputs import RECIPE, RUN, SUMMARY, check_run_output
from surgeon.zoo.finetune.config import FinetuneConfig
from surgeon.zoo.finetune.state import read_log, write_text
from surgeon.zoo.finetune.summary import Summary
from surgeon.zoo.tasks import Task
from surgeon.zoo.tasks.data.fingerprint import changes, fingerprint

FORMAT = "surgeon-finetune"
VERSION = 1
LOCK = ".lock"
_FIELDS = {
    **dict.fromkeys(("model", "weights", "task"), str),
    **dict.fromkeys(("options", "config", "versions"), dict),
    "processes": int,
}

_HELD: set[int] = set()  # descriptors of the locks held by this process


@cache
def _free_in_children() -> None:
    """Make forked processes (data loaders) close the locks: they may briefly outlive a killed run."""

    def close() -> None:
        while _HELD:
            with contextlib.suppress(OSError):
                os.close(_HELD.pop())

    os.register_at_fork(after_in_child=close)


@contextlib.contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Lock a folder with a file in it; raises `CheckpointError` if another process holds it. `what` describes the work."""
    try:
        import fcntl
    except ImportError:  # not POSIX
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
            raise CheckpointError(f"{what} is running in another process") from error
        _free_in_children()
        _HELD.add(lock.fileno())
        try:
            yield
        finally:
            _HELD.discard(lock.fileno())
            fcntl.flock(lock, fcntl.LOCK_UN)  # also for copies in child processes


class RunFolder:
    """Paths of a run, and checks of what may be done with an existing folder."""

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.training = self.output / "training"
        self.record = self.output / RUN
        self.checkpoints = self.training / "checkpoints"
        self.summary = self.output / SUMMARY

    def check(self, *, resume: bool, force: bool) -> None:
        """Raise unless a run may be started or resumed here; called before any work."""
        check_run_output(self.output, resume=resume, force=force)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run; raises `CheckpointError` if another process holds it. A folder without a run is not locked."""
        if not self.training.is_dir():
            yield
            return
        with held(self.training, f"the run in {self.output}"):
            yield

    def create(self, record: dict[str, Any]) -> None:
        """Start a run: write its record, in place of what `check` allowed to replace, which `settle` removes.

        The folder appears together with its record, or not at all.
        """
        fresh = self.output.with_name(f".{self.output.name}.partial-{os.getpid()}")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            (fresh / "training").mkdir(parents=True)
            write_text(fresh / RUN, json.dumps(record, indent=2) + "\n")
            if self._old.exists():  # of a killed run, which had no checkpoint yet
                shutil.rmtree(self.output, ignore_errors=True)
            elif self.output.exists():
                self.output.rename(self._old)
            try:
                fresh.rename(self.output)
            except OSError:
                self._put_back()
                raise
            sync(self.output.parent)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.output}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def settle(self) -> None:
        """Remove what the new run replaced: it has a checkpoint."""
        shutil.rmtree(self._old, ignore_errors=True)

    def discard(self) -> None:
        """Remove the folder; what it replaced comes back."""
        shutil.rmtree(self.output, ignore_errors=True)
        self._put_back()

    @property
    def _old(self) -> Path:
        return self.output.with_name(f".{self.output.name}.surgeon-old")

    def _put_back(self) -> None:
        if self._old.is_dir():
            self._old.rename(self.output)

    def read_record(self) -> dict[str, Any]:
        """The content of run.json; raises `CheckpointError` if it is not the record of a run of this version."""
        old = read_object(self.record)
        if old.get("format") != FORMAT or old.get("version") != VERSION:
            raise CheckpointError(f"{self.record} is not the record of a run that this version of surgeon can resume")
        check_fields(old, _FIELDS, str(self.record))
        if "data" in old:
            check_fields(old["data"], {"train": dict, "val": dict}, f"{self.record}: data")
            check_fields(old["data"].get("classes", []), [str], f"{self.record}: data: classes")
        return old

    def compare(self, record: dict[str, Any]) -> list[str]:
        """Raise `ConfigError` naming options that differ from those of the run here; returns notes on other changes.

        Also checks the run's files so far: `CheckpointError` if they cannot be used.
        """
        old = self.read_record()
        list(read_log(self.training / "log.jsonl"))
        notes = check_same_options(old, record)
        other = changes(old["data"], record["data"]) if "data" in old else []
        if other:
            raise DataError(
                f"the data differ from those that the run in {self.output} started with: {'; '.join(other)}"
            )
        if old["weights"] != record["weights"]:
            raise ConfigError(
                f"the weights of {record['model']} differ from those that the run in {self.output} started with"
            )
        if old["processes"] != record["processes"]:
            notes.append(
                f"started with {old['processes']} processes, resumed with {record['processes']}: equal up to rounding"
            )
        if old["versions"] != record["versions"]:
            notes.append("started with other library versions: no longer bit-identical")
        return notes

    def finish(
        self, model: nn.Module, base: BaseModel | None, report: Report | CollapseReport | None, summary: Summary
    ) -> None:
        """Make the folder a surgeon folder: the recipe is written last and completes it."""
        fresh = self.training / ".model"
        save(model, fresh, base=base, report=report, force=True, scores=summary.result.metrics)
        try:
            (self.output / RECIPE).unlink(missing_ok=True)
            for file in sorted(fresh.iterdir(), key=lambda file: file.name == RECIPE):
                file.replace(self.output / file.name)
                sync(self.output)
            fresh.rmdir()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.output}: {error.strerror or error}") from error
        write_text(self.summary, summary.to_json())


def record(name: str, weights: str, task: Task, config: FinetuneConfig, processes: int) -> dict[str, Any]:
    """The content of run.json."""
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
    """The value after a round trip through JSON."""
    if isinstance(value, os.PathLike):
        return str(Path(value).absolute())
    return list(value) if isinstance(value, tuple) else value
