"""The budget gate: a placement's cost from the table, then from a whole trace, then (on request) from timings.

Nothing over budget is ever trained: `Gate.check` runs before every training, and its verdict is cached by the placement's hash.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from surgeon.costs import Cost, CostTable, cost, cost_table
from surgeon.costs.build import freeze_like, option_layer
from surgeon.costs.emulate import meta_copy
from surgeon.costs.measure import has_device, interleaved
from surgeon.costs.settings import make_settings
from surgeon.errors import ConfigError
from surgeon.layers.base import LayerConfig
from surgeon.layers.geometry import ConvGeometry
from surgeon.search.budget import Budgets, Calibration, as_budget, check_feasible, told
from surgeon.search.placement.place import nearest_placement
from surgeon.search.placement.problem import Ints, Problem, of_table
from surgeon.search.space import Space, SpaceConfig, make_space
from surgeon.sites.sites import find_sites
from surgeon.surgery.convert import convert
from surgeon.util.bounds import FLAGS

_ROUNDS = 7  # interleaved timings of a placement and the original


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a placement may be trained. `reasons` list what is over budget.

    `predicted` are the cost table's sums (flops, params, memory: bytes at the peak), `traced` those of the whole model, plus
    "needed", the bytes of device memory including margin and "reserve". `latency` is in seconds, if it is limited.
    """

    fits: bool
    reasons: tuple[str, ...]
    predicted: Mapping[str, int]
    traced: Mapping[str, int]
    latency: float | None = None

    @property
    def error(self) -> float:
        """The largest relative difference between the table's prediction and the trace."""
        return max(abs(self.predicted[name] / self.traced[name] - 1) for name in ("flops", "params", "memory"))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"reasons": list(self.reasons), "error": self.error}


