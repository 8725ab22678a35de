"""A worker of a search: resume, propose, gate, evaluate, record; until there are enough trials, time is up, or Ctrl-C."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from surgeon.errors import ConfigError, TrainingError
from surgeon.search.evaluate.evaluator import Evaluator, OutOfMemoryError, StoppedError
from surgeon.search.gains.gain import GainTable
from surgeon.search.gate import Gate
from surgeon.search.placement.problem import InfeasibleError, Ints, Problem
from surgeon.search.sampling.sampler import ExhaustedError
from surgeon.search.sampling.tuners import make_sampler
from surgeon.search.space import Space
from surgeon.search.study.journal import StudyError
from surgeon.search.study.record import Record
from surgeon.search.study.stop import Stop, on_interrupt
from surgeon.search.study.study import Study

MAX_ATTEMPTS = 3  # a trial whose worker died this many times is abandoned
_REFUSALS = 20  # in a row, after which the table is considered unable to meet the budgets


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Options of a search. `trials` counts evaluations of different placements over all workers; `max_time` seconds of this worker.

    `sampler` is a name (`search.sampling.tuners`). `resources` are costs used as objectives in addition to the evaluator's: flops,
    params, memory.
    """

    trials: int = 60
    sampler: str = "posterior"
    resources: tuple[str, ...] = ()
    seed: int = 0
    rung: int = 0
    max_time: float | None = None
    optima: int = 4
    random: int = 3

    def __post_init__(self) -> None:
        for name in ("trials", "optima"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_time is not None and self.max_time <= 0:
            raise ConfigError(f"--max-time must be positive, got {self.max_time}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Why a worker stopped ("trials", "time", "interrupted", "exhausted"), its work, and the study's best so far."""

    stopped: str
    evaluated: int
    best: Record | None


class _LeaveError(Exception):
    """The evaluation stops here: the trial stays open and will be resumed."""


class _PrunedError(Exception):
    """Optuna's pruner ended the evaluation."""


class _TakenError(Exception):
    """This worker was silent for so long that another one took over its trial: its result is no longer needed."""


@dataclass
class _Claim:
    """A trial that this worker is to evaluate."""

    trial: optuna.Trial
    placement: Ints
    reported: dict[int, float] = field(default_factory=dict)  # by the worker that started it


class Search:
    """One worker's view of a search. `costs` is the budget gate, or a problem if nothing needs to be traced."""

    def __init__(
        self,
        file: Study,
        space: Space,
        gains: GainTable,
        evaluator: Evaluator,
        costs: Gate | Problem,
        config: SearchConfig,
        *,
        identity: Mapping[str, Any] | None = None,
        pruner: optuna.pruners.BasePruner | None = None,
        progress: Callable[[Record, Record | None], None] | None = None,
    ) -> None:
        self.file, self.space, self.evaluator, self.config = file, space, evaluator, config
        self.gate = costs if isinstance(costs, Gate) else None
        self._problem = None if isinstance(costs, Gate) else costs
        self.sampler = make_sampler(
            config.sampler,
            space,
            costs,
            gains,
            resources=config.resources,
            seed=config.seed,
            optima=config.optima,
            random=config.random,
        )
        self._identity = self._bound_to(gains, identity or {})
        self._pruner, self._progress = pruner, progress

    def _bound_to(self, gains: GainTable, more: Mapping[str, Any]) -> dict[str, Any]:
        problem = self.problem
        costs: dict[str, Any] = {"budgets": {name: problem.limit(name) for name in dict.fromkeys(problem.names)}}
        if self.gate is not None:
            costs = self.gate.identity()
        return {
            **costs,
            **more,
            "space": self.space.to_dict(),
            "evaluator": dict(self.evaluator.identity()),
            "gains": gains.for_space(self.space).to_dict()["gains"],
            "sampler": self.config.sampler,
            "objectives": self.objectives,
            "seed": self.config.seed,
        }

    @property
    def objectives(self) -> list[str]:
        """The direction of every objective and, for a cost, its name."""
        return [*self.evaluator.directions, *(f"minimize {name}" for name in self.config.resources)]

    @property
    def problem(self) -> Problem:
        """The placement problem with the current calibration."""
        if self.gate is not None:
            return self.gate.problem
        assert self._problem is not None
        return self._problem

    def open(self, *, resume: bool = False) -> None:
        """Create the study, or resume it; see `Study.open`. Raises `InfeasibleError` for budgets that nothing meets."""
        if self.gate is not None:
            self.gate.check_feasible()
        self.sampler.prelude(self.problem)
        directions = [one.partition(" ")[0] for one in self.objectives]
        self.file.open(self._identity, directions, self.sampler, self._pruner, resume=resume)

    def run(self) -> Outcome:
        """Work until the end. After Ctrl-C or when time is up, a trial in evaluation stays open for `resume`."""
        limit = self.config.max_time
        stop = Stop(None if limit is None else time.monotonic() + limit)
        evaluated, failures = 0, 0
        with self.file.working(), on_interrupt(stop):
            while stop.reason is None:
                claim = self._next()
                if isinstance(claim, str):
                    return self._outcome(claim, evaluated)
                if claim is None:  # abandoned
                    continue
                try:
                    with self.file.alive(claim.trial):
                        done = self._evaluate(claim, stop)
                    evaluated, failures = evaluated + done, 0
                except (_LeaveError, StoppedError):
                    self._give_back(claim)
                    break
                except KeyboardInterrupt:
                    self._give_back(claim)
                    raise
                except _TakenError:
                    continue
                except StudyError:
                    raise
                except TrainingError as error:
                    failures += 1
                    self._fail(claim, error)
                    if failures >= MAX_ATTEMPTS:
                        raise
                except Exception as error:
                    self._fail(claim, error)
                    raise
        return self._outcome(stop.reason or "interrupted", evaluated)

    def _give_back(self, claim: _Claim) -> None:
        """Leave a trial open for other workers: a requested stop does not count as a failed attempt."""

        def write() -> None:
            with self.file.exclusive():
                attributes = self.file.trials()[claim.trial.number].user_attrs
                if attributes.get("worker") == self.file.worker:
                    claim.trial.set_user_attr("attempts", int(attributes["attempts"]) - 1)

        self.file.patiently(write)

    def _outcome(self, stopped: str, evaluated: int) -> Outcome:
        return Outcome(stopped=stopped, evaluated=evaluated, best=self.file.best())

    # --- what next ------------------------------------------------------------------------------------------------

    def _next(self) -> _Claim | str | None:
        """A trial to evaluate; None if one was abandoned; otherwise the reason to stop."""
        with self.file.exclusive():
            self._learn()
            orphans = self.file.orphans()
            if orphans:
                return self._take_up(orphans[0])
            records = self.file.records()
            busy = sum(one.state == "running" for one in records)
            if sum(one.counts for one in records) + busy >= self.config.trials:
                return "trials"
            if len(records) >= _REFUSALS and all(one.state == "refused" for one in records[-_REFUSALS:]):
                raise InfeasibleError(
                    f"the last {_REFUSALS} proposals were over budget by a whole trace: {records[-1].attributes['refused']}"
                )
            return self._prepare(self.file.ask())

    def _learn(self) -> None:
        found = self.file.calibration
        if self.gate is not None and found is not None:
            self.gate.recalibrate(found)

    def _take_up(self, orphan: FrozenTrial) -> _Claim | str | None:
        trial = self.file.take_up(orphan)
        if int(trial.user_attrs["attempts"]) > MAX_ATTEMPTS:
            trial.set_user_attr("error", f"its worker died {MAX_ATTEMPTS} times")
            self.file.study.tell(trial, state=TrialState.FAIL)
            return None
        claim = self._prepare(trial)
        if isinstance(claim, _Claim):
            claim.reported = dict(orphan.intermediate_values)
        return claim

    def _prepare(self, trial: optuna.Trial) -> _Claim | str:
        """The trial with its placement, or the reason to stop if there is none left."""
        started = time.perf_counter()
        fresh = "placement" not in trial.user_attrs
        try:
            placement = self.sampler.suggest(trial)
        except ExhaustedError as error:
            self.file.end(trial, f"{error}{self._beyond()}")
            return "exhausted"
        if fresh:
            trial.set_user_attr("proposal_seconds", time.perf_counter() - started)
        return _Claim(trial, placement)

    def _beyond(self) -> str:
        """The nearest budgets with a replacement if none was within these, as the end of a sentence."""
        if self.gate is None or any(one.placement and one.counts for one in self.file.records()):
            return ""
        near = self.gate.nearest_replacement()
        return ", and none replaces a layer" + ("" if near is None else f": the nearest that does needs {near}")

    # --- evaluation -----------------------------------------------------------------------------------------------

    def _evaluate(self, claim: _Claim, stop: Stop) -> bool:
        """Gate and evaluate; True if there was an evaluation."""
        started = time.perf_counter()
        costs = self.problem.costs(claim.placement)
        if self.gate is None and not self.problem.feasible(claim.placement)[0]:  # enqueued by a user
            self._refuse(claim, ["it is over budget"])
            return False
        if self.gate is not None:
            verdict = self.gate.check(claim.placement)
            self.file.patiently(lambda: claim.trial.set_user_attr("traced", dict(verdict.traced)))
            if not verdict.fits:
                with self.file.exclusive():
                    self.file.keep_calibration(self.gate.refused(verdict))
                self._refuse(claim, list(verdict.reasons))
                return False
            costs = dict(verdict.traced)
        state, values = TrialState.COMPLETE, None
        try:
            values = _listed(self.evaluator.evaluate(claim.placement, self._report(claim, stop), self.config.rung))
        except _PrunedError:
            state = TrialState.PRUNED
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            self._out_of_memory(claim, error)
            return False
        if values is not None:
            values += [float(costs[name]) for name in self.config.resources]
        if values is not None and not np.isfinite(values).all():
            raise TrainingError(f"trial {claim.trial.number} has no finite value: {values}")
        told = {"seconds": time.perf_counter() - started}
        if self.evaluator.start is not None:
            told["start"] = self.evaluator.start
        if values is not None and self.evaluator.loss is not None:
            told["loss"] = self.evaluator.loss
        return self._tell(claim, values, state, told)

    def _report(self, claim: _Claim, stop: Stop) -> Callable[[int, float], None]:
        single = len(self.objectives) == 1  # with several objectives Optuna accepts no reports
        prunable = single and claim.placement.any()  # the unmodified model is the baseline of all others

        def report(step: int, value: float) -> None:
            if single and step not in claim.reported:
                try:
                    self.file.patiently(lambda: claim.trial.report(value, step))
                except optuna.exceptions.UpdateFinishedTrialError as error:
                    raise _TakenError from error
                claim.reported[step] = value
            if stop.reason is not None:
                raise _LeaveError
            answers: list[bool] = []
            if prunable:
                self.file.patiently(lambda: answers.append(claim.trial.should_prune()))
            if any(answers):
                raise _PrunedError

        return report

    def _out_of_memory(self, claim: _Claim, error: Exception) -> None:
        memory = error.memory if isinstance(error, OutOfMemoryError) else _device_memory()
        if self.gate is not None:
            with self.file.exclusive():
                self._learn()
                self.file.keep_calibration(self.gate.out_of_memory(claim.placement, memory))
        self._refuse(claim, ["out of memory at run time"])

    def _refuse(self, claim: _Claim, reasons: list[str]) -> None:
        self._tell(claim, None, TrialState.PRUNED, {"refused": reasons}, {"budget": 1.0})

    def _fail(self, claim: _Claim, error: Exception) -> None:
        self._tell(claim, None, TrialState.FAIL, {"error": f"{type(error).__name__}: {error}"})

    def _tell(
        self,
        claim: _Claim,
        values: list[float] | None,
        state: TrialState,
        attributes: Mapping[str, Any],
        constraints: Mapping[str, float] | None = None,
    ) -> bool:
        """Finish the trial; False if another worker took it over meanwhile."""
        told = self.file.tell(claim.trial, values, state, attributes, constraints)
        if told and self._progress is not None:
            self._progress(self.file.records()[claim.trial.number], self.file.best())
        return told


def _listed(values: Any) -> list[float]:
    return [float(v) for v in values] if isinstance(values, list | tuple) else [float(values)]


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def _device_memory() -> int | None:
    """Bytes of this machine's CUDA device."""
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
