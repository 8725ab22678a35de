"""Human-readable budgets, absolute or relative to the unmodified model, and the share of them that a placement uses.

Memory is checked twice. The cost table predicts the peak of the tensors; a whole trace adds the device's needs beyond them:
needed = peak × margin + reserve (fragmentation, workspaces, context). `Calibration` stores the margin and learns from runs that
ran out of memory although they should have fitted.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from surgeon.costs.memory import MARGIN
from surgeon.errors import ConfigError
from surgeon.search.placement.place import nearest, optimum, smallest
from surgeon.search.placement.problem import InfeasibleError, Problem
from surgeon.util.bounds import FLAGS, Bound, parse_bound
from surgeon.util.parse import mebibytes
from surgeon.util.tables import count

if TYPE_CHECKING:
    from surgeon.costs import Cost

Translate = Callable[[str, float], float]  # resource, value of its row -> value in the unit of the user's budget


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Conversion of predicted memory to needed memory; `events` are the runs that it was learned from.

    `reserve`, in bytes, is what the table assumes after a whole trace refused a placement that the table had accepted.
    `memory` is the device's actual memory in bytes: a limit even if no budget was given.
    """

    margin: float = MARGIN
    reserve: int = 0
    memory: int | None = None
    events: tuple[Mapping[str, float | None], ...] = ()

    def __post_init__(self) -> None:
        if not 1.0 <= self.margin < 100:
            raise ConfigError(f"the memory margin must be at least 1, got {self.margin!r}")

    def needed(self, peak: float, reserve: float) -> int:
        """Bytes that a device needs for a predicted peak."""
        return round(peak * self.margin + reserve)

    def room(self, memory: float, reserve: float) -> int:
        """The highest predicted peak that fits in this much memory; may be negative."""
        return int((memory - reserve) / self.margin)

    def after_out_of_memory(self, peak: int, reserve: int, memory: int | None) -> "Calibration":
        """The calibration after a step with this prediction did not fit in `memory` bytes (None: unknown).

        The same placement will be refused from now on.
        """
        event = {"peak": peak, "reserve": reserve, "memory": memory, "margin": self.margin}
        had = self.needed(peak, reserve) - 1 if memory is None else memory
        margin = self.margin
        if self.needed(peak, reserve) <= had:
            margin = (had - reserve) / max(peak, 1) * 1.02
        least = had if self.memory is None else min(self.memory, had)
        return replace(self, margin=margin, memory=least, events=(*self.events, event))

    def after_refusal(self, reserve: int, original: int) -> "Calibration":
        """The calibration after the whole trace of a placement accepted by the table did not fit.

        The table's reserve moves half of the way to that of the placement: reserves differ between placements,
        and using the highest one everywhere would rule out much that fits.
        """
        known = max(self.reserve, original)
        return replace(self, reserve=max(known, (known + reserve + 1) // 2))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"events": [dict(event) for event in self.events]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """Inverse of `to_dict`."""
        return cls(**{**values, "events": tuple(values["events"])})


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Limits on the cost of a placement; None: no limit. `mode` is the step whose memory counts, "train" or "infer"."""

    flops: Bound | None = None
    params: Bound | None = None
    memory: Bound | None = None
    latency: Bound | None = None
    mode: str = "train"
    max_layers: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("train", "infer"):
            raise ConfigError(f"--memory-mode must be train or infer, got {self.mode!r}")
        if self.max_layers is not None and self.max_layers < 1:
            raise ConfigError(f"--max-layers must be at least 1, got {self.max_layers}")

    @classmethod
    def parse(
        cls,
        *,
        flops: str | None = None,
        params: str | None = None,
        memory: str | None = None,
        latency: str | None = None,
        mode: str = "train",
        max_layers: int | None = None,
    ) -> "Budgets":
        """Budgets from strings, see `parse_bound`."""
        given = {"flops": flops, "params": params, "memory": memory, "latency": latency}
        bounds = {name: None if text is None else parse_bound(text, name) for name, text in given.items()}
        return cls(mode=mode, max_layers=max_layers, **bounds)

    def limits(self, original: "Cost", calibration: Calibration) -> dict[str, int | None]:
        """The limits on the cost table's sums: FLOPs, parameters, and bytes at the predicted peak."""
        own = sum(original.reserve.values())
        reserve = max(own, calibration.reserve)
        limit = self.memory_limit(original, calibration)
        memory = None if limit is None else calibration.room(limit, reserve)
        if memory is not None and calibration.needed(original.peak_bytes, own) <= (limit or 0):
            # calibration from other placements never rules out the original model
            memory = max(memory, original.peak_bytes)
        return {
            "flops": None if self.flops is None else int(self.flops.of(original.flops)),
            "params": None if self.params is None else int(self.params.of(original.params)),
            "memory": memory,
        }

    def memory_limit(self, original: "Cost", calibration: Calibration) -> int | None:
        """Bytes of device memory that a step may need, including margin and reserve."""
        if self.memory is None:
            return calibration.memory
        # a relative budget refers to the original as first evaluated: it must not grow with the margin
        first = Calibration().needed(original.peak_bytes, sum(original.reserve.values()))
        limit = int(self.memory.of(first))
        return limit if calibration.memory is None else min(limit, calibration.memory)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def text(self, step: str | None = None) -> str:
        """Readable form: `FLOPs <= +10%, memory (train) <= 8GiB`; `step` names the step whose memory counts."""
        names = {
            "flops": "FLOPs",
            "params": "parameters",
            "memory": f"memory ({step or self.mode})",
            "latency": "latency",
        }
        parts = [f"{label} <= {bound.text}" for name, label in names.items() if (bound := getattr(self, name))]
        if self.max_layers is not None:
            parts.append(f"layers <= {self.max_layers}")
        return ", ".join(parts) or "no budget"


def told(resource: str, value: float) -> str:
    """A formatted amount of a resource."""
    if resource == "memory":
        return mebibytes(value)
    if resource == "latency":
        return f"{value * 1e3:,.2f} ms"
    return count(round(value))


def as_budget(resource: str, value: float) -> str:
    """An amount as a budget option, rounded up so that this exact cost is within it."""
    if resource == "memory":
        return f"{math.ceil(value / 2**20)}MiB"
    if resource == "latency":
        return f"{math.ceil(value * 1e5) / 100:g}ms"
    letter, unit = next(((c, n) for c, n in (("G", 10**9), ("M", 10**6)) if value >= n / 10), ("k", 10**3))
    return f"{math.ceil(value / unit * 1000) / 1000:g}{letter}"


def check_feasible(
    problem: Problem, original: Mapping[str, int], budgets: Budgets, *, translate: Translate | None = None
) -> None:
    """Raise `InfeasibleError` with the nearest numbers if no placement, not even the unmodified model, is within the limits.

    `original` are the unmodified model's costs. `translate(resource, value)` converts a row's value to the unit of the user's
    budget (memory: with margin and reserve). Relative `budgets` are named as they were given, too.
    """

    def say(resource: str, value: float) -> float:
        return value if translate is None else translate(resource, value)

    names = list(dict.fromkeys(problem.names))
    limited = [name for name in names if problem.limit(name) is not None]

    def amounts(values: Mapping[str, int]) -> str:
        return ", ".join(f"{FLAGS[name]} {as_budget(name, say(name, value))}" for name, value in values.items())

    if bool(problem.feasible([0] * problem.shape[0])[0]):
        return
    if optimum(problem, np.zeros(problem.shape)) is not None:
        return
    least = {name: smallest(problem, name) for name in limited}
    alone = f"; each alone could go down to {amounts(least)}" if len(limited) > 1 else ""
    wanted = {name: problem.limit(name) or 0 for name in limited}
    given: dict[str, Bound | None] = {name: getattr(budgets, name) for name in limited}
    typed = {name: f"{FLAGS[name]} {bound.text}" for name, bound in given.items() if bound is not None}
    relative = {name: typed[name] for name, bound in given.items() if bound is not None and bound.relative}
    told = f" ({', '.join(relative.values())})" if relative else ""
    absolute = {name: text for name, text in typed.items() if name not in relative}
    asked = ", ".join(absolute.get(name) or amounts({name: wanted[name]}) for name in limited)
    original_costs = {name: original[name] for name in limited}
    raise InfeasibleError(
        f"no placement is within {asked}{told}; the nearest budgets that one placement meets are "
        f"{amounts(nearest(problem))}{alone} "
        f"(the original: {amounts(original_costs)}){_macs(original_costs, wanted)}"
    )


def _macs(original: Mapping[str, int], wanted: Mapping[str, int]) -> str:
    """A hint for budgets that were probably meant in multiply-accumulates."""
    if "flops" in wanted and original["flops"] / 2 <= wanted["flops"] < original["flops"]:
        return "; a multiply-accumulate counts as 2 FLOPs"
    return ""
