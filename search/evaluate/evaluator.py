"""Interface for the value of a placement, shared by real fine-tuning runs and tabulated spaces."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgeon.errors import ConfigError
from surgeon.search.placement.problem import Ints
from surgeon.search.space import Space
from surgeon.util.files import read_json

Report = Callable[[int, float], None]  # (step, value so far); may raise to end the evaluation


class OutOfMemoryError(MemoryError):
    """A training did not fit on the device; `memory` is the device's memory in bytes (None: unknown)."""

    def __init__(self, memory: int | None = None) -> None:
        super().__init__("out of memory")
        self.memory = memory


class StoppedError(Exception):
    """The evaluation was asked to stop (Ctrl-C, SIGTERM): its trial stays open."""


class Evaluator(ABC):
    """Computes the values of placements.

    `directions` has "maximize" or "minimize" for every value. The same placement and rung must have the same value on every
    machine, as far as training allows: seeds are fixed or derived from the placement, never from the process.
    """

    directions: tuple[str, ...] = ("maximize",)

    @property
    def start(self) -> float | None:
        """The first value of the unmodified network before any training; None if there is none or it is not known yet."""
        return None

    @property
    def loss(self) -> float | None:
        """The loss of the last evaluation, which decides between equal values; None if it measures none."""
        return None

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """JSON values that identify this evaluator: task, data, training settings. A study is bound to them."""

    @abstractmethod
    def evaluate(self, placement: Ints, report: Report, rung: int) -> float | Sequence[float]:
        """The value, or values, of a placement (L,).

        Args:
            report: call it with each new value in the first direction; it raises to end the evaluation (let it propagate).
            rung: training effort: 0 for a short fine-tuning run, higher for longer ones.

        Raises:
            OutOfMemoryError: the training did not fit.
            StoppedError: the evaluation was asked to stop.
        """


class TableEvaluator(Evaluator):
    """Values from a table of an exhaustively measured space or of a formula."""

    def __init__(
        self,
        space: Space,
        values: Mapping[str, Sequence[float]] | Callable[[Ints], Sequence[float]],
        *,
        name: str = "table",
        direction: str = "maximize",
    ) -> None:
        """`values`: maps a placement hash, or a placement, to its learning curve; the last value is the result."""
        self.space, self.values, self.name = space, values, name
        self.directions = (direction,)

    def identity(self) -> Mapping[str, Any]:
        return {"evaluator": "table", "name": self.name, "directions": list(self.directions)}

    def evaluate(self, placement: Ints, report: Report, rung: int) -> float:
        if callable(self.values):
            curve = self.values(placement)
        else:
            key = self.space.hash_of(placement)
            if key not in self.values:
                raise ConfigError(
                    f"the table {self.name} has no value for {self.space.names(placement) or 'the original'}"
                )
            curve = self.values[key]
        for step, value in enumerate(curve[:-1]):
            report(step, value)
        return float(curve[-1])

    @classmethod
    def read(cls, path: str | Path, space: Space) -> "TableEvaluator":
        """From JSON: {"direction", "rows": [{"placement": {layer: option}, "curve": [values]}]}; raises `ConfigError`."""
        try:
            content = read_json(path, ConfigError)
            rows = {
                space.hash_of(space.placement(row["placement"])): [float(v) for v in row["curve"]]
                for row in content["rows"]
            }
            return cls(space, rows, name=str(Path(path).name), direction=str(content.get("direction", "maximize")))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"cannot read the table of values {path}: {error!r}") from error
