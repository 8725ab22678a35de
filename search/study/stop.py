"""Stop conditions of a worker: Ctrl-C or SIGTERM, or the end of its time."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


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
    """The first Ctrl-C or SIGTERM asks the search to stop, the second stops it at once. Only the main thread can catch it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        if stop.interrupted:
            raise KeyboardInterrupt
        stop.interrupted = True

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
