"""Waiting messages on stderr: continuous on a terminal, occasional lines in a pipe. Nothing heavy is imported."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_PATIENCE = 2.0  # seconds before the first message
_PIPE = 10.0  # seconds before the second line in a pipe
_LATEST = 60.0
_CLEAR = "\r\x1b[2K"


@contextmanager
def waiting(
    what: str | Callable[[], str], *, quiet: bool = False, after: float = _PATIENCE, file: TextIO | None = None
) -> Iterator[None]:
    """Show what is being waited for and for how long, once it takes more than `after` seconds.

    On a terminal, one line counts the seconds and disappears at the end; elsewhere, lines are printed at growing intervals.
    """
    stream = file or sys.stderr
    terminal = stream.isatty()
    if quiet:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_tell, args=(what, stream, terminal, after, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def longer(pause: float) -> float:
    """Seconds from one line in a pipe to the next, after those before it: ten, then doubled, up to a minute."""
    return min(max(2 * pause, _PIPE), _LATEST)


def _tell(what: str | Callable[[], str], stream: TextIO, terminal: bool, after: float, done: threading.Event) -> None:
    began, pause, told = time.monotonic(), after, False
    while not done.wait(pause):
        seconds = f"{time.monotonic() - began:.0f} s"
        try:
            shown = what if isinstance(what, str) else what()
            stream.write(f"{_CLEAR if terminal else ''}surgeon: {shown} ... {seconds}{'' if terminal else chr(10)}")
            stream.flush()
        except (OSError, ValueError):  # nobody is listening anymore
            return
        told, pause = True, 1.0 if terminal else longer(pause)
    if told and terminal:
        stream.write(_CLEAR)
        stream.flush()
