"""`PlacementSampler`: an Optuna sampler that only proposes placements within budgets, and the base of all samplers of a search.

A trial's parameters are the decisions (`search.sampling.parameters`). Every study starts with the unmodified model, diverse
optima of the gain table, the papers' placements and random ones; no placement is proposed twice. The random numbers of a
proposal depend only on the seed and the trial's number, never on a process: a study resumed in another process gets the same
proposals.

    sampler = PlacementSampler(gate.space, gate)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(lambda trial: value_of(sampler.suggest(trial)), n_trials=20)
"""

import contextlib
import hashlib
import math
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from surgeon.errors import ConfigError
from surgeon.search.gains.gain import GainTable, uniform_gains
from surgeon.search.gains.posterior import Posterior
from surgeon.search.placement.draw import random_placement
from surgeon.search.placement.place import Cut, diverse, gain_of, optimum
from surgeon.search.placement.problem import Floats, InfeasibleError, Ints, Problem
from surgeon.search.sampling.parameters import Parameters, constraints, set_constraints
from surgeon.search.space import Space

if TYPE_CHECKING:
    from surgeon.search.gate import Gate

DECODE_GAP = 0.005  # relative; gains are estimates, so the last half percent of an optimum is not worth its time
_SPREAD = 0.25  # of draws from the posterior; wider draws explore too much in few trials (benchmarks.tabulated)
_TRIES = 50
_DRAWS = 3  # draws of noisy gains before something else is tried
_CHOOSING = threading.RLock()  # serializes the threads of `study.optimize(n_jobs=…)`
_KEPT = 64  # number of other trials' proposals kept until they are suggested


