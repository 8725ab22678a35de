"""A study in a database, for workers on many machines: any SQLAlchemy URL accepted by Optuna's `RDBStorage`.

The journal's lock and leases of a local study are replaced by the database:

    exclusive   a row that is locked while a worker proposes (SQLite: a lock file next to the database); the server releases it
                when the worker's connection ends, for any reason
    leases      Optuna's heartbeats, by the database's clock: a trial whose worker was silent for the grace period is resumed
                under its own number

Writes are not atomic: half-written state of a dead worker is detected under the lock, and resumed or restarted.
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
from optuna.trial import FrozenTrial
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError

from surgeon.search.study.database_url import DRIVERS, parse_url, shown
from surgeon.search.study.journal import StudyError, file_lock
from surgeon.search.study.study import Study
from surgeon.util.machine import has_ended, machine

logger = logging.getLogger(__name__)

HEARTBEAT = 15  # seconds between heartbeats
GRACE = 90  # seconds of silence after which a worker counts as dead
_PATIENCE = 300.0  # seconds to wait for a lost database before giving up on a result
_CONNECT = 10  # seconds for the first connection
_LOCKS = sql.Table("surgeon_locks", sql.MetaData(), sql.Column("name", sql.String(255), primary_key=True))


class StudyDatabase(Study):
    """A named study in a database; every worker has its own object and connections.

    `notes` are JSON values for workers that join: the search settings, and the gain table. Paths are not part of the identity.
    """

    shared = True

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
        self._storage: RDBStorage | None = None
        self._lock = threading.RLock()
        self._depth = 0

    @property
    def flag(self) -> str:
        return f"--join {self.name}"

    def __str__(self) -> str:
        return f"{self.name!r} in {shown(self.url)}"

    @property
    def address(self) -> dict[str, str]:
        """Location of the study, without a password."""
        url = self.url
        bare = URL.create(url.drivername, url.username, None, url.host, url.port, url.database, url.query)
        return {"url": bare.render_as_string(), "name": self.name}

    @property
    def on_disk(self) -> Path | None:
        """The file of a SQLite database."""
        return Path(self.url.database or "") if self.url.get_backend_name() == "sqlite" else None

    # --- opening --------------------------------------------------------------------------------------------------

    def storage(self) -> RDBStorage:
        """Raises `StudyError` if the database cannot be reached."""
        if self._storage is None:
            with self.errors(), warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                # the study's tables before Optuna's own: creating those requires the lock
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
            arguments = {"timeout": 60}  # for a writer waiting for another
        elif backend in DRIVERS and "connect_timeout" not in self.url.query:
            arguments = {"connect_timeout": _CONNECT}
        return {"pool_pre_ping": True, "connect_args": arguments}

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn database errors into a `StudyError`."""
        try:
            yield
        except StudyError:
            raise
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            cause = error if isinstance(error, SQLAlchemyError) else error.__cause__ or error
            reason = " ".join(str(getattr(cause, "orig", None) or cause).split())
            what = "cannot reach the database" if _is_connection(error) else "database error at"
            kept = "" if self._worker is None else f"; finished trials are kept, resume with --join {self.name}"
            raise StudyError(f"{what} {shown(self.url)}: {reason}{kept}") from error

    def open(
        self,
        identity: Mapping[str, Any],
        directions: Sequence[Any],
        sampler: BaseSampler,
        pruner: BasePruner | None,
        *,
        resume: bool,
    ) -> None:
        super().open(without_places(identity), directions, sampler, pruner, resume=resume)

    # --- one at a time --------------------------------------------------------------------------------------------

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._lock:
            if self._depth:
                yield
                return
            self.storage()
            with self.errors(), self._locked():
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
        """Create the row that is locked. Two workers may create it at the same time."""
        if self.on_disk is not None:
            return
        # another worker created the table meanwhile
        with contextlib.suppress(IntegrityError, sql.exc.ProgrammingError):
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
            # "Heartbeat of storage is supposed to be used with Study.optimize": here `alive` sends the heartbeats
            warnings.filterwarnings("ignore", message="Heartbeat of storage", category=UserWarning)
            return super().ask()

    def claim(self, trial: optuna.Trial, attempts: int = 1) -> None:
        self._beat(trial._trial_id)  # before the name: a trial with a worker's name has had a heartbeat
        super().claim(trial, attempts)

    def _beat(self, trial_id: int) -> None:
        self.storage().record_heartbeat(trial_id)

    def dead(self, trials: Sequence[FrozenTrial]) -> set[int]:
        stale = set(self.storage()._get_stale_trial_ids(self.study._study_id)) if trials else set()
        return {one.number for one in trials if one._trial_id in stale or _is_gone(one.user_attrs.get("worker"))}

    @contextmanager
    def alive(self, trial: optuna.Trial) -> Iterator[None]:
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self.heartbeat):
                try:
                    self._beat(trial._trial_id)
                except Exception as error:  # the next one may get through; the result has its own retries
                    logger.debug("heartbeat failed: %s", error)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5)  # an unresponsive server must not hold up the result

    def patiently(self, write: Callable[[], None]) -> None:
        """Write a result, retrying for some minutes if the database is lost."""
        deadline, pause = time.monotonic() + _PATIENCE, 1.0
        while True:
            try:
                with self.errors():
                    write()
                return
            except StudyError as error:
                if not _is_connection(error.__cause__) or time.monotonic() + pause > deadline:
                    raise
                logger.warning("%s; trying again in %.0f s", error, pause)
                time.sleep(pause)
                pause = min(2 * pause, 30.0)


def without_places(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity without absolute paths among the task's options: data paths differ between machines."""
    found = dict(identity)
    evaluator = found.get("evaluator")
    if isinstance(evaluator, dict) and isinstance(evaluator.get("options"), dict):
        options = evaluator["options"].items()
        kept = {name: v for name, v in options if not (isinstance(v, str) and Path(v).is_absolute())}
        found["evaluator"] = evaluator | {"options": kept}
    return found


def _is_gone(worker: str | None) -> bool:
    """Whether the trial certainly has no worker: it has no name yet, or that of an ended process of this machine."""
    if worker is None:
        return True
    here = f"{machine()}-"
    if not worker.startswith(here):
        return False  # on another machine, boot or container: its heartbeats decide
    number = worker.removeprefix(here).partition("-")[0]
    return number.isdigit() and has_ended(int(number))


def _is_connection(error: BaseException | None) -> bool:
    """Whether the database could not be reached, or the connection was lost."""
    while error is not None:
        if isinstance(error, OperationalError) or bool(getattr(error, "connection_invalidated", False)):
            return True
        error = error.__cause__
    return False
