"""A study in a database, for workers on many machines: any SQLAlchemy URL that Optuna's `RDBStorage` takes.

What a local study gets from its journal's lock and its leases comes from the database here:

    exclusive   a row that is locked while a worker proposes (SQLite: a lock file beside the database); the server gives it back
                when the worker's connection ends, however it ends
    leases      Optuna's heartbeats, by the database's clock: a trial whose worker was silent for the grace period is taken up
                again, under its own number

Nothing is written as one piece: what a worker left half-written is seen under the lock, and taken up or begun anew.
"""

import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sql
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from surgeon.machine import has_ended, machine
from surgeon.search.database_url import DRIVERS, parse_url, shown
from surgeon.search.journal import StudyError, file_lock
from surgeon.search.study import Record, Study, checked, record, worker_name

logger = logging.getLogger(__name__)

HEARTBEAT = 15  # seconds between two signs of life
GRACE = 90  # seconds of silence after which a worker counts as gone
_PATIENCE = 300.0  # seconds for which a result waits for a database that went away
_CONNECT = 10  # seconds for a first connection
_NOTES = "surgeon:notes"
_LOCKS = sql.Table("surgeon_locks", sql.MetaData(), sql.Column("name", sql.String(255), primary_key=True))


class StudyDatabase(Study):
    """A named study in a database; every worker has its own object and connections.

    `notes` are JSON values for those who join: what is searched, and the gain table. An identity does not bind the study to paths.
    """

    def __init__(
        self,
        url: str | URL,
        name: str,
        *,
        notes: Mapping[str, Any] | None = None,
        heartbeat: int = HEARTBEAT,
        grace: int = GRACE,
    ) -> None:
        self.url = parse_url(url) if isinstance(url, str) else url
        self.name = name
        self.notes: Mapping[str, Any] = notes or {}
        self.heartbeat, self.grace = heartbeat, grace
        self._worker: str | None = None
        self._storage: RDBStorage | None = None
        self._lock = threading.RLock()
        self._depth = 0

    def __str__(self) -> str:
        return f"{self.name!r} in {shown(self.url)}"

    @property
    def address(self) -> dict[str, str]:
        """Where the study is, without a password."""
        url = self.url
        bare = URL.create(url.drivername, url.username, None, url.host, url.port, url.database, url.query)
        return {"url": bare.render_as_string(), "name": self.name}

    @property
    def on_disk(self) -> Path | None:
        """The file of a SQLite database."""
        return Path(self.url.database or "") if self.url.get_backend_name() == "sqlite" else None

    # --- opening --------------------------------------------------------------------------------------------------

    def connect(self) -> RDBStorage:
        """Raises `StudyError` where the database cannot be reached."""
        if self._storage is None:
            with self._errors(), warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                # the study's tables before Optuna's own: a lock is needed while these are made
                self._engine = sql.create_engine(self.url, **self._engine_options())
                with self._engine.connect():
                    pass
                self._make_lock()
                with self._locked():
                    self._storage = RDBStorage(
                        self.url.render_as_string(hide_password=False),
                        engine_kwargs=self._engine_options(),
                        heartbeat_interval=self.heartbeat,
                        grace_period=self.grace,
                    )
        assert self._storage is not None
        return self._storage

    def close(self) -> None:
        if self._storage is not None:
            self._storage.remove_session()
            self._storage.engine.dispose()
            self._engine.dispose()

    def _engine_options(self) -> dict[str, Any]:
        backend = self.url.get_backend_name()
        arguments: dict[str, Any] = {}
        if backend == "sqlite":
            arguments = {"timeout": 60}  # of a writer that waits for another
        elif backend in DRIVERS and "connect_timeout" not in self.url.query:
            arguments = {"connect_timeout": _CONNECT}
        return {"pool_pre_ping": True, "connect_args": arguments}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What the database says as a `StudyError`."""
        try:
            yield
        except StudyError:
            raise
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            cause = error if isinstance(error, SQLAlchemyError) else error.__cause__ or error
            reason = " ".join(str(getattr(cause, "orig", None) or cause).split())
            what = "cannot reach the database" if _is_connection(error) else "no success with the database"
            kept = "" if self._worker is None else f"; what is finished is kept, go on with --join {self.name}"
            raise StudyError(f"{what} {shown(self.url)}: {reason}{kept}") from error

    def exists(self) -> bool:
        """Whether the study is there, with all that it begins with."""
        storage = self.connect()
        with self._errors():
            found = next((one for one in storage.get_all_studies() if one.study_name == self.name), None)
            return found is not None and self.is_ours(found.user_attrs)

    def names(self) -> list[str]:
        """Of all studies in the database."""
        storage = self.connect()
        with self._errors():
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
        storage, identity = self.connect(), without_places(identity)
        rest: dict[str, Any] = {"sampler": sampler, "pruner": pruner or optuna.pruners.NopPruner()}
        with self._errors(), self.exclusive():
            exists = self.exists()
            if resume and not exists:
                raise StudyError(self._not_there())
            if not resume and exists:
                raise StudyError(
                    f"the study {self} exists already; go on with it (--join {self.name}), or name another"
                )
            if exists:
                self.study = optuna.load_study(storage=storage, study_name=self.name, **rest)
                self.check_identity(identity)
                return
            if self.name in self.names():
                self._clear(storage)
            self.study = optuna.create_study(storage=storage, study_name=self.name, directions=list(directions), **rest)
            self.study.set_user_attr(_NOTES, dict(self.notes))
            self.begin(identity)  # last: a study that has an identity is whole

    def _not_there(self) -> str:
        known = ", ".join(self.names()[:10]) or "none"
        return f"there is no study {self}; leave out --join to begin one. Studies there: {known}"

    def _clear(self, storage: RDBStorage) -> None:
        """Remove what a worker left that was killed while it began this study."""
        found = optuna.load_study(storage=storage, study_name=self.name)
        # the notes are written first, and no trial before the identity
        if found.get_trials(deepcopy=False) or set(found.user_attrs) - {_NOTES}:
            raise StudyError(f"{self} is an Optuna study, but not one that surgeon began")
        optuna.delete_study(storage=storage, study_name=self.name)

    def view(self) -> list[Record]:
        if not self.exists():
            raise StudyError(self._not_there())
        with self._errors():
            self.study = optuna.load_study(storage=self.connect(), study_name=self.name)
            return [record(checked(trial, str(self))) for trial in self.trials()]

    def read_notes(self) -> Mapping[str, Any]:
        """What the worker that began the study noted. Raises `StudyError` where there is no study."""
        self.view()
        self.notes = self.study.user_attrs.get(_NOTES, {})
        return self.notes

    # --- one at a time --------------------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._lock:
            if self._depth:
                yield
                return
            self.connect()
            with self._errors(), self._locked():
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The database's lock for this study's name."""
        if self.on_disk is not None:
            with file_lock(Path(f"{self.on_disk}.lock")):
                yield
            return
        row = sql.select(_LOCKS.c.name).where(_LOCKS.c.name == self.name)
        with ExitStack() as stack:
            connection = stack.enter_context(self._engine.connect())
            stack.enter_context(connection.begin())
            connection.execute(row.with_for_update())
            yield

    def _make_lock(self) -> None:
        """The row that is locked. Two workers may make it at once."""
        if self.on_disk is not None:
            return
        with contextlib.suppress(IntegrityError, sql.exc.ProgrammingError):  # another worker made the table meanwhile
            _LOCKS.create(self._engine, checkfirst=True)
        with self._engine.connect() as connection:
            known = connection.execute(sql.select(_LOCKS.c.name).where(_LOCKS.c.name == self.name)).first()
            if known is None:
                with contextlib.suppress(IntegrityError):
                    connection.execute(sql.insert(_LOCKS).values(name=self.name))
                    connection.commit()

    # --- trials and workers ---------------------------------------------------------------------------------------

    def ask(self) -> optuna.Trial:
        with warnings.catch_warnings():
            # "Heartbeat of storage is supposed to be used with Study.optimize": here `alive` gives the signs of life
            warnings.filterwarnings("ignore", message="Heartbeat of storage", category=UserWarning)
            return super().ask()

    def claim(self, trial: optuna.Trial, attempts: int = 1) -> None:
        self._beat(trial._trial_id)  # before the name: a trial with a worker's name has had a sign of life
        super().claim(trial, attempts)

    def _beat(self, trial_id: int) -> None:
        self.connect().record_heartbeat(trial_id)

    def orphans(self) -> list[FrozenTrial]:
        """To be called within `exclusive`: a running trial without a worker's name was left there half-written."""
        stale = set(self.connect()._get_stale_trial_ids(self.study._study_id))
        running = [trial for trial in self.trials() if trial.state == TrialState.RUNNING]
        return [trial for trial in running if trial._trial_id in stale or _is_gone(trial.user_attrs.get("worker"))]

    @property
    def worker(self) -> str:
        if self._worker is None:
            raise StudyError("this process is not a worker of the study")
        return self._worker

    @contextmanager
    def working(self) -> Iterator[None]:
        """Be a worker: what the database says meanwhile ends the search as a `StudyError`."""
        self._worker = worker_name()
        try:
            with self._errors():
                yield
        finally:
            self._worker = None

    @contextmanager
    def alive(self, trial: optuna.Trial) -> Iterator[None]:
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self.heartbeat):
                try:
                    self._beat(trial._trial_id)
                except Exception as error:  # the next one may get through; the result waits by itself
                    logger.debug("no sign of life: %s", error)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5)  # a server that does not answer must not hold the result

    def patiently(self, write: Callable[[], None]) -> None:
        """Write a result; a database that went away gets some minutes to come back."""
        deadline, pause = time.monotonic() + _PATIENCE, 1.0
        while True:
            try:
                with self._errors():
                    write()
                return
            except StudyError as error:
                if not _is_connection(error.__cause__) or time.monotonic() + pause > deadline:
                    raise
                logger.warning("%s; trying again in %.0f s", error, pause)
                time.sleep(pause)
                pause = min(2 * pause, 30.0)

    def running(self) -> frozenset[str]:
        """Names of the workers that gave a sign of life within the grace period."""
        stale = set(self.connect()._get_stale_trial_ids(self.study._study_id))
        trials = [one for one in self.trials() if one.state == TrialState.RUNNING and one._trial_id not in stale]
        names = [one.user_attrs.get("worker") for one in trials]
        return frozenset(str(name) for name in names if not _is_gone(name))


def without_places(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity without absolute paths among the task's options: every machine has its data somewhere else."""
    found = dict(identity)
    evaluator = found.get("evaluator")
    if isinstance(evaluator, dict) and isinstance(evaluator.get("options"), dict):
        options = evaluator["options"].items()
        kept = {name: v for name, v in options if not (isinstance(v, str) and Path(v).is_absolute())}
        found["evaluator"] = evaluator | {"options": kept}
    return found


def _is_gone(worker: str | None) -> bool:
    """Whether nobody runs the trial for sure: it has no name yet, or that of a process of this machine that ended."""
    if worker is None:
        return True
    here = f"{machine()}-"
    if not worker.startswith(here):
        return False  # of another machine, boot or container: its heartbeats tell
    number = worker.removeprefix(here).partition("-")[0]
    return number.isdigit() and has_ended(int(number))


def _is_connection(error: BaseException | None) -> bool:
    """Whether the database could not be reached, or went away."""
    while error is not None:
        if isinstance(error, OperationalError) or bool(getattr(error, "connection_invalidated", False)):
            return True
        error = error.__cause__
    return False
