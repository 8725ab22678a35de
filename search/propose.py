"""Proposals: what to try next. Every one of them is within the budgets.

    posterior  the integer program decodes a draw from what the measured values say about the gains (`search.posterior`)
    decoder    TPE over a handful of weights (by stage, by layer type, an exponent, the errors' part, the budget's part), from
               which the integer program decodes a placement: feasible by construction
    tpe        TPE over one categorical a layer, repaired
    nsga2      NSGA-II over the same
    random     random feasible placements

The random numbers of a proposal depend on the study's seed and the trial's number alone, never on a process.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from surgeon.errors import ConfigError
from surgeon.search.draw import random_placement, repair
from surgeon.search.gain import GainTable
from surgeon.search.place import Cut, diverse, gain_of, optimum
from surgeon.search.posterior import Posterior
from surgeon.search.problem import Floats, InfeasibleError, Ints, Problem
from surgeon.search.space import Space

MODES = ("posterior", "decoder", "tpe", "nsga2", "random")
DECODE_GAP = 0.005  # relative; the weights are guesses, so that the last half per cent of a decoded optimum is not worth its time
_STARTUP = 8
_SPREAD = 0.25  # of draws from the posterior; wider ones explore too much in few trials (benchmarks.tabulated)
_TRIES = 50
_DRAWS = 3  # draws of noisy gains, before something else is tried


def derived_seed(*parts: Any) -> int:
    """32 bits out of anything that prints."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


