"""The other samplers of a search, by name, with the guarantees of `PlacementSampler`: within the budgets, nothing twice.

    decoder       TPE over a few weights (by stage, by layer type, an exponent, weight of the errors, share of the budget), from
                  which the integer program decodes a placement
    tpe           Optuna's TPE over the decisions, repaired
    nsga2         its NSGA-II over the same
    random        random placements
    module:NAME   any Optuna sampler: a class, or a function that returns one; repaired

Repaired: a sampler's combination is brought within the budgets before the trial gets its parameters, so that it learns from
what is actually trained.
"""

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from surgeon.errors import ConfigError
from surgeon.search.gains.gain import GainTable
from surgeon.search.placement.draw import random_placement, repair
from surgeon.search.placement.place import optimum
from surgeon.search.placement.problem import Floats, InfeasibleError, Ints, Problem
from surgeon.search.sampling.sampler import (
    DECODE_GAP,
    BudgetedSampler,
    Known,
    PlacementSampler,
    Proposal,
    derived_seed,
)
from surgeon.search.space import Space

if TYPE_CHECKING:
    from surgeon.search.gate import Gate

NAMES = ("posterior", "decoder", "tpe", "nsga2", "random")
_STARTUP = 8
Make = Callable[[int], BaseSampler]  # from a seed


class RandomPlacements(BudgetedSampler):
    """Random placements, small and large ones equally likely."""

    name = "random"

    def propose(self, study: optuna.Study, trial: FrozenTrial, problem: Problem, known: Sequence[Known]) -> Proposal:
        placement = random_placement(problem, self.rng(trial.number, "random"))
        if placement is None:
            raise InfeasibleError("no placement is left within the budgets")
        return Proposal(placement, self.name)


class DecoderSampler(BudgetedSampler):
    """TPE over a few weights, from which the integer program decodes a placement.

    The weights are stored in the trial's user attribute `weights` (by `suggest`): they cannot be derived from a placement.
    """

    name = "decoder"

    def propose(self, study: optuna.Study, trial: FrozenTrial, problem: Problem, known: Sequence[Known]) -> Proposal:
        weights = self._draw(study, trial, known)
        placement = self.decode(problem, weights)
        if placement is None:
            raise InfeasibleError("no placement is left within the budgets")
        return Proposal(placement, self.name, {"weights": weights})

    def _weights(self) -> dict[str, BaseDistribution]:
        found: dict[str, BaseDistribution] = {}
        for stage in sorted({stage or "elsewhere" for stage in self.space.stages}):
            found[f"stage:{stage}"] = FloatDistribution(-2.0, 2.0)
        for kind in sorted(set(self.space.types[1:])):
            found[f"type:{kind}"] = FloatDistribution(-2.0, 2.0)
        found["exponent"] = FloatDistribution(0.0, 2.0)
        found["optimism"] = FloatDistribution(-1.0, 1.0)
        found["use"] = FloatDistribution(0.3, 1.0)
        return found

    def _draw(self, study: optuna.Study, trial: FrozenTrial, known: Sequence[Known]) -> dict[str, float]:
        """TPE's weights, from a separate in-memory study of the trials that have some."""
        weights = self._weights()
        inner = _scratch(study.directions, _tpe(derived_seed(self.seed, trial.number)))
        for one in known:
            noted = one.trial.user_attrs.get("weights")
            if noted is not None and one.trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
                inner.add_trial(
                    create_trial(
                        state=one.trial.state,
                        values=one.trial.values,
                        params=noted,
                        distributions=weights,
                        intermediate_values=one.trial.intermediate_values,
                    )
                )
        return dict(inner.ask(weights).params)

    def decode(self, problem: Problem, weights: Mapping[str, float]) -> Ints | None:
        """The optimum of the gains under these weights; "stage:…" and "type:…" are powers of two."""
        top = np.abs(self.gains.gain).max() or 1.0
        hoped: Floats = (self.gains.gain + weights["optimism"] * self.gains.error) / top
        own = np.where(self.space.allowed & (hoped > 0), np.maximum(hoped, 0.0) ** weights["exponent"], 0.0)
        stages = [2.0 ** weights[f"stage:{stage or 'elsewhere'}"] for stage in self.space.stages]
        types = [0.0, *(2.0 ** weights[f"type:{kind}"] for kind in self.space.types[1:])]
        scores = own * np.array(stages)[:, None] * np.array(types)[None]
        found = optimum(problem.used(weights["use"]), scores, gap=DECODE_GAP, rough=True)
        return optimum(problem, scores, gap=DECODE_GAP, rough=True) if found is None else found


