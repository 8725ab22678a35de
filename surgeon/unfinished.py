"""A place for what is being written: beside its target, on the same disk, gone when the writing fails."""

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A fresh folder beside `path`; with the block it goes, and what is still in it.

    First goes what killed processes of this machine left there.
    """
    stem = f".{path.name}.partial-{socket.gethostname()}-"
    _remove_stale(path.parent, stem)
    folder = path.with_name(f"{stem}{os.getpid()}")
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path, stem: str) -> None:
    for left in parent.glob(f"{glob.escape(stem)}*"):
        pid = left.name.removeprefix(stem)
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
