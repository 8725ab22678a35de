"""The folder of a run: a surgeon folder when it is complete, and `training/` beside the model from the beginning.

`training/` holds run.json (model, task, options), checkpoints/, log.jsonl, tensorboard/ and, at the end, summary.json.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from surgeon.checkpoint import save
from surgeon.collapse_report import CollapseReport
from surgeon.errors import CheckpointError, ConfigError
from surgeon.recipe import FILE as RECIPE
from surgeon.recipe import BaseModel, parse_json, read_text, versions
from surgeon.report import Report
from surgeon.zoo.finetune.config import FREE, FinetuneConfig
from surgeon.zoo.finetune.state import sync, write_text
from surgeon.zoo.tasks import Task

FORMAT = "surgeon-finetune"
VERSION = 1


class RunFolder:
    """Paths of a run, and what may be done with a folder that is there already."""

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.training = self.output / "training"
        self.record = self.training / "run.json"
        self.checkpoints = self.training / "checkpoints"
        self.summary = self.training / "summary.json"

    def check(self, *, resume: bool, force: bool) -> None:
        """Raise unless a run may be started, or taken up again, here: before any work."""
        if resume and force:
            raise ConfigError("resume goes on with a run, force replaces it: give one of them")
        if resume:
            if not self.record.is_file():
                raise CheckpointError(f"there is no run to take up again in {self.output}: it has no training/run.json")
            return
        if not self.output.exists() and not self.output.is_symlink():
            return
        if not force:
            hint = "go on with it (--resume), or replace it (--force)" if self.record.is_file() else "or use --force"
            raise CheckpointError(f"the output {self.output} exists; choose another with -o, {hint}")
        if not self.output.is_dir() or self.output.is_symlink():
            raise CheckpointError(f"the output {self.output} exists and is not a folder: --force replaces only folders")
        if any(self.output.iterdir()) and not ((self.output / RECIPE).is_file() or self.record.is_file()):
            raise CheckpointError(f"the output {self.output} was not written by surgeon: --force leaves it alone")

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

    def compare(self, record: dict[str, Any]) -> list[str]:
        """Raise `ConfigError` naming the options that are not those of the run here; returns notes on what else changed."""
        old = parse_json(read_text(self.record), str(self.record))
        if not isinstance(old, dict) or old.get("format") != FORMAT or old.get("version") != VERSION:
            raise CheckpointError(
                f"{self.record} is not the record of a run that this version of surgeon can take up again"
            )
        changed = []
        for part in ("model", "task", "options", "config"):
            before, now = old[part], record[part]
            if part in ("options", "config"):
                keys = [key for key in {**before, **now} if key not in FREE and before.get(key) != now.get(key)]
                changed += [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in keys]
            elif before != now:
                changed.append(f"{part} was {before!r} and is {now!r}")
        if changed:
            raise ConfigError(f"a run goes on with the options it began with, and {'; '.join(changed)}")
        notes = []
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
        "config": config.to_dict(),
        "processes": processes,
        "versions": versions(),
    }


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, os.PathLike):
        return str(Path(value).absolute())
    return list(value) if isinstance(value, tuple) else value
