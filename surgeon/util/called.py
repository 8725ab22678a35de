"""What an option is called where its error is read: a flag in a terminal, an argument in Python."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_IN_TERMINAL: ContextVar[bool] = ContextVar("in_terminal", default=False)


@contextmanager
def in_terminal() -> Iterator[None]:
    """Errors made in this context name flags."""
    before = _IN_TERMINAL.set(True)
    try:
        yield
    finally:
        _IN_TERMINAL.reset(before)


def called(flag: str, argument: str) -> str:
    """The flag for a reader at a terminal, otherwise the argument that does the same in Python."""
    return flag if _IN_TERMINAL.get() else argument