class RepairedSampler(BudgetedSampler):
    """Any Optuna sampler over the decisions, repaired to fit the budgets. Arguments of `BudgetedSampler`, and `inner`, `name`."""

    def __init__(
        self,
        inner: BaseSampler,
        space: Space,
        costs: "Gate | Problem",
        gains: GainTable | None = None,
        *,
        name: str = "repaired",
        seed: int = 0,
        optima: int = 4,
        random: int = 3,
    ) -> None:
        super().__init__(space, costs, gains, seed=seed, optima=optima, random=random)
        self.inner, self.name = inner, name

    def propose(self, study: optuna.Study, trial: FrozenTrial, problem: Problem, known: Sequence[Known]) -> Proposal:
        independent = self.inner.sample_independent
        own = copy(trial)  # with the parameters requested so far, which some samplers use
        own.params, own.distributions = dict(trial.params), dict(trial.distributions)
        try:
            space = self.inner.infer_relative_search_space(study, own)
            relative = self.inner.sample_relative(study, own, space)
        except Exception as error:
            raise self._failed(error) from error

        def ask(name: str, distribution: CategoricalDistribution) -> Any:
            try:
                value = relative[name] if name in relative else independent(study, own, name, distribution)
            except Exception as error:
                raise self._failed(error) from error
            if not any(value is choice or value == choice for choice in distribution.choices):
                wanted = ", ".join(map(str, distribution.choices))
                raise ConfigError(f"the sampler {self.name} leaves {name} out: got {value!r}, expected one of {wanted}")
            own.params, own.distributions = own.params | {name: value}, own.distributions | {name: distribution}
            return value

        placement = repair(problem, self.parameters.walk(ask), self.gains.gain)
        if placement is None:
            raise InfeasibleError("no placement is left within the budgets")
        return Proposal(placement, self.name)

    def check(self, objectives: int) -> None:
        """Raise `ConfigError` for a sampler that fails, or leaves out parameters, before anything is trained for it."""
        study = _scratch(["minimize"] * objectives, self.inner)
        study.ask()
        self.propose(study, study.trials[0], self.problem, [])

    def _failed(self, error: Exception) -> ConfigError:
        return ConfigError(f"the sampler {self.name} failed: {type(error).__name__}: {error}")

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        super().after_trial(study, trial, state, values)
        self.inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self.inner.reseed_rng()


class SeededSampler(BaseSampler):
    """A sampler recreated for every trial from (seed, trial number, parameter), so that a new process continues identically.

    It must store its knowledge in the study, as Optuna's own samplers do.
    """

    def __init__(self, make: Make, seed: int) -> None:
        self._make, self._seed = make, seed
        self._number = -1
        self._inner: BaseSampler | None = None

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if self._inner is None or self._number != trial.number:
            self._number, self._inner = trial.number, self._make(derived_seed(self._seed, trial.number))
        return self._inner

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        fresh = self._make(derived_seed(self._seed, trial.number, param_name))
        return fresh.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._of(trial).after_trial(study, trial, state, values)


# --- by name ------------------------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Raise `ConfigError` for an unknown sampler name, before anything is built."""
    if name not in NAMES:
        _load(name)


def make_sampler(
    name: str,
    space: Space,
    costs: "Gate | Problem",
    gains: GainTable,
    *,
    resources: Sequence[str] = (),
    **options: Any,
) -> BudgetedSampler:
    """The sampler with this name; `options` are those of `BudgetedSampler`. Raises `ConfigError`."""
    if name == "posterior":
        return PlacementSampler(space, costs, gains, resources=resources, **options)
    if name == "decoder":
        return DecoderSampler(space, costs, gains, **options)
    if name == "random":
        return RandomPlacements(space, costs, gains, **options)
    make = {"tpe": _tpe, "nsga2": _nsga2}.get(name)
    seed = int(options.get("seed", 0))
    inner = SeededSampler(make, seed) if make is not None else _foreign(name, seed)
    made = RepairedSampler(inner, space, costs, gains, name=name, **options)
    made.check(1 + len(resources))
    return made


def _scratch(directions: Sequence[Any], sampler: BaseSampler) -> optuna.Study:
    """A private in-memory study."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(verbosity, optuna.logging.WARNING))
    try:
        storage = optuna.storages.InMemoryStorage()
        return optuna.create_study(storage=storage, directions=list(directions), sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _tpe(seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        # grouping is marked experimental; without it, conditional options would be left to chance
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(n_startup_trials=_STARTUP, multivariate=True, group=True, constant_liar=True, seed=seed)


def _nsga2(seed: int) -> BaseSampler:
    return NSGAIISampler(population_size=10, seed=seed)


def _foreign(name: str, seed: int) -> BaseSampler:
    """A third-party sampler: recreated for every trial if it takes a seed, otherwise once per process."""
    factory = _load(name)
    try:
        seeded = "seed" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # no available signature
        seeded = False

    def make(own: int) -> BaseSampler:
        try:
            made = factory(seed=own) if seeded else factory()
        except Exception as error:
            raise ConfigError(
                f"--sampler: {name} cannot be created: {type(error).__name__}: {error}; a function that returns the sampler may be "
                "used instead"
            ) from error
        if not isinstance(made, BaseSampler):
            raise ConfigError(f"--sampler: {name} is not an Optuna sampler: it creates a {type(made).__name__}")
        return made

    first = make(seed)
    return SeededSampler(make, seed) if seeded else first


def _load(name: str) -> Callable[..., Any]:
    """The class or function of `module:NAME`. Raises `ConfigError`."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"--sampler: expected {', '.join(NAMES)} or module:Class, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"--sampler: cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"--sampler: {module_name} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found) or (isinstance(found, type) and not issubclass(found, BaseSampler)):
        told = f"the class {attribute}" if isinstance(found, type) else f"{type(found).__name__} {attribute}"
        raise ConfigError(
            f"--sampler: {told} of {module_name} is not an Optuna sampler; expected a class derived from "
            "optuna.samplers.BaseSampler, or a function that returns one"
        )
    named: Callable[..., Any] = found
    return named
