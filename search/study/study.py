"""A study: its identity, its trials, and its workers. `study_file.py` and `database.py` store it.

Every trial is an Optuna trial, so Optuna's own tools can read the study: its parameters are the decisions
(`search.sampling.parameters`), the budgets its constraints, and the rest its user attributes (`record.py`).
"""

import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from surgeon.errors import called
from surgeon.search.budget import Calibration
from surgeon.search.study.identity import VERSION, as_stored, differences
from surgeon.search.study.journal import StudyError
from surgeon.search.study.record import Record, checked, ranked, record
from surgeon.util.machine import machine

_IDENTITY = "surgeon:identity"
_CALIBRATION = "surgeon:calibration"
_NOTES = "surgeon:notes"
_END = "surgeon:end"


class OtherStudyError(StudyError):
    """The study is bound to another model, space, budget or evaluator."""


class Study(ABC):
    """An Optuna study, the lock shared by its workers, and their heartbeats.

    Optuna's storages hold the trials. The following is managed here, so that a study can be resumed without a trace:

    exclusive   Optuna has no lock around a proposal: two workers that ask at once train the same placement
    workers     Optuna fails the trial of a dead worker, and its retry gets a new number (hence other random numbers); here it is
                resumed under its own
    identity    Optuna continues any study of the same name and directions

    A subclass (a file, a database) defines the storage, the lock, which workers are dead, and how errors read.
    `identity` holds the JSON values that the study is bound to: model, space, budgets, gains, evaluator, sampler, objectives, seed.
    `notes` holds JSON values for workers that join without a folder.
    """

    shared: ClassVar[bool]  # whether workers on other machines may join
    name: str
    study: optuna.Study
    notes: Mapping[str, Any]
    _worker: str | None = None

    # --- defined by subclasses ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def flag(self) -> str:
        """The command-line flag that resumes the study."""

    @abstractmethod
    def storage(self) -> BaseStorage:
        """Optuna's storage. Raises `StudyError` if it cannot be reached."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Context in which nobody else proposes or claims trials; reentrant."""

    @abstractmethod
    def errors(self) -> AbstractContextManager[None]:
        """Context that turns errors of the storage into a `StudyError`."""

    @abstractmethod
    def dead(self, trials: Sequence[FrozenTrial]) -> set[int]:
        """Numbers of those of these running trials whose workers are certainly dead."""

    @abstractmethod
    def close(self) -> None:
        """Close connections; the study reopens them as needed."""

    # --- opening --------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether there is a completely initialized study to resume."""
        storage = self.storage()
        with self.errors():
            found = next((one for one in storage.get_all_studies() if one.study_name == self.name), None)
            return found is not None and self.is_ours(found.user_attrs)

    def names(self) -> list[str]:
        """Names of all studies in the same storage."""
        storage = self.storage()
        with self.errors():
            return [one.study_name for one in storage.get_all_studies()]

    def open(
        self,
        identity: Mapping[str, Any],
        directions: Sequence[Any],
        sampler: BaseSampler,
        pruner: BasePruner | None,
        *,
        resume: bool,
    ) -> None:
        """Open the study, or create it.

        Raises:
            OtherStudyError: it is bound to something else; the message has the difference.
            StudyError: it exists and `resume` is not set, or vice versa, or cannot be read.
        """
        if resume and not self.exists():
            raise StudyError(self._not_there())
        storage = self.storage()
        rest: dict[str, Any] = {"sampler": sampler, "pruner": pruner or optuna.pruners.NopPruner()}
        with self.errors(), self.exclusive():
            exists = self.exists()
            if exists and not resume:
                raise StudyError(f"the study {self} already exists; continue it ({self.flag}) or choose another name")
            if exists:
                self.study = optuna.load_study(storage=storage, study_name=self.name, **rest)
                self.check_identity(identity)
                return
            if self.name in self.names():
                self._clear(storage)
            self.study = optuna.create_study(storage=storage, study_name=self.name, directions=list(directions), **rest)
            self.study.set_user_attr(_NOTES, dict(self.notes))
            self.study.set_user_attr(_IDENTITY, as_stored(identity))  # last: a study with an identity is complete

    def _not_there(self) -> str:
        known = ", ".join(self.names()[:10]) or "none"
        return f"there is no study {self}; omit {self.flag.split()[0]} to start one. Existing studies: {known}"

    def _clear(self, storage: BaseStorage) -> None:
        """Remove the remains of a worker that was killed while creating this study."""
        found = optuna.load_study(storage=storage, study_name=self.name)
        # the notes are written first, and no trial before the identity
        if found.get_trials(deepcopy=False) or set(found.user_attrs) - {_NOTES}:
            raise StudyError(f"{self} is an Optuna study, but not one created by surgeon")
        optuna.delete_study(storage=storage, study_name=self.name)

    def view(self) -> list[Record]:
        """All trials of a study, for processes that are not its workers, even while others write it. Raises `StudyError`."""
        if not self.exists():
            raise StudyError(self._not_there())
        with self.errors():
            self.study = optuna.load_study(storage=self.storage(), study_name=self.name)
            return [record(checked(trial, str(self))) for trial in self.trials()]

    def read_notes(self) -> Mapping[str, Any]:
        """Notes of the worker that started the study. Raises `StudyError` if there is no study."""
        self.view()
        self.notes = self.study.user_attrs.get(_NOTES, {})
        return self.notes

    @staticmethod
    def is_ours(attributes: Mapping[str, Any]) -> bool:
        """Whether these are the attributes of a study created by surgeon."""
        return isinstance(attributes.get(_IDENTITY), dict)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The identity that the study is bound to."""
        found: Mapping[str, Any] = self.study.user_attrs[_IDENTITY]
        return found

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Raise `OtherStudyError`, with the difference, unless the study is bound to this."""
        if not self.is_ours(self.study.user_attrs):
            raise OtherStudyError(f"{self} is an Optuna study, but not one created by surgeon")
        if self.identity.get("version") != VERSION:
            raise OtherStudyError(
                f"{self} was started by another version of surgeon with a different trial format: it can be viewed (surgeon "
                "study) but not resumed; start a new search with another -o"
            )
        # each once, because one option may set several values
        lines = list(dict.fromkeys(differences(self.identity, as_stored(identity))))
        if lines:
            shown = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
            raise OtherStudyError(
                f"{self} is a study of something else: {shown}. Repeat the study's values to continue it, or start another "
                f"search{called(' (another -o)', '')}"
            )

    # --- trials ---------------------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number; do not modify."""
        return self.study.get_trials(deepcopy=False)

    def records(self) -> list[Record]:
        """All trials as records."""
        return [record(trial) for trial in self.trials()]

    def best(self) -> Record | None:
        """The best completed trial by its first value (`ranked`)."""
        higher = self.study.directions[0] == optuna.study.StudyDirection.MAXIMIZE
        return next(iter(ranked(self.records(), higher=higher)), None)

    def front(self) -> tuple[int, ...]:
        """Numbers of the trials on the Pareto front within the budgets (`study.best_trials`); empty for a single objective."""
        if len(self.study.directions) == 1:
            return ()
        return tuple(trial.number for trial in self.study.best_trials)

    def ask(self) -> optuna.Trial:
        """The next trial, a waiting one or a new one, to be run by this worker. Call it within `exclusive`."""
        trial = self.study.ask()
        self.claim(trial)
        return trial

    def take_up(self, trial: FrozenTrial) -> optuna.Trial:
        """Resume a trial started by a worker that has died. Call it within `exclusive`."""
        taken = optuna.Trial(self.study, trial._trial_id)
        self.claim(taken, attempts=int(trial.user_attrs.get("attempts", 0)) + 1)
        return taken

    def claim(self, trial: optuna.Trial, attempts: int = 1) -> None:
        """Record that this worker runs the trial. Call it within `exclusive`."""
        trial.set_user_attr("attempts", attempts)
        trial.set_user_attr("worker", self.worker)

    def orphans(self) -> list[FrozenTrial]:
        """Running trials whose workers are dead. Call it within `exclusive`: one without a worker's name was abandoned there."""
        running = self._running()
        dead = self.dead(running)
        return [one for one in running if one.number in dead]

    def running(self) -> frozenset[str]:
        """The workers that are evaluating a trial now."""
        running = self._running()
        dead = self.dead(running)
        return frozenset(
            one.user_attrs["worker"] for one in running if one.number not in dead and "worker" in one.user_attrs
        )

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials() if trial.state == TrialState.RUNNING]

    def end(self, trial: optuna.Trial, why: str) -> None:
        """Leave a trial without a placement to whoever asks next, and record why there is none. Call it within `exclusive`."""
        self.storage().set_trial_state_values(trial._trial_id, TrialState.WAITING)
        self.study.set_user_attr(_END, why)

    @property
    def ended(self) -> str | None:
        """Why there is no further placement; None while there are some."""
        found = self.study.user_attrs.get(_END)
        return found if isinstance(found, str) else None

    def tell(
        self,
        trial: optuna.Trial,
        values: Sequence[float] | None = None,
        state: TrialState | None = None,
        attributes: Mapping[str, Any] | None = None,
        constraints: Mapping[str, float] | None = None,
    ) -> bool:
        """Finish a trial; returns False, and writes nothing, if another worker took it over meanwhile."""
        told = False

        def write() -> None:
            nonlocal told
            with self.exclusive():
                now = self.trials()[trial.number]
                told = now.user_attrs.get("worker") == self.worker
                if not told or now.state.is_finished():  # finished: an earlier attempt succeeded
                    return
                for name, value in (attributes or {}).items():
                    trial.set_user_attr(name, value)
                for name, value in (constraints or {}).items():
                    trial.set_constraint(name, value)
                self.study.tell(trial, values, state=state)

        self.patiently(write)
        return told

    def patiently(self, write: Callable[[], None]) -> None:
        """Run a write; a study shared with other machines may retry."""
        write()

    # --- workers --------------------------------------------------------------------------------------------------

    @property
    def worker(self) -> str:
        """This worker's name. Raises `StudyError` outside `working`."""
        if self._worker is None:
            raise StudyError("this process is not a worker of the study")
        return self._worker

    @contextmanager
    def working(self) -> Iterator[None]:
        """Context for a worker of this study: storage errors end the search as a `StudyError`."""
        self._worker = worker_name()
        try:
            with self.errors(), self.leased():
                yield
        finally:
            self._worker = None

    def leased(self) -> AbstractContextManager[None]:
        """Send heartbeats as long as the process lives."""
        return nullcontext()

    def alive(self, trial: optuna.Trial) -> AbstractContextManager[None]:
        """Send heartbeats while the trial is evaluated."""
        return nullcontext()

    # --- calibration ----------------------------------------------------------------------------------------------

    @property
    def calibration(self) -> Calibration | None:
        """The memory calibration learned by the study; None before any."""
        found = self.study.user_attrs.get(_CALIBRATION)
        return None if found is None else Calibration.from_dict(found)

    def keep_calibration(self, calibration: Calibration) -> None:
        """Store it for all workers."""
        self.study.set_user_attr(_CALIBRATION, calibration.to_dict())


def worker_name() -> str:
    """A name for this process: its machine, its process id, and a unique suffix."""
    return f"{machine()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
