"""The placement problem in numbers: the cost of every option of every layer, and the limits on their sums.

L layers, O options (0 is "keep"), K rows. A row is a resource that adds up: FLOPs, parameters, or the bytes alive in one window of
a training step. Memory is a maximum of sums (`surgeon.costs.table`), so its limit applies to each of its rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import ConfigError, SurgeonError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FREE = 2**62  # limit of an unlimited row
RESOURCES = ("flops", "params", "memory")


class InfeasibleError(SurgeonError):
    """No placement is within the budgets; the message has the nearest feasible numbers."""

    exit_code = 1


@dataclass(frozen=True, eq=False)
class Problem:
    """Rows with limits. `rows` (L, O, K) are differences from the unmodified layer, `base` (K,) the unmodified model's costs.

    A placement p (L,) is feasible if base + rows[l, p_l].sum(over l) <= limits, every p_l is allowed, and at most
    `max_layers` of them are not 0. All numbers are integers, so sums are exact.
    """

    allowed: Bools
    rows: Ints
    base: Ints
    limits: Ints
    names: tuple[str, ...]  # the resource of every row
    max_layers: int | None = None

    def __post_init__(self) -> None:
        layers, options = self.allowed.shape
        n_rows = len(self.names)
        if (
            self.rows.shape != (layers, options, n_rows)
            or self.base.shape != (n_rows,)
            or self.limits.shape != (n_rows,)
        ):
            raise ConfigError(
                f"a problem of {layers} layers, {options} options and {n_rows} rows does not match rows {self.rows.shape}, "
                f"base {self.base.shape} and limits {self.limits.shape}"
            )
        if not self.allowed[:, 0].all() or self.rows[:, 0].any():
            raise ConfigError("option 0 keeps a layer: it must be allowed everywhere and cost nothing")
        if self.max_layers is not None and self.max_layers < 0:
            raise ConfigError(f"the most layers to replace cannot be negative, got {self.max_layers}")

    @property
    def shape(self) -> tuple[int, int]:
        """(L, O)."""
        return self.allowed.shape[0], self.allowed.shape[1]

    def totals(self, placements: Any) -> Ints:
        """Costs (P, K) of placements (P, L)."""
        chosen = np.atleast_2d(np.asarray(placements))
        layers = np.arange(chosen.shape[1])
        result = np.repeat(self.base[None], len(chosen), axis=0)
        for layer in layers:
            result += self.rows[layer, chosen[:, layer]]
        return result

    def costs(self, placement: Any) -> dict[str, int]:
        """Costs of one placement by resource; for memory, of the highest window."""
        total = self.totals(placement)[0]
        return {name: int(total[self.of(name)].max()) for name in dict.fromkeys(self.names)}

    def of(self, name: str) -> NDArray[np.intp]:
        """The rows of a resource."""
        return np.flatnonzero([own == name for own in self.names])

    def feasible(self, placements: Any) -> Bools:
        """Which of the placements (P, L) are within all limits; (P,)."""
        chosen = np.atleast_2d(np.asarray(placements))
        within = (self.totals(chosen) <= self.limits).all(axis=1)
        may = self.allowed[np.arange(chosen.shape[1]), chosen].all(axis=1)
        most = self.shape[0] if self.max_layers is None else self.max_layers
        fits: Bools = within & may & ((chosen != 0).sum(axis=1) <= most)
        return fits

    def limited(self, limits: Mapping[str, int | None]) -> "Problem":
        """The same problem with other limits on the named resources; None removes a limit."""
        unknown = sorted(name for name, limit in limits.items() if limit is not None and name not in self.names)
        if unknown:
            raise ConfigError(f"there is no resource {unknown[0]!r}; there are {', '.join(dict.fromkeys(self.names))}")
        new = self.limits.copy()
        for name, limit in limits.items():
            new[self.of(name)] = FREE if limit is None else limit
        return replace(self, limits=new)

    def limit(self, name: str) -> int | None:
        """The limit of a resource, None if it has none."""
        found = int(self.limits[self.of(name)].min())
        return None if found == FREE else found

    def used(self, share: float) -> "Problem":
        """The problem with only a share (0 to 1) of the room between the unmodified model and the limits."""
        room = np.where(self.limits == FREE, 0, np.maximum(self.limits - self.base, 0))
        # a window's room is counted from the peak: half of the memory budget is halfway from the unmodified model's peak
        memory = self.of("memory")
        if len(memory):
            room[memory] = np.where(
                self.limits[memory] == FREE, 0, max(int((self.limits - self.base)[memory].min()), 0)
            )
        cut = np.floor(room * (1.0 - share)).astype(np.int64)
        return replace(self, limits=np.where(self.limits == FREE, FREE, self.limits - cut))

    def lean(self) -> "Problem":
        """The problem without rows that no placement can bring to their limits."""
        highest = self.base + np.where(self.allowed[..., None], self.rows, 0).max(axis=1).sum(axis=0)
        kept = np.flatnonzero(highest > self.limits)
        return replace(
            self,
            rows=np.ascontiguousarray(self.rows[:, :, kept]),
            base=self.base[kept],
            limits=self.limits[kept],
            names=tuple(self.names[i] for i in kept),
        )


def make_problem(
    allowed: Bools,
    resources: Mapping[str, Ints],
    base: Mapping[str, int],
    limits: Mapping[str, int | None],
    *,
    windows: Ints | None = None,
    memory: Ints | None = None,
    max_layers: int | None = None,
) -> Problem:
    """A problem from additive costs (L, O) by resource, and the windows (W,) and differences (L, O, W) of memory."""
    names: list[str] = list(resources)
    parts = [np.asarray(resources[name])[..., None] for name in names]
    start: list[int] = [int(base[name]) for name in names]
    if windows is not None and memory is not None:
        parts.append(memory)
        start += windows.tolist()
        names += ["memory"] * len(windows)
    rows = np.concatenate(parts, axis=2).astype(np.int64)
    bounds = [limits.get(name) for name in names]
    return Problem(
        allowed=allowed,
        rows=np.where(allowed[..., None], rows, 0),
        base=np.array(start, dtype=np.int64),
        limits=np.array([FREE if bound is None else bound for bound in bounds], dtype=np.int64),
        names=tuple(names),
        max_layers=max_layers,
    )


def of_table(table: Any, limits: Mapping[str, int | None], max_layers: int | None = None) -> Problem:
    """The problem of a `surgeon.costs.CostTable`. Limits: "flops" per image, "params", "memory" in bytes at the peak.

    FLOPs are rounded up to integers, so that no sum is underestimated.
    """
    shape = (len(table.layers), len(table.options))
    columns = {name: np.zeros(shape, dtype=np.int64) for name in ("flops", "params")}
    layers = {name: i for i, name in enumerate(table.layers)}
    options = {label: i for i, label in enumerate(table.options)}
    for row in table.rows:
        for name, column in columns.items():
            column[layers[row.layer], options[row.option]] = int(np.ceil(getattr(row, name)))
    base = {name: int(np.ceil(table.base[name])) for name in columns}
    return make_problem(
        table.allowed,
        columns,
        base,
        limits,
        windows=table.windows,
        memory=table.memory,
        max_layers=max_layers,
    )
