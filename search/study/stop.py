"""Stop conditions of a worker: Ctrl-C or SIGTERM, or the end of its time."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from surgeon.util.interrupt import caught


@dataclass
class Stop:
    """Stop conditions: Ctrl-C or SIGTERM, or the end of the time."""

    deadline: float | None
    interrupted: bool = False

    @property
    def reason(self) -> str | None:
        if self.interrupted:
            return "interrupted"
        return "time" if self.deadline is not None and time.monotonic() >= self.deadline else None


@contextmanager
def on_interrupt(stop: Stop) -> Iterator[None]:
    """The first Ctrl-C, or SIGTERM, asks the search to stop, the second stops it at once. Only the main thread can catch it."""

    def handle(number: int, before: Any) -> None:
        if stop.interrupted:
            raise KeyboardInterrupt
        stop.interrupted = True

    with caught((signal.SIGINT, signal.SIGTERM), handle):
        yield
