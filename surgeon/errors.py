"""Every error surgeon raises on purpose. A message states where, what it got, what it expected, and a hint."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class SurgeonError(Exception):
    """Root of all errors of this package. `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(SurgeonError, ValueError):
    """A layer option or an argument has an invalid value."""


class GeometryError(SurgeonError, ValueError):
    """A tensor or a convolution has a shape that the operation does not support."""


class UnsupportedLayerError(SurgeonError, TypeError):
    """A module cannot become the requested dynamic layer; `reasons` lists why."""

    exit_code = 1

    def __init__(self, message: str, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.reasons = reasons


class ReadOnlyError(SurgeonError, RuntimeError):
    """A write to a value that a dynamic layer only computes, such as its static weight."""


class SelectionError(SurgeonError, LookupError):
    """A layer selection cannot be parsed, or matches nothing."""


class NothingReplacedError(SurgeonError):
    """A selection matched convolutions, but every one was refused; `already`: some because they are already dynamic layers."""

    exit_code = 1

    def __init__(self, message: str, already: bool = False) -> None:
        super().__init__(message)
        self.already = already


class NothingFoldedError(SurgeonError):
    """No dynamic layer could be folded back into a convolution; `report` explains why, layer by layer."""

    exit_code = 1

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class ModelError(SurgeonError, LookupError):
    """A model name, a factory or its weights cannot be found or do not fit."""


class InputError(SurgeonError, ValueError):
    """Example inputs do not fit the model."""


class DataError(SurgeonError, ValueError):
    """A data set is missing, empty, or contains unusable files."""


class TrainingError(SurgeonError, RuntimeError):
    """A training run cannot continue or cannot be resumed."""

    exit_code = 1


class RecipeError(SurgeonError, ValueError):
    """A recipe cannot be read, or does not fit the model."""


class CheckpointError(SurgeonError, OSError):
    """A surgeon folder cannot be read or written."""


class HubError(CheckpointError):
    """No surgeon folder was found on the Hub under a name, or the Hub cannot be reached."""


class VerificationError(SurgeonError, ArithmeticError):
    """A converted model is not equivalent to the original."""

    exit_code = 1


class ExportError(SurgeonError, RuntimeError):
    """A model cannot be exported, or the exported file is not equivalent to the model."""

    exit_code = 1


class BackendError(SurgeonError, RuntimeError):
    """No backend, or not the requested one, can run an operator on these inputs."""


# --- names of options in messages ------------------------------------------------------------------------------------

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
