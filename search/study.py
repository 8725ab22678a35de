"""A study on disk: what it is bound to, its trials, and who runs them.

Every trial is an Optuna trial, so that Optuna's own tools read the study. Its user attributes: `placement` (layer → option),
`hash`, `source`, `gain` (what the table expected), `worker`, `attempts`, and where they apply `duplicate_of`, `refused`, `error`,
`predicted`, `traced`, `seconds`.
"""

import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from surgeon.search.budget import Calibration
from surgeon.search.journal import Journal, Lease, StudyError, file_lock, forget_dead, is_alive

VERSION = 1
_IDENTITY = "surgeon:identity"
_CALIBRATION = "surgeon:calibration"


class OtherStudyError(StudyError):
    """A study is bound to another model, space, budget or evaluator."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One trial. `state`: complete, pruned, refused (over budget, never trained), failed, running or waiting."""

    number: int
    state: str
    hash: str | None
    placement: Mapping[str, str]
    source: str | None
    values: tuple[float, ...] | None
    duplicate_of: int | None
    attempts: int
    worker: str | None
    attributes: Mapping[str, Any] = field(repr=False)

    @property
    def counts(self) -> bool:
        """Whether it was an evaluation of its own."""
        return self.state in ("complete", "pruned") and self.duplicate_of is None


def record(trial: FrozenTrial) -> Record:
    """A trial as a record."""
    attributes = trial.user_attrs
    states = {
        TrialState.COMPLETE: "complete",
        TrialState.PRUNED: "refused" if "refused" in attributes else "pruned",
        TrialState.FAIL: "failed",
        TrialState.RUNNING: "running",
        TrialState.WAITING: "waiting",
    }
    values = trial.values if trial.state in (TrialState.COMPLETE, TrialState.PRUNED) else None
    return Record(
        number=trial.number,
        state=states[trial.state],
        hash=attributes.get("hash"),
        placement=attributes.get("placement", {}),
        source=attributes.get("source"),
        values=None if values is None else tuple(values),
        duplicate_of=attributes.get("duplicate_of"),
        attempts=int(attributes.get("attempts", 0)),
        worker=attributes.get("worker"),
        attributes=attributes,
    )


