"""What a search asks: the value of a placement. Real fine-tunes and tabulated spaces answer through the same interface."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgeon.errors import ConfigError
from surgeon.search.placement.problem import Ints
from surgeon.search.space import Space
from surgeon.util.files import read_json

Report = Callable[[int, float], None]  # (step, value so far): may raise, to end the evaluation


class OutOfMemoryError(MemoryError):
    """A training did not fit into the device; `memory` is what the device has, in bytes (None: not known)."""

    def __init__(self, memory: int | None = None) -> None:
        super().__init__("out of memory")
        self.memory = memory


class StoppedError(Exception):
    """The evaluation was asked to stop (Ctrl-C, SIGTERM) and left: its trial stays open."""


class Evaluator(ABC):
    """Gives placements their values.

    `directions` has "maximize" or "minimize" for every value. The same placement and rung must get the same value on every
    machine, as far as training allows: seeds come from the placement or are fixed, never from the process.
    """

    directions: tuple[str, ...] = ("maximize",)

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """JSON values that tell this evaluator from others: task, data, training settings. A study is bound to them."""

    @abstractmethod
    def evaluate(self, placement: Ints, report: Report, rung: int) -> float | Sequence[float]:
        """The value, or values, of a placement (L,).

        Args:
            report: to be called as values come, in the first direction; it raises where the evaluation is to end (let it pass).
            rung: how much is spent: 0 for a short fine-tune, higher for more.

        Raises:
            OutOfMemoryError: the training did not fit.
            StoppedError: the evaluation was asked to stop.
        """


class TableEvaluator(Evaluator):
    """Values from a table: of an exhaustively measured space, or of a formula."""

    def __init__(
        self,
        space: Space,
        values: Mapping[str, Sequence[float]] | Callable[[Ints], Sequence[float]],
        *,
        name: str = "table",
        direction: str = "maximize",
    ) -> None:
        """`values`: placement hash, or placement, to its learning curve; the last value is the result."""
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
