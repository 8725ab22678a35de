"""The name of an option where its error is read: a flag in a terminal, an argument in Python."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_FLAGS: ContextVar[frozenset[str] | None] = ContextVar("flags", default=None)  # of the command; None: in Python


@contextmanager
def in_terminal(flags: frozenset[str] = frozenset()) -> Iterator[None]:
    """Errors made in this context name flags; `flags` are those of the command."""
    before = _FLAGS.set(flags)
    try:
        yield
    finally:
        _FLAGS.reset(before)


def called(flag: str, argument: str) -> str:
    """The flag for a reader at a terminal, otherwise the argument that does the same in Python."""
    return argument if _FLAGS.get() is None else flag


def offered(flag: str) -> bool:
    """Whether a reader at a terminal can give this flag to the command; always in Python, where all arguments are there."""
    flags = _FLAGS.get()
    return flags is None or flag in flags