def derived_seed(*parts: Any) -> int:
    """32 bits derived from any printable values."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def published(space: Space, problem: Problem) -> list[Ints]:
    """Each type where its paper has it, with the first of its options with which that is within the budgets."""
    found = []
    for kind, layers in space.papers.items():
        for option in (j for j, label in enumerate(space.types) if label == kind):
            rows = [i for i, layer in enumerate(space.layers) if layer in layers and space.allowed[i, option]]
            placement = np.zeros(len(space.layers), dtype=np.int64)
            placement[rows] = option
            if rows and problem.feasible(placement)[0]:
                found.append(placement)
                break
    return found


class ExhaustedError(optuna.TrialPruned):
    """Every placement within the budgets has been tried."""


@dataclass(frozen=True)
class Proposal:
    """A placement (L,) within the budgets, its source, and further attributes for its trial."""

    placement: Ints
    source: str
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """A trial of the study that has a placement."""

    trial: FrozenTrial
    placement: Ints


class BudgetedSampler(BaseSampler):
    """A sampler of placements, each within the budgets and none twice. Subclasses implement `propose`.

    Args:
        space: the possible replacements of each layer.
        costs: the budget gate, or a problem if nothing needs to be traced.
        gains: expected gains of replacements; None: all the same.
        seed: for everything random.
        optima: number of optima of the gain table at the start of a study.
        random: number of random placements after them.

    Raises:
        InfeasibleError: while sampling, if nothing is within the budgets.
    """

    name: str  # names the source of its proposals

    def __init__(
        self,
        space: Space,
        costs: "Gate | Problem",
        gains: GainTable | None = None,
        *,
        seed: int = 0,
        optima: int = 4,
        random: int = 3,
    ) -> None:
        self.space, self.seed = space, seed
        self.gains = (uniform_gains(space) if gains is None else gains).for_space(space)
        self.parameters = Parameters(space)
        self._costs = costs
        self._begin_with = {"original": 1, "optimum": optima, "paper": len(space.papers), "random": random}
        top = np.abs(self.gains.gain).max() or 1.0
        self._scaled: Floats = self.gains.gain / top
        self._begun: dict[bytes, list[Proposal]] = {}
        self._decoded: dict[tuple[str, int], Ints] = {}
        self._proposals: dict[tuple[str, int], Proposal] = {}

    @property
    def problem(self) -> Problem:
        """The placement problem with the gate's current calibration."""
        return self._costs if isinstance(self._costs, Problem) else self._costs.problem

    # --- public interface -----------------------------------------------------------------------------------------

    def suggest(self, trial: optuna.trial.BaseTrial) -> Ints:
        """The trial's placement (L,): an option's number for every layer, 0 to keep it.

        The trial gets its parameters, the budgets as constraints, and the user attributes `placement` (layer → option), `hash`,
        `source`, `gain` (expected by the table) and `predicted` (costs). A finished trial (`study.best_trial`) or a `FixedTrial`
        only reports its placement.

        Raises:
            ExhaustedError: everything was tried; in `study.optimize` the trial is pruned, and the study stops.
        """
        if not isinstance(trial, optuna.Trial):
            return self.parameters.suggest(trial)
        proposal = self._proposal_of(trial)
        if proposal.source == "exhausted":
            raise ExhaustedError("every placement within the budgets was tried")
        if "placement" not in trial.user_attrs and proposal.source != "enqueued":
            self._note(trial, proposal)  # before the parameters, so that a half-written trial is fully described
        placement = self.parameters.suggest(trial)
        if proposal.source == "enqueued":
            self._note(trial, Proposal(placement, "enqueued"))
        set_constraints(trial, constraints(self.problem, placement))
        return placement

    def _proposal_of(self, trial: optuna.Trial) -> Proposal:
        key = (trial.study.study_name, trial.number)
        _ = trial.relative_params  # samples, unless that was done before
        if key not in self._proposals:
            raise ConfigError(
                f"{type(self).__name__}.suggest: the trial's study has another sampler: {trial.study.sampler}"
            )
        return self._proposals[key]

    def _note(self, trial: optuna.Trial, proposal: Proposal) -> None:
        noted = {
            "hash": self.space.hash_of(proposal.placement),
            "source": proposal.source,
            "gain": self.expected(proposal.placement),
            "predicted": self.problem.costs(proposal.placement),
            **proposal.notes,
            "placement": self.space.names(proposal.placement),  # last: a trial with a placement has all the others
        }
        for name, value in noted.items():
            trial.set_user_attr(name, value)

    def expected(self, placement: Ints) -> float:
        """The gain that the table predicts for a placement."""
        return gain_of(self.gains.gain, placement)

    # --- Optuna's interface ---------------------------------------------------------------------------------------

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self.parameters.distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        noted = trial.user_attrs.get("placement")
        with _CHOOSING:
            if noted is not None:  # a worker died while writing the parameters
                proposal = Proposal(self.space.placement(noted), trial.user_attrs["source"])
            else:
                proposal = self._choose(study, trial)
                partly = not self.parameters.distributions.keys() <= search_space.keys()  # from PartialFixedSampler
                # from `study.enqueue_trial`: the rest is filled in
                if partly or trial.system_attrs.get("fixed_params"):
                    proposal = Proposal(proposal.placement, "enqueued")
            self._proposals[study.study_name, trial.number] = proposal
            for old in list(self._proposals)[:-_KEPT]:
                del self._proposals[old]
        return {name: value for name, value in self.parameters.of(proposal.placement).items() if name in search_space}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Parameters other than the placement, added by the user, come from TPE."""
        other = TPESampler(seed=derived_seed(self.seed, trial.number, param_name))
        return other.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        proposal = self._proposals.pop((study.study_name, trial.number), None)
        if proposal is not None and proposal.source == "exhausted":
            with contextlib.suppress(RuntimeError):  # not in an optimize loop
                study.stop()

    # --- next proposal --------------------------------------------------------------------------------------------

    def _choose(self, study: optuna.Study, trial: FrozenTrial) -> Proposal:
        problem = self.problem
        known = self.known(study, trial)
        seen = {one.placement.tobytes(): one.placement for one in known}
        sources = {one.trial.number: one.trial.user_attrs.get("source") for one in known}
        for (name, number), one in self._proposals.items():  # from other threads, whose trials have no parameters yet
            if name == study.study_name and number != trial.number and one.source != "enqueued":
                seen[one.placement.tobytes()] = one.placement
                sources[number] = one.source
        if trial.number < sum(self._begin_with.values()):
            begun = Counter(sources.values())  # also under other limits: those of the memory move with every refusal
            for one in self.prelude(problem):
                if one.placement.tobytes() not in seen and begun[one.source] < self._begin_with[one.source]:
                    return one
        proposal = self.propose(study, trial, problem, known)
        if proposal.placement.tobytes() not in seen:
            return proposal
        other = self._another(trial.number, problem, list(seen.values()), proposal)
        return Proposal(proposal.placement, "exhausted") if other is None else other

    @abstractmethod
    def propose(self, study: optuna.Study, trial: FrozenTrial, problem: Problem, known: Sequence[Known]) -> Proposal:
        """The next proposal, given the other trials; one already known is replaced by a new one."""

    def known(self, study: optuna.Study, trial: FrozenTrial | None = None) -> list[Known]:
        """The other trials that have a placement, by number, including failed ones, which are not retried."""
        found = []
        for one in study.get_trials(deepcopy=False):
            if one.state == TrialState.WAITING or (trial is not None and one.number == trial.number):
                continue
            key = (study.study_name, one.number)
            if key not in self._decoded:
                placement = self.parameters.placement(one.params)
                if placement is None:
                    continue
                self._decoded[key] = placement
            found.append(Known(one, self._decoded[key]))
        return found

    def prelude(self, problem: Problem) -> list[Proposal]:
        """The first proposals of a study: the unmodified model, optima of the gain table, the papers' placements, random ones.

        Raises `InfeasibleError` if nothing is within the budgets.
        """
        key = problem.limits.tobytes()
        if key in self._begun:
            return self._begun[key]
        found: list[Proposal] = []
        original = np.zeros(problem.shape[0], dtype=np.int64)
        if problem.feasible(original)[0]:
            found.append(Proposal(original, "original"))
        distance = max(1, problem.shape[0] // 10)
        for placement in diverse(problem, self.gains.gain, self._begin_with["optimum"], distance=distance, gap=1e-4):
            found.append(Proposal(placement, "optimum"))
        found += [Proposal(one, "paper") for one in published(self.space, problem)]
        rng = np.random.default_rng(derived_seed(self.seed, "prelude"))
        for _ in range(self._begin_with["random"]):
            drawn = random_placement(problem, rng)
            if drawn is not None:
                found.append(Proposal(drawn, "random"))
        if not found:
            raise InfeasibleError("no placement is within the budgets")
        first: dict[bytes, Proposal] = {}
        for one in found:
            first.setdefault(one.placement.tobytes(), one)
        self._begun = {key: list(first.values())}
        return self._begun[key]

    def _another(self, number: int, problem: Problem, seen: Sequence[Ints], near: Proposal) -> Proposal | None:
        """An unseen proposal to replace one already seen; None if the space seems exhausted."""
        known = {placement.tobytes() for placement in seen}
        rng = self.rng(number, "another")
        for _ in range(_DRAWS):
            noisy = self._scaled * rng.lognormal(0.0, 0.3, self._scaled.shape)
            placement = optimum(problem, noisy, cuts=[Cut(near.placement)], gap=DECODE_GAP, rough=True)
            if placement is None:
                return None
            if placement.tobytes() not in known:
                return Proposal(placement, "unseen")
        rng = self.rng(number, "unseen")
        for _ in range(_TRIES):
            placement = random_placement(problem, rng)
            if placement is not None and placement.tobytes() not in known:
                return Proposal(placement, "unseen")
        placement = optimum(problem, self.gains.gain, cuts=[Cut(one) for one in seen], gap=DECODE_GAP, rough=True)
        return None if placement is None else Proposal(placement, "unseen")

    def rng(self, number: int, what: str) -> np.random.Generator:
        """The random generator of a trial."""
        return np.random.default_rng(derived_seed(self.seed, number, what))


class PlacementSampler(BudgetedSampler):
    """Thompson sampling under budgets: a draw from the posterior over the gains, decoded by an integer program.

    The first objective is measured. Further ones are costs, named in order by `resources` ("flops", "params", "memory") and
    minimized: they are known exactly, so every proposal instead draws a limit for each of them, between the costs of the cheapest
    and the most expensive trials. Arguments as for `BudgetedSampler`.

    Raises:
        ConfigError: while sampling, for a study with other objectives.
    """

    name = "posterior"

    def __init__(
        self,
        space: Space,
        costs: "Gate | Problem",
        gains: GainTable | None = None,
        *,
        resources: Sequence[str] = (),
        seed: int = 0,
        optima: int = 4,
        random: int = 3,
    ) -> None:
        super().__init__(space, costs, gains, seed=seed, optima=optima, random=random)
        self.resources = tuple(resources)
        for name in self.resources:
            if name not in self.problem.names:
                raise ConfigError(
                    f"there is no resource {name!r}; there are {', '.join(dict.fromkeys(self.problem.names))}"
                )

    def propose(self, study: optuna.Study, trial: FrozenTrial, problem: Problem, known: Sequence[Known]) -> Proposal:
        self._check(study)
        rng = self.rng(trial.number, "posterior")
        sign = 1.0 if study.directions[0] == StudyDirection.MAXIMIZE else -1.0
        done = [one for one in known if one.trial.state == TrialState.COMPLETE and math.isfinite(one.trial.values[0])]
        placements = [one.placement for one in done]
        if len(done) < 2:
            placement = random_placement(problem, rng)
        else:
            posterior = Posterior(self.space, self.gains, placements, [sign * one.trial.values[0] for one in done])
            gains = posterior.draw(rng, _SPREAD)
            # a measured placement would teach nothing; if nothing else is left, the caller notices
            cuts = [Cut(one) for one in {one.tobytes(): one for one in placements}.values()]
            placement = None
            for tried in (self._limited(problem, placements, rng), problem):
                if placement is None and tried is not None:
                    placement = optimum(tried, gains, cuts=cuts, gap=DECODE_GAP, rough=True)
            if placement is None:
                placement = optimum(problem, gains, gap=DECODE_GAP, rough=True)
        if placement is None:
            raise InfeasibleError("no placement is left within the budgets")
        return Proposal(placement, self.name)

    def _check(self, study: optuna.Study) -> None:
        wanted = [StudyDirection.MINIMIZE] * len(self.resources)
        if study.directions[1:] != wanted:
            told = ", ".join(one.name.lower() for one in study.directions)
            raise ConfigError(
                f"PlacementSampler takes one measured objective followed by the costs in resources=, minimized: "
                f"{', '.join(self.resources) or 'none are named'}; the study's directions are {told}"
            )

    def _limited(self, problem: Problem, placements: Sequence[Ints], rng: np.random.Generator) -> Problem | None:
        """The problem with a drawn limit for every resource that is an objective; None if there is none."""
        if not self.resources:
            return None
        limits: dict[str, int | None] = {}
        for name in self.resources:
            costs = [problem.costs(one)[name] for one in placements]
            drawn = int(rng.uniform(min(costs), max(costs)))
            limit = problem.limit(name)
            limits[name] = drawn if limit is None else min(drawn, limit)
        return problem.limited(limits)
