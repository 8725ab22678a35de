"""A study's file: Optuna's journal, with locks that die with their holder.

Optuna's own lock is a file that a killed process leaves behind (others wait half a minute for it), and its journal becomes
unreadable once a line was torn by a kill and another written after it. Here locks are the kernel's (POSIX record locks: released
when the process ends for any reason, and not inherited by data-loading children), and a torn last line is cut off before the
next one is written. Everything written inside `exclusive` appears at once.
"""

import contextlib
import errno
import json
import os
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from surgeon.errors import SurgeonError
from surgeon.util.files import inside

_HELD: dict[
    str, tuple[int, int]
] = {}  # path → (file descriptor, depth): record locks belong to the process, not to the object
_THREADS: dict[str, threading.RLock] = {}
_GUARD = threading.Lock()


class StudyError(SurgeonError, OSError):
    """A study cannot be opened, or is not the expected one."""


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold the lock of this file, also against other threads of this process; reentrant."""
    key = str(path.absolute())
    with _GUARD:
        own = _THREADS.setdefault(key, threading.RLock())
    with own:
        if key not in _HELD:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            _lock(descriptor, wait=True)
            _HELD[key] = (descriptor, 0)
        descriptor, depth = _HELD[key]
        _HELD[key] = (descriptor, depth + 1)
        try:
            yield
        finally:
            _HELD[key] = (descriptor, depth)
            if depth == 0:
                del _HELD[key]
                os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    try:
        import fcntl
    except ImportError as error:
        raise StudyError("a local study needs a POSIX system (file locks); use --storage with a database") from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        return False
    return True


class Lease:
    """A worker's lease: a locked file in the study's folder, for as long as the process lives."""

    def __init__(self, folder: Path, worker: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.worker = worker
        self.path = folder / f"{worker}.lease"
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(self._descriptor, wait=False):
            raise StudyError(f"a worker named {worker!r} is already running")
        _HELD[str(self.path.absolute())] = (self._descriptor, 1)

    def release(self) -> None:
        """Release the lease; the file is removed."""
        if self._descriptor is not None:
            _HELD.pop(str(self.path.absolute()), None)
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_alive(folder: Path, worker: str) -> bool:
    """Whether this worker's process still runs. Raises `StudyError` for an invalid worker name."""
    path = inside(folder, f"{worker}.lease", StudyError)
    if str(path.absolute()) in _HELD:
        return True  # it is this process; opening the file here would drop its lock
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, wait=False)
    finally:
        os.close(descriptor)


class StudyJournal(JournalFileBackend):
    """Optuna's journal file, with `exclusive`: nobody else writes meanwhile, and all writes in it appear at once.

    That holds after an error, too: Optuna already has the records in memory, so the file must contain them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[dict[str, Any]] | None = None
        self._written = 0  # log lines in the file at the start of the transaction
        if path.is_file():
            _check_journal(path)
        super().__init__(str(path))

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name(self.path.name + ".lock")

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Collect the writes until the end, then write them at once; after an error nothing is written."""
        with file_lock(self._lock_path):
            if self._pending is not None:
                yield
                return
            self._mend()
            self._written = self._count()
            self._pending = []
            try:
                yield
            finally:
                logs, self._pending = self._pending, None
                self._flush(logs, self._written)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write these records, or hold them until the end of the transaction."""
        if self._pending is not None and str(self._lock_path.absolute()) in _HELD:
            self._pending += json.loads(json.dumps(logs))
            return
        with file_lock(self._lock_path):
            self._mend()
            self._flush(logs)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """All records starting at this number, including those of a transaction in progress."""
        yield from super().read_logs(log_number_from)
        if self._pending is not None:
            yield from list(self._pending)[max(log_number_from - self._written, 0) :]

    def _count(self) -> int:
        """Number of records in the file, counted from the last one with a known position."""
        last = max(self._log_number_offset)
        return last + sum(1 for _ in super().read_logs(last))

    def _flush(self, logs: list[dict[str, Any]], number: int | None = None) -> None:
        """Append the records; `number` is that of the first, if known."""
        if not logs:
            return
        lines = [(json.dumps(log, separators=(",", ":")) + "\n").encode() for log in logs]
        place = self.path.stat().st_size
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(b"".join(lines))
                os.fsync(file.fileno())
                if file.tell() != place + sum(map(len, lines)):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.truncate(self.path, place)
            raise StudyError(f"cannot write the study {self.path}: {error.strerror or error}") from error
        if number is not None:
            for i, line in enumerate(lines, start=1):
                place += len(line)
                self._log_number_offset[number + i] = place  # otherwise Optuna would read the file from its beginning

    def _mend(self) -> None:
        """Cut off a last line left incomplete by a killed process."""
        with self.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return
            file.seek(size - 1)
            if file.read(1) == b"\n":
                return
            end = size
            while end > 0:
                start = max(end - 65536, 0)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    file.truncate(start + newline + 1)
                    return
                end = start
            file.truncate(0)


def _check_journal(path: Path) -> None:
    """Raise `StudyError` if the file is something else, before anything is appended to it."""
    with path.open("rb") as file:
        first = file.readline(1_000_000)
    if not first or not first.endswith(b"\n"):
        return
    try:
        known = "op_code" in json.loads(first)
    except (ValueError, TypeError):
        known = False
    if not known:
        raise StudyError(f"cannot read the study {path}: it is not an Optuna journal")


def forget_dead(folder: Path) -> None:
    """Remove the files of dead workers."""
    for path in folder.glob("*.lease"):
        if not path.is_symlink() and not is_alive(folder, path.stem):
            with contextlib.suppress(OSError):
                path.unlink()
