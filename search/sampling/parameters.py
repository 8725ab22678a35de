"""The decisions of a space as Optuna parameters: for every layer its type, and the options that the type leaves open.

    layer3.0.conv2              keep | acda | pafu | sekg
    layer3.0.conv2.atoms        4 | 6        only if the type is acda, and the space has acda with more than one number of atoms

Distributions never change within a study: allowed combinations are ensured by `Parameters.of` (always) and by
`Parameters.placement`, which takes the nearest option for combinations from other samplers.
"""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution
from optuna.trial import BaseTrial, Trial

from surgeon.costs.table import KEEP
from surgeon.errors import ConfigError
from surgeon.search.placement.problem import FREE, Ints, Problem
from surgeon.search.space import Space

DEFAULT = "default"  # value of a key that an option leaves out
Value = None | bool | int | float | str


class Parameters:
    """Placements of a space as parameters, and back."""

    def __init__(self, space: Space) -> None:
        self.space = space

    @cached_property
    def _allowed(self) -> list[dict[str, list[int]]]:
        """By layer: layer type → its allowed options (numbers)."""
        found: list[dict[str, list[int]]] = []
        for row in self.space.allowed:
            types: dict[str, list[int]] = {}
            for j in np.flatnonzero(row):
                types.setdefault(self.space.types[j], []).append(int(j))
            found.append(types)
        return found

    @cached_property
    def _open(self) -> list[dict[str, list[str]]]:
        """By layer: layer type → the keys in which its options differ."""
        return [{kind: self._differing(options) for kind, options in types.items()} for types in self._allowed]

    def _differing(self, options: list[int]) -> list[str]:
        keys = dict.fromkeys(key for j in options if j for key in self.space.options[j - 1].options)
        return [key for key in keys if len({json.dumps(self._value(j, key)) for j in options}) > 1]

    def _value(self, option: int, key: str) -> Value:
        value = self.space.options[option - 1].options.get(key, DEFAULT)
        return value if isinstance(value, bool | int | float | str) else json.dumps(value)

    @cached_property
    def distributions(self) -> dict[str, CategoricalDistribution]:
        """Every parameter that a trial may have, in the order of the layers. Raises `ConfigError` for ambiguous names."""
        found: dict[str, CategoricalDistribution] = {}
        for layer, types, keys in zip(self.space.layers, self._allowed, self._open, strict=True):
            own: dict[str, list[Value]] = {layer: list(types)}
            for kind, options in types.items():
                for key in keys[kind]:
                    values = own.setdefault(f"{layer}.{key}", [])
                    values += [v for v in dict.fromkeys(self._value(j, key) for j in options) if v not in values]
            for name, values in own.items():
                if name in found:
                    raise ConfigError(
                        f"{name} is a layer and an option of another one: the search space cannot have both"
                    )
                numbers = all(isinstance(v, int | float) for v in values)
                found[name] = CategoricalDistribution(
                    sorted(values, key=lambda v: float(v or 0)) if numbers else values
                )
        return found

    def of(self, placement: Ints) -> dict[str, Value]:
        """The parameters of a placement (L,)."""
        found: dict[str, Value] = {}
        for i, (layer, j) in enumerate(zip(self.space.layers, placement, strict=True)):
            kind = self.space.types[int(j)]
            found[layer] = kind
            found |= {f"{layer}.{key}": self._value(int(j), key) for key in self._open[i][kind]}
        return found

    def walk(self, ask: Callable[[str, CategoricalDistribution], Any]) -> Ints:
        """The placement (L,) from answers asked for in order and only where they apply; the nearest option for odd combinations."""
        chosen = np.zeros(len(self.space.layers), dtype=np.int64)
        for i, layer in enumerate(self.space.layers):
            kind = ask(layer, self.distributions[layer])
            if kind == KEEP:
                continue
            name = f"{layer}.{{}}"
            said = {key: ask(name.format(key), self.distributions[name.format(key)]) for key in self._open[i][kind]}
            options = self._allowed[i][kind]
            chosen[i] = max(options, key=lambda j: sum(self._value(j, key) == v for key, v in said.items()))
        return chosen

    def placement(self, values: Mapping[str, Any]) -> Ints | None:
        """The placement of a trial's parameters; None if some are missing or not of this space."""

        def look_up(name: str, distribution: CategoricalDistribution) -> Any:
            if values[name] not in distribution.choices:
                raise KeyError(name)
            return values[name]

        try:
            return self.walk(look_up)
        except KeyError:
            return None

    def suggest(self, trial: BaseTrial) -> Ints:
        """Ask any sampler for a placement via the trial's `suggest_categorical`. It may be over budget: see `constraints`."""
        return self.walk(lambda name, distribution: trial.suggest_categorical(name, distribution.choices))


def constraints(problem: Problem, placement: Ints) -> dict[str, float]:
    """Optuna's constraints: resource → relative excess over its limit; at most 0 is within. Limited resources only.

    "layers" is the number of replaced layers above `max_layers`.
    """
    over = problem.totals(placement)[0] - problem.limits
    found: dict[str, float] = {}
    for name in dict.fromkeys(problem.names):
        rows = problem.of(name)
        if problem.limits[rows[0]] != FREE:
            found[name] = float((over[rows] / np.maximum(np.abs(problem.limits[rows]), 1)).max())
    if problem.max_layers is not None:
        found["layers"] = float((placement != 0).sum() - problem.max_layers)
    return found


def set_constraints(trial: Trial, found: Mapping[str, float]) -> None:
    """Set those constraints that a trial lacks: Optuna accepts each once."""
    known = trial.constraints
    for name, value in found.items():
        if name not in known:
            trial.set_constraint(name, value)
