"""The folder of a trial: `try.json` (its settings), `scores/` (one file per run), `model/` (best conversion), `report/`."""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from surgeon.errors import CheckpointError, DataError
from surgeon.models.folder import fresh_folder
from surgeon.records.training import check_same_trial
from surgeon.util.files import check_fields, read_object, write_text
from surgeon.util.outputs import RUN, SUMMARY, TRIAL, check_trial_output
from surgeon.zoo.finetune.folder import held
from surgeon.zoo.tasks.data.fingerprint import changes
from surgeon.zoo.trial.answer import ARMS

FORMAT, VERSION = "surgeon-try", 1
_LATER = ("model options",)  # not in the records of earlier versions
_NUMBER = (int, float)
_FIELDS = {
    "identity": dict,
    "data": {"train": dict, "val": dict},
    "plan": dict,
    "speed": dict,
    "pace": {arm: [_NUMBER] for arm in ARMS},
}
_PLAN = {"steps": int, "rates": [_NUMBER], "choose": int, "judge": int}
_SCORE = {"arm": str, "rate": _NUMBER, "seed": int, "seconds": _NUMBER, "step_seconds": _NUMBER, "epochs": _NUMBER}


class TryFolder:
    """Paths of a trial; reads and writes its files."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.record = self.path / TRIAL
        self.clock = self.path / "clock.json"
        self.start = self.path / "start.json"
        self.scores = self.path / "scores"
        self.runs = self.path / "runs"
        self.model = self.path / "model"
        self.report = self.path / "report"
        self.answer = self.path / "answer.json"

    def check(self, *, resume: bool, force: bool) -> None:
        """Raise unless a trial may start or resume here; called before any work."""
        check_trial_output(self.path, resume=resume, force=force)

    def hold(self, *, begin: bool) -> AbstractContextManager[None]:
        """Lock the trial in this folder against other processes, or an empty folder created to start one.

        Raises `CheckpointError` if another process holds it.
        """
        try:
            if begin:
                self.path.mkdir(parents=True)
        except FileExistsError as error:
            raise CheckpointError(f"another trial has started in {self.path} meanwhile") from error
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from error
        return held(self.path, f"the trial in {self.path}")

    def create(self, values: dict[str, Any], *, new: bool, keep: bool = False) -> None:
        """Start in a locked folder: write the record, and replace the content unless told to keep it.

        A new folder is removed if that fails.
        """
        if not keep:
            for old in (self.clock, self.answer, self.start):
                old.unlink(missing_ok=True)
            for folder in (self.scores, self.runs, self.model, self.report):
                shutil.rmtree(folder, ignore_errors=True)
        try:
            self.write(self.record, {"format": FORMAT, "version": VERSION, **values})
        except BaseException:
            if new:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def read(self) -> dict[str, Any]:
        """The record. Raises `CheckpointError` if it is not one of this version."""
        values = read_object(self.record)
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            raise CheckpointError(f"{self.record} is not the record of a trial that this version of surgeon can resume")
        values.setdefault("pace", {arm: [] for arm in ARMS})  # not in the records of earlier versions
        check_fields(values, _FIELDS, str(self.record))
        check_fields(values["plan"], _PLAN, f"{self.record}: plan")
        return values

    def compare(self, old: dict[str, Any], identity: dict[str, Any], data: dict[str, Any]) -> None:
        """Raise `ConfigError` or `DataError`, naming the differences, if the trial here is another one."""
        before = {key: identity[key] for key in _LATER} | old["identity"]
        check_same_trial(before, identity)
        other = changes(old["data"], data)
        if other:
            raise DataError(
                f"the data differ from those that the trial in {self.path} started with: {'; '.join(other)}"
            )

    def read_scores(self) -> dict[str, dict[str, Any]]:
        """Judged scores, by the name of the run."""
        found = {}
        for file in sorted(self.scores.glob("*.json")) if self.scores.is_dir() else ():
            values = read_object(file)
            check_fields(values, _SCORE, str(file))
            found[file.stem] = values
        return found

    def read_start(self) -> float | None:
        """The metric of the network before any training; None if it was not measured."""
        if not self.start.is_file():
            return None
        values = read_object(self.start)
        check_fields(values, {"judged": _NUMBER}, str(self.start))
        return float(values["judged"])

    def spent(self) -> tuple[float, float]:
        """Seconds that earlier sessions took, and the part of them spent on the unfinished run."""
        if not self.clock.is_file():
            return 0.0, 0.0
        values = read_object(self.clock)
        check_fields(values, {"seconds": _NUMBER, "run": _NUMBER}, str(self.clock))
        return float(values["seconds"]), float(values["run"])

    def keep(self, run: Path) -> None:
        """Make a run's network that of `model/`, with the record of its training."""
        with fresh_folder(self.model, force=self.model.exists()) as fresh:
            shutil.copytree(run, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns("training"))
            (fresh / RUN).parent.mkdir()
            for record in (RUN, SUMMARY):
                shutil.copyfile(run / record, fresh / record)

    def write(self, path: Path, values: dict[str, Any]) -> None:
        """Write a JSON file atomically. Raises `CheckpointError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
