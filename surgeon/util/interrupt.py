"""Temporary signal handlers."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any


@contextmanager
def caught(numbers: Iterable[int], handle: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `handle(number, before)` for each of these signals, `before` being its earlier handler, which is restored at the end.

    Only the main thread can catch signals; in another one nothing is caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        signal.signal(number, partial(_call, handle, handler))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _call(handle: Callable[[int, Any], None], before: Any, number: int, frame: Any) -> None:
    handle(number, before)