class Gate:
    """Costs and budgets of one model: `problem` is a solver's input, `check` the condition for training.

    `settings` are those of `surgeon.cost` (batch_size, input_size, optimizer, amp, ...). The model is not modified.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SpaceConfig | None = None,
        budgets: Budgets | None = None,
        *,
        calibration: Calibration | None = None,
        **settings: Any,
    ) -> None:
        self.budgets = budgets or Budgets()
        self.calibration = calibration or Calibration()
        self.settings: dict[str, Any] = settings | {"mode": self.budgets.mode}
        self._model = model
        size = make_settings(model, **{"input_size": None, "batch_size": 1, "amp": False} | self.settings).input_size
        sites = find_sites(model, input_size=size).convs
        self.space: Space = make_space(model, config, sites=sites)
        self._aliases = {site.name: site.names for site in sites}
        self._geometries: dict[str, ConvGeometry] = {
            site.name: site.geometry for site in sites if site.geometry is not None
        }
        self.original: Cost = cost(model, **self.settings)
        self.table: CostTable = cost_table(
            model, list(self.space.options), layers=self.space.selection, **self.settings
        )
        assert self.table.layers == self.space.layers
        self._unlimited = of_table(self.table, {})
        self._meta = meta_copy(model)
        self._configs: dict[Any, LayerConfig] = {}
        self._verdicts: dict[str, Verdict] = {}

    @property
    def problem(self) -> Problem:
        """The placement problem under these budgets and the current calibration."""
        limited = self._unlimited.limited(self.budgets.limits(self.original, self.calibration))
        return replace(limited, max_layers=self.budgets.max_layers)

    @property
    def budgets_text(self) -> str:
        """The budgets in words; that of the memory with the step it is of."""
        return self.budgets.text(self.original.step)

    def identity(self) -> dict[str, Any]:
        """JSON values that identify this model, step and budgets; weights are not included."""
        shapes = {name: list(value.shape) for name, value in self._meta.state_dict().items()}
        digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]
        return {
            "model": {"class": type(self._model).__name__, "parameters": self.original.params, "structure": digest},
            "step": {name: str(value) for name, value in sorted(self.settings.items())},
            "budgets": self.budgets.to_dict(),
        }

    def check_feasible(self) -> None:
        """Raise `InfeasibleError`, with the nearest feasible numbers, if no placement can be within the budgets."""
        reserve = sum(self.original.reserve.values())
        costs = {"flops": self.original.flops, "params": self.original.params, "memory": self.original.peak_bytes}

        def translate(resource: str, value: float) -> float:
            return self.calibration.needed(value, reserve) if resource == "memory" else value

        check_feasible(self.problem, costs, self.budgets, translate=translate)

    def check(self, placement: Sequence[int] | Ints) -> Verdict:
        """The verdict on a placement, from the table, and if that accepts it, from a whole trace and timings."""
        key = self.space.hash_of(placement)
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(placement)
        return self._verdicts[key]

    def _judge(self, placement: Sequence[int] | Ints) -> Verdict:
        problem = self.problem
        predicted = problem.costs(placement)
        if not problem.feasible(placement)[0]:
            over = [
                self._over(name, value, problem.limit(name) or 0, "by the cost table")
                for name, value in predicted.items()
                if problem.limit(name) is not None and value > (problem.limit(name) or 0)
            ]
            over = over or [f"it replaces more than {problem.max_layers} layers"]
            return Verdict(fits=False, reasons=tuple(over), predicted=predicted, traced=predicted)
        traced = self._traced(placement)
        beyond = self._exceeded(traced).items()
        reasons = [self._over(name, value, limit, "by a whole trace") for name, (value, limit) in beyond]
        latency = None
        if not reasons and self.budgets.latency is not None:
            before, latency = self.time(placement)
            limit = self.budgets.latency.of(before)
            if latency > limit:
                reasons.append(self._over("latency", latency, limit, "as measured"))
        return Verdict(fits=not reasons, reasons=tuple(reasons), predicted=predicted, traced=traced, latency=latency)

    def nearest_replacement(self) -> str | None:
        """The budgets that the nearest placement with a replacement exceeds, as it needs them by a whole trace; None if none."""
        placement = nearest_placement(self.problem, at_least=1)
        if not placement.any():
            return None
        over = self._exceeded(self._traced(placement))
        return ", ".join(f"{FLAGS[name]} {as_budget(name, value)}" for name, (value, _) in over.items()) or None

    def _traced(self, placement: Sequence[int] | Ints) -> dict[str, int]:
        found = self.trace(placement)
        reserve = sum(found.reserve.values())
        needed = self.calibration.needed(found.peak_bytes, reserve)
        costs = {"flops": found.flops, "params": found.params, "memory": found.peak_bytes}
        return costs | {"needed": needed, "reserve": reserve}

    def _exceeded(self, traced: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """The traced costs that are beyond their limits, and these."""
        limits: dict[str, int | None] = self.budgets.limits(self.original, self.calibration)
        limits["memory"] = self.budgets.memory_limit(self.original, self.calibration)
        found = {"flops": traced["flops"], "params": traced["params"], "memory": traced["needed"]}
        return {name: (found[name], n) for name, n in limits.items() if n is not None and found[name] > n}

    @staticmethod
    def _over(name: str, value: float, limit: float, how: str) -> str:
        return f"{FLAGS[name]} {told(name, limit)} is exceeded {how}: {told(name, value)}"

    def use(self, traced: Mapping[str, int] | None) -> dict[str, float]:
        """The fraction of each limit used by a placement with these traced costs."""
        limits: dict[str, int | None] = self.budgets.limits(self.original, self.calibration)
        limits["memory"] = self.budgets.memory_limit(self.original, self.calibration)
        keys = {"flops": "flops", "params": "params", "memory": "needed"}
        known = traced or {}
        return {name: known[keys[name]] / limit for name, limit in limits.items() if limit and keys[name] in known}

    def build(self, placement: Sequence[int] | Ints) -> nn.Module:
        """The model with this placement on the meta device: shapes without data."""
        work = deepcopy(self._meta)
        for layer, choice in zip(self.space.layers, placement, strict=True):
            if not choice:
                continue
            new = option_layer(self._geometries[layer], self.space.options[int(choice) - 1], self._configs)
            new = deepcopy(new)
            freeze_like(new, work.get_submodule(layer))
            for name in self._aliases[layer]:
                work.set_submodule(name, new)
        return work

    def trace(self, placement: Sequence[int] | Ints) -> Cost:
        """Cost of the whole model with this placement."""
        return cost(self.build(placement), **self.settings)

    def time(self, placement: Sequence[int] | Ints) -> tuple[float, float]:
        """Seconds of one inference of the original and of the model with this placement, on this machine's device."""
        settings = make_settings(
            self._model, **{"input_size": None, "batch_size": 1, "amp": False} | self.settings | {"mode": "infer"}
        )
        if not any(placement):
            models = [self._model, self._model]
        else:
            recipe = self.space.recipe(placement)
            models = [self._model, convert(self._model, recipe=recipe, check=False, input_size=settings.input_size)[0]]
        with torch.random.fork_rng():
            timings = interleaved(models, settings, rounds=_ROUNDS, device="cuda" if has_device() else "cpu")
        return timings[0].median, timings[1].median

    def out_of_memory(self, placement: Sequence[int] | Ints, memory: int | None) -> Calibration:
        """Learn from a run that ran out of memory on a device with `memory` bytes (None: unknown)."""
        found = self.trace(placement)
        reserve = sum(found.reserve.values())
        self.recalibrate(self.calibration.after_out_of_memory(found.peak_bytes, reserve, memory))
        return self.calibration

    def refused(self, verdict: Verdict) -> Calibration:
        """Learn from a placement accepted by the table but refused by the whole trace."""
        if "reserve" in verdict.traced:
            own = sum(self.original.reserve.values())
            self.recalibrate(self.calibration.after_refusal(verdict.traced["reserve"], own))
        return self.calibration

    def rebudget(self, budgets: Budgets) -> None:
        """Use other budgets from now on, with the same memory mode."""
        if budgets.mode != self.budgets.mode:
            raise ConfigError(f"the costs are those of mode {self.budgets.mode!r}, the new budgets of {budgets.mode!r}")
        self.budgets = budgets
        self._verdicts.clear()

    def recalibrate(self, calibration: Calibration) -> None:
        """Use this calibration from now on."""
        if calibration != self.calibration:
            self.calibration = calibration
            self._verdicts.clear()