class StudyFile:
    """An Optuna study in a journal file, its lock, and the leases of its workers.

    `identity` are JSON values that the study is bound to: model, space, budgets, gains, evaluator, mode, seed.
    """

    def __init__(self, path: Path, name: str = "search") -> None:
        self.path = Path(path)
        self.name = name
        self.folder = self.path.with_name(self.path.name + ".workers")
        self.study: optuna.Study
        self._lease: Lease | None = None

    def open(
        self,
        identity: Mapping[str, Any],
        directions: Sequence[Any],
        sampler: BaseSampler,
        pruner: BasePruner | None,
        prelude: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
        *,
        resume: bool,
    ) -> None:
        """Open the study, or begin it with the waiting trials of `prelude`: (parameters, user attributes) of each.

        Raises:
            OtherStudyError: it is bound to something else; the message has the difference.
            StudyError: it exists and `resume` is not set, or the other way round, or cannot be read.
        """
        identity = json.loads(json.dumps({"version": VERSION, **identity}))
        if resume and not self.path.is_file():
            raise StudyError(f"there is no study {self.path} to go on with; leave out --resume to begin one")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self.path)
            with self._journal.exclusive():
                storage = JournalStorage(self._journal)
                exists = self.name in [study.study_name for study in storage.get_all_studies()]
                if exists and not resume:
                    raise StudyError(f"the study {self.path} exists already; go on with it (--resume), or name another")
                rest: dict[str, Any] = {"sampler": sampler, "pruner": pruner or optuna.pruners.NopPruner()}
                if not exists:
                    self.study = optuna.create_study(
                        storage=storage, study_name=self.name, directions=list(directions), **rest
                    )
                    self.study.set_user_attr(_IDENTITY, identity)
                    for parameters, attributes in prelude:
                        self.study.enqueue_trial(dict(parameters), user_attrs=dict(attributes))
                else:
                    self.study = optuna.load_study(storage=storage, study_name=self.name, **rest)
                    self._check_identity(identity)
        except (OSError, ValueError, AssertionError, KeyError) as error:
            if isinstance(error, StudyError):
                raise
            raise StudyError(f"cannot read the study {self.path}: {error}") from error

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        found = self.study.user_attrs.get(_IDENTITY)
        if not isinstance(found, dict):
            raise OtherStudyError(f"{self.path} is an Optuna study, but not one that surgeon began")
        lines = list(differences(found, identity))
        if lines:
            shown = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
            raise OtherStudyError(f"{self.path} is a study of something else: {shown}")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody else proposes or claims trials meanwhile; what is written becomes visible together."""
        with self._journal.exclusive():
            yield

    # --- trials ---------------------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number; not to be changed."""
        return self.study.get_trials(deepcopy=False)

    def records(self) -> list[Record]:
        """All trials as records."""
        return [record(trial) for trial in self.trials()]

    def view(self) -> list[Record]:
        """All trials of a study that this process is no worker of, also while others write it. Raises `StudyError`."""
        if not self.path.is_file():
            raise StudyError(f"there is no study {self.path}")
        try:
            storage = JournalStorage(Journal(self.path))
            self.study = optuna.load_study(storage=storage, study_name=self.name)
        except (OSError, ValueError, AssertionError, KeyError) as error:
            if isinstance(error, StudyError):
                raise
            raise StudyError(f"cannot read the study {self.path}: {error}") from error
        return self.records()

    def best(self) -> Record | None:
        """The completed trial of the best (first) value, the earliest of equals."""
        done = [one for one in self.records() if one.state == "complete" and one.values]
        if not done:
            return None
        sign = -1.0 if self.study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1.0
        return min(done, key=lambda one: (sign * (one.values or (0.0,))[0], one.number))

    def take_up(self, trial: FrozenTrial) -> optuna.Trial:
        """Go on with a trial that another worker, now dead, began. To be called within `exclusive`."""
        taken = optuna.Trial(self.study, trial._trial_id)
        self.claim(taken, attempts=int(trial.user_attrs.get("attempts", 0)) + 1)
        return taken

    def claim(self, trial: optuna.Trial, attempts: int = 1) -> None:
        """Note that this worker runs the trial."""
        trial.set_user_attr("worker", self.worker)
        trial.set_user_attr("attempts", attempts)

    def orphans(self) -> list[FrozenTrial]:
        """Running trials whose workers are gone."""
        running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
        return [trial for trial in running if not self._runs(trial.user_attrs.get("worker"))]

    def _runs(self, worker: str | None) -> bool:
        return worker is not None and worker != self.worker and is_alive(self.folder, worker)

    # --- workers --------------------------------------------------------------------------------------------------

    @property
    def worker(self) -> str:
        """This worker's name."""
        if self._lease is None:
            raise StudyError("this process is not a worker of the study")
        return self._lease.worker

    @contextmanager
    def working(self) -> Iterator[None]:
        """Be a worker of this study: hold a lease that ends with the process."""
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        with file_lock(self.path.with_name(self.path.name + ".lock")):
            forget_dead(self.folder)
            self._lease = Lease(self.folder, name)
        try:
            yield
        finally:
            self._lease.release()
            self._lease = None

    # --- calibration ----------------------------------------------------------------------------------------------

    @property
    def calibration(self) -> Calibration | None:
        """What the study learnt about memory; None before it learnt anything."""
        found = self.study.user_attrs.get(_CALIBRATION)
        return None if found is None else Calibration.from_dict(found)

    def keep_calibration(self, calibration: Calibration) -> None:
        """Write it for all workers."""
        self.study.set_user_attr(_CALIBRATION, calibration.to_dict())


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{where}.{key}" if where else str(key)
            if key not in old or key not in new:
                yield f"{inner} is only in {'this search' if key in new else 'the study'}"
            else:
                yield from differences(old[key], new[key], inner)
    elif isinstance(old, list) and isinstance(new, list) and all(isinstance(x, str) for x in [*old, *new]):
        gone, come = [x for x in old if x not in new], [x for x in new if x not in old]
        if gone or come or old != new:
            parts = [f"without {', '.join(gone)}"] if gone else []
            parts += [f"with {', '.join(come)}"] if come else []
            yield f"{where} {' and '.join(parts) or 'in another order'}"
    elif old != new:
        yield f"{where} is {_short(old)} in the study and {_short(new)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
