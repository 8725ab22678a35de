"""Temporary folder for output in progress: next to its target, on the same disk, removed if writing fails."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from surgeon.util.machine import has_ended, machine

_OLD = 7 * 24 * 3600.0  # seconds after which another machine's leftovers are considered abandoned
_LONG = 150  # bytes of a name beyond which its hash replaces it
_NUMBERS = count()


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A new folder next to `path`, removed with its remaining content at the end of the block.

    Makes the folder that `path` is in, and removes it again if nothing came into it. Removes leftovers of killed processes first.
    """
    stem = f".{_short(path.name)}.partial-"
    _remove_stale(path.parent, stem)
    folder = path.with_name(f"{stem}{machine()}-{os.getpid()}-{next(_NUMBERS)}")
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier process with this number
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # not empty
            for parent in missing:
                parent.rmdir()


def _short(name: str) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONG else hashlib.sha256(encoded).hexdigest()[:16]


def _remove_stale(parent: Path, stem: str) -> None:
    """Remove what ended processes of this machine left for any target, and what others left for this one long ago."""
    here = f".partial-{machine()}-"
    for left in parent.glob(".*.partial-*"):
        _, ours, process = left.name.rpartition(here)
        number = process.partition("-")[0]
        with suppress(OSError):
            if ours:
                gone = number.isdigit() and has_ended(int(number))
            else:
                gone = left.name.startswith(stem) and time.time() - left.stat().st_mtime > _OLD
            if gone:
                shutil.rmtree(left, ignore_errors=True)
