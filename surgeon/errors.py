"""Every error surgeon raises on purpose. A message says where, what was got, what was expected, and a hint."""


class SurgeonError(Exception):
    """Root of all errors of this package. `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(SurgeonError, ValueError):
    """A layer option, or an argument, has a value that is not allowed."""


class GeometryError(SurgeonError, ValueError):
    """A tensor or a convolution has a shape that the operation cannot take."""


class UnsupportedLayerError(SurgeonError, TypeError):
    """A module cannot become the wanted dynamic layer; `reasons` says why."""

    exit_code = 1

    def __init__(self, message: str, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.reasons = reasons


class ReadOnlyError(SurgeonError, RuntimeError):
    """Somebody writes to what a dynamic layer only computes, as its static weight."""


class SelectionError(SurgeonError, LookupError):
    """A layer selection cannot be read, or matches nothing."""


class NothingReplacedError(SurgeonError):
    """A selection matched convolutions, but every one was refused; `already`: some because they are dynamic layers as it is."""

    exit_code = 1

    def __init__(self, message: str, already: bool = False) -> None:
        super().__init__(message)
        self.already = already


class NothingFoldedError(SurgeonError):
    """No dynamic layer could be folded back into a convolution; `report` says why, layer by layer."""

    exit_code = 1

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class ModelError(SurgeonError, LookupError):
    """A model name, a factory or its weights cannot be found or do not fit."""


class InputError(SurgeonError, ValueError):
    """Example inputs do not fit the model."""


class DataError(SurgeonError, ValueError):
    """A data set is missing, empty, or has files that cannot be used."""


class TrainingError(SurgeonError, RuntimeError):
    """A training run cannot go on, or cannot be taken up again."""

    exit_code = 1


class RecipeError(SurgeonError, ValueError):
    """A recipe cannot be read, or does not fit the model."""


class CheckpointError(SurgeonError, OSError):
    """A surgeon folder cannot be read or written."""


class VerificationError(SurgeonError, ArithmeticError):
    """A converted model does not compute what the original computed."""

    exit_code = 1


class ExportError(SurgeonError, RuntimeError):
    """A model cannot be exported, or the exported file does not compute what the model computes."""

    exit_code = 1


class BackendError(SurgeonError, RuntimeError):
    """No backend, or not the one asked for, can run an operator on these inputs."""