class SeededSampler(BaseSampler):
    """A sampler whose random state is that of (seed, trial number, parameter): a new process goes on as the old one would have."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
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


def make_sampler(mode: str, seed: int) -> BaseSampler:
    """The sampler of a mode; raises `ConfigError`."""
    if mode not in MODES:
        raise ConfigError(f"there is no search mode {mode!r}; there are {', '.join(MODES)}")

    def make(own: int) -> BaseSampler:
        if mode == "nsga2":
            return NSGAIISampler(population_size=10, seed=own)
        if mode in ("random", "posterior"):
            return RandomSampler(seed=own)
        with warnings.catch_warnings():
            # grouping is marked experimental; without it one trial without parameters would switch the joint model off
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(n_startup_trials=_STARTUP, multivariate=True, group=True, constant_liar=True, seed=own)

    return SeededSampler(make, seed)


@dataclass(frozen=True)
class Proposal:
    """A feasible placement and where it comes from."""

    placement: Ints
    source: str


class Proposer:
    """Makes proposals for one space, gain table and problem."""

    def __init__(self, mode: str, space: Space, gains: GainTable, seed: int) -> None:
        self.mode, self.space, self.seed = mode, space, seed
        self.gains = gains.for_space(space)
        top = np.abs(self.gains.gain).max() or 1.0
        self._scaled: Floats = self.gains.gain / top
        self._scaled_error: Floats = self.gains.error / top

    def prelude(self, problem: Problem, optima: int = 4, random: int = 3) -> list[Proposal]:
        """What every study begins with: the unmodified model, different optima of the gain table, random feasible placements."""
        found: list[Proposal] = []
        original = np.zeros(problem.shape[0], dtype=np.int64)
        if problem.feasible(original)[0]:
            found.append(Proposal(original, "original"))
        distance = max(1, problem.shape[0] // 10)
        for placement in diverse(problem, self.gains.gain, optima, distance=distance, gap=1e-4):
            found.append(Proposal(placement, "optimum"))
        rng = np.random.default_rng(derived_seed(self.seed, "prelude"))
        for _ in range(random):
            drawn = random_placement(problem, rng)
            if drawn is not None:
                found.append(Proposal(drawn, "random"))
        if not found:
            raise InfeasibleError("no placement is within the budgets")
        first: dict[str, Proposal] = {}
        for one in found:
            first.setdefault(self.space.hash_of(one.placement), one)
        return list(first.values())

    def parameters(self, placement: Ints) -> dict[str, Any]:
        """The sampler's parameters that stand for a placement; the decoder's weights cannot be read from one."""
        if self.mode not in ("tpe", "nsga2"):
            return {}
        return {layer: self.space.labels[int(j)] for layer, j in zip(self.space.layers, placement, strict=True)}

    def propose(self, trial: optuna.Trial, problem: Problem, measured: Sequence[tuple[Ints, float]] = ()) -> Proposal:
        """The next proposal of this mode. `measured` are placements and their values, higher being better."""
        if self.mode == "decoder":
            placement = self.decode(problem, self._suggest_weights(trial))
        elif self.mode == "posterior":
            placement = self._from_posterior(trial.number, problem, measured)
        elif self.mode == "random":
            placement = random_placement(problem, self._rng(trial.number, "random"))
        else:
            placement = repair(problem, self._suggest_options(trial), self.gains.gain)
        if placement is None:
            raise InfeasibleError("no placement is within the budgets any more")
        return Proposal(placement, self.mode)

    def another(self, number: int, problem: Problem, seen: Mapping[str, Ints], near: Proposal) -> Proposal | None:
        """A proposal that was not seen yet, in the place of one that was; None if the space seems exhausted."""
        if self.mode in ("decoder", "posterior"):
            rng = self._rng(number, "another")
            for _ in range(_DRAWS):
                noisy = self._scaled * rng.lognormal(0.0, 0.3, self._scaled.shape)
                placement = optimum(problem, noisy, cuts=[Cut(near.placement)], gap=DECODE_GAP, rough=True)
                if placement is None:
                    return None
                if self.space.hash_of(placement) not in seen:
                    return Proposal(placement, "unseen")
        rng = self._rng(number, "unseen")
        for _ in range(_TRIES):
            placement = random_placement(problem, rng)
            if placement is not None and self.space.hash_of(placement) not in seen:
                return Proposal(placement, "unseen")
        cut_all = [Cut(placement) for placement in seen.values()]
        placement = optimum(problem, self.gains.gain, cuts=cut_all, gap=DECODE_GAP, rough=True)
        return None if placement is None else Proposal(placement, "unseen")

    def _from_posterior(self, number: int, problem: Problem, measured: Sequence[tuple[Ints, float]]) -> Ints | None:
        rng = self._rng(number, "posterior")
        if len(measured) < 2:
            return random_placement(problem, rng)
        posterior = Posterior(self.space, self.gains, [one for one, _ in measured], [value for _, value in measured])
        gains = posterior.draw(rng, _SPREAD)
        # what was measured already would teach nothing; where nothing else is left, the caller sees so
        cuts = [Cut(placement) for placement in {tuple(one): one for one, _ in measured}.values()]
        found = optimum(problem, gains, cuts=cuts, gap=DECODE_GAP, rough=True)
        return optimum(problem, gains, gap=DECODE_GAP, rough=True) if found is None else found

    # --- the decoder ----------------------------------------------------------------------------------------------

    def _suggest_weights(self, trial: optuna.Trial) -> dict[str, float]:
        weights = {}
        for stage in sorted({stage or "elsewhere" for stage in self.space.stages}):
            weights[f"stage:{stage}"] = trial.suggest_float(f"stage:{stage}", -2.0, 2.0)
        for kind in sorted(set(self.space.types[1:])):
            weights[f"type:{kind}"] = trial.suggest_float(f"type:{kind}", -2.0, 2.0)
        weights["exponent"] = trial.suggest_float("exponent", 0.0, 2.0)
        weights["optimism"] = trial.suggest_float("optimism", -1.0, 1.0)
        weights["use"] = trial.suggest_float("use", 0.3, 1.0)
        return weights

    def decode(self, problem: Problem, weights: Mapping[str, float]) -> Ints | None:
        """The optimum of the gains as these weights see them; "stage:…" and "type:…" are powers of two."""
        hoped = self._scaled + weights["optimism"] * self._scaled_error
        own = np.where(self.space.allowed & (hoped > 0), np.maximum(hoped, 0.0) ** weights["exponent"], 0.0)
        stages = [2.0 ** weights[f"stage:{stage or 'elsewhere'}"] for stage in self.space.stages]
        types = [0.0, *(2.0 ** weights[f"type:{kind}"] for kind in self.space.types[1:])]
        scores = own * np.array(stages)[:, None] * np.array(types)[None]
        found = optimum(problem.used(weights["use"]), scores, gap=DECODE_GAP, rough=True)
        return optimum(problem, scores, gap=DECODE_GAP, rough=True) if found is None else found

    def _suggest_options(self, trial: optuna.Trial) -> Ints:
        chosen = []
        for i, layer in enumerate(self.space.layers):
            labels = [self.space.labels[j] for j in np.flatnonzero(self.space.allowed[i])]
            chosen.append(self.space.labels.index(trial.suggest_categorical(layer, labels)))
        return np.array(chosen, dtype=np.int64)

    def take_over(self, trial: optuna.Trial) -> None:
        """Read the parameters that an enqueued trial came with, so that the sampler learns from it."""
        if self.mode in ("tpe", "nsga2"):
            self._suggest_options(trial)

    def _rng(self, number: int, what: str) -> np.random.Generator:
        return np.random.default_rng(derived_seed(self.seed, number, what))

    def expected(self, placement: Ints) -> float:
        """The gain that the table expects of a placement."""
        return gain_of(self.gains.gain, placement)
