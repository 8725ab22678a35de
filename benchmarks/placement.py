"""Placement: speed of the integer program and of proposals, budgets that hold, and the modes of search compared.

    python -m benchmarks.placement [--parts milp gate samplers overhead modes] [--proposals 10000] [--seeds 2] [--trials 100]

`milp` solves random problems of 100 layers × 8 options × 2 budgets. `gate` makes proposals under random budgets in three models,
adds them up independently of the code that made them, sends as many placements over budget to the gate, and fully traces a
sample. `samplers` makes as many proposals with every sampler, ours and Optuna's TPE by its name, in studies of 50 trials under
random budgets, and counts what was trained over budget. `overhead` is a whole trial without its training. `modes` compares
samplers on a synthetic space of 50 layers × 6 options, whose gains add up within a stage and then saturate, with gain tables of
different quality; percent of the best known.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import timm
from scipy.stats import spearmanr

from benchmarks._results import RESULTS, table, write_json
from surgeon.costs.table import Option
from surgeon.search.budget import Budgets
from surgeon.search.evaluate.evaluator import TableEvaluator
from surgeon.search.gains.gain import GainTable
from surgeon.search.gate import Gate
from surgeon.search.placement.draw import random_placement, repair
from surgeon.search.placement.place import gain_of, optimum
from surgeon.search.placement.problem import Floats, Ints, Problem, make_problem
from surgeon.search.run import Search, SearchConfig
from surgeon.search.sampling.tuners import NAMES, DecoderSampler
from surgeon.search.space import Space
from surgeon.search.study.study_file import StudyFile

MODELS = ("resnet50", "convnext_atto", "efficientnet_b0")
PARTS = ("milp", "gate", "samplers", "overhead", "modes")
SAMPLERS = (*NAMES, "optuna.samplers:TPESampler")
NOISES = (0.5, 2.0)  # of the gain table, relative to the spread of the true gains


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--proposals", type=int, default=10_000, metavar="N", help="over all models")
    parser.add_argument("--traces", type=int, default=20, metavar="N", help="whole traces a model")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--trials", type=int, default=100, metavar="N", help="of every search in `modes`")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found: dict[str, list[dict[str, Any]]] = {}
    if "milp" in args.parts:
        found["milp"] = [milp_times(10)]
    if "gate" in args.parts:
        share = -(-args.proposals // len(args.models))
        found["gate"] = [gate(name, share, args.traces) for name in args.models]
    if "samplers" in args.parts:
        found["samplers"] = [count_over(name, args.proposals) for name in SAMPLERS]
    if "overhead" in args.parts:
        found["overhead"] = [overhead(mode) for mode in NAMES]
    if "modes" in args.parts:
        found["modes"] = compare_modes(args.seeds, args.trials)
    for part, rows in found.items():
        print(f"\n{part}")
        table(list(rows[0]), [list(row.values()) for row in rows])
    path = args.results / "placement.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, {part: earlier[part] for part in PARTS if part in earlier} | found)
    print(f"\nwritten: {path}, where parts that were not run stay as they are")
    counted = [*found.get("gate", []), *found.get("samplers", [])]
    return 0 if all(row["over_budget"] == 0 for row in counted) else 1


# --- speed --------------------------------------------------------------------------------------------------------


def random_problem(seed: int, layers: int, options: int, room: float = 0.3) -> tuple[Problem, Floats]:
    """Two additive budgets, gains and costs drawn independently, room for a share of what all options cost on average."""
    rng = np.random.default_rng(seed)
    shape = (layers, options)
    costs = {name: rng.exponential(1e7, shape).astype(np.int64) for name in ("flops", "params")}
    gains = rng.exponential(1.0, shape)
    for values in (*costs.values(), gains):
        values[:, 0] = 0
    limits = {name: int(values[:, 1:].mean() * layers * room) for name, values in costs.items()}
    allowed = np.ones(shape, dtype=np.bool_)
    return make_problem(allowed, costs, dict.fromkeys(costs, 0), limits), gains


def milp_times(count: int) -> dict[str, Any]:
    """CPU seconds of optima of 100 layers × 8 options beside "keep" × 2 budgets, proved to 1e-4, and rough ones for proposals."""
    seconds: dict[str, list[float]] = {"exact": [], "rough": []}
    lost = []
    for seed in range(count):
        problem, gains = random_problem(seed, 100, 9)
        values = {}
        for name, gap in (("exact", 1e-4), ("rough", 5e-3)):
            start = time.process_time()  # the machine may be shared
            found = optimum(problem, gains, gap=gap, rough=name == "rough")
            seconds[name].append(time.process_time() - start)
            assert found is not None
            values[name] = gain_of(gains, found)
        lost.append(1 - values["rough"] / values["exact"])
    return {
        "problems": count,
        "exact_median_cpu_s": float(np.median(seconds["exact"])),
        "exact_max_cpu_s": max(seconds["exact"]),
        "rough_median_cpu_s": float(np.median(seconds["rough"])),
        "rough_max_cpu_s": max(seconds["rough"]),
        "rough_worst_loss": max(lost),
    }


def overhead(mode: str, trials: int = 60) -> dict[str, Any]:
    """Seconds of a trial in resnet50's space without gate and training: proposal, locks, what is written."""
    gate = Gate(timm.create_model("resnet50"), None, Budgets.parse(flops="+10%", memory="+10%"), batch_size=32)
    gains = random_gains(gate.space, 0)
    with tempfile.TemporaryDirectory() as folder:
        evaluator = TableEvaluator(gate.space, lambda placement: [gain_of(gains.gain, placement)])
        config = SearchConfig(trials=trials, sampler=mode)
        search = Search(StudyFile(Path(folder) / "study"), gate.space, gains, evaluator, gate.problem, config)
        search.open()
        start = time.perf_counter()
        search.run()
        whole = time.perf_counter() - start
        made = [one.attributes.get("proposal_seconds") for one in search.file.records()]
    proposals = [value for value in made if value is not None]
    return {
        "mode": mode,
        "trials": len(made),
        "proposal_median_s": float(np.median(proposals)),
        "proposal_max_s": max(proposals),
        "trial_mean_s": whole / len(made),
    }


def random_gains(space: Space, seed: int) -> GainTable:
    """Gains out of thin air: what matters here is time."""
    gain = np.where(space.allowed, np.random.default_rng(seed).exponential(1.0, space.allowed.shape), 0.0)
    gain[:, 0] = 0.0
    return GainTable(layers=space.layers, options=space.labels, gain=gain, error=gain * 0.2, estimator="random")


# --- budgets ------------------------------------------------------------------------------------------------------


def gate(name: str, count: int, traces: int) -> dict[str, Any]:
    """Proposals under random budgets: how many are over one of them, by sums that no proposal code has made."""
    found = Gate(timm.create_model(name), None, Budgets(), batch_size=32)
    space, base = found.space, found.original
    gains = random_gains(space, 1)
    sampler = DecoderSampler(space, found, gains)
    rng = np.random.default_rng(2)
    over, refused, wild_over, errors, traced_over, passed = 0, 0, 0, [], 0, 0
    start = time.perf_counter()
    for number in range(count):
        found.rebudget(random_budgets(base, rng))
        problem = found.problem
        wild = np.array([rng.choice(np.flatnonzero(row)) for row in space.allowed])
        placement = propose(number, sampler, problem, gains.gain, wild, rng)
        over += not within(found, placement)
        if not within(found, wild):
            wild_over += 1
            refused += not bool(problem.feasible(wild)[0])
        if number % max(count // traces, 1) == 0:
            verdict = found.check(placement)
            errors.append(verdict.error)
            passed += verdict.fits
            limits = found.budgets.limits(base, found.calibration)
            memory = found.budgets.memory_limit(base, found.calibration) or 0
            inside = verdict.traced["needed"] <= memory and all(
                verdict.traced[key] <= (limits[key] or 0) for key in ("flops", "params")
            )
            traced_over += verdict.fits and not inside
    return {
        "model": name,
        "layers": len(space.layers),
        "proposals": count,
        "over_budget": over + traced_over,
        "wild_over": wild_over,
        "wild_refused": refused,
        "traced": len(errors),
        "passed": passed,
        "worst_error": max(errors),
        "seconds": time.perf_counter() - start,
    }


def propose(
    number: int, sampler: DecoderSampler, problem: Problem, gains: Floats, wild: Ints, rng: np.random.Generator
) -> Ints:
    """Every tenth decoded, three of ten repaired, the others random."""
    if number % 10 == 0:
        stages = {f"stage:{stage or 'elsewhere'}": rng.uniform(-2, 2) for stage in sampler.space.stages}
        types = {f"type:{kind}": rng.uniform(-2, 2) for kind in sampler.space.types[1:]}
        rest = {"exponent": rng.uniform(0, 2), "optimism": rng.uniform(-1, 1), "use": rng.uniform(0.3, 1)}
        placement = sampler.decode(problem, stages | types | rest)
    elif number % 10 < 4:
        placement = repair(problem, wild, gains)
    else:
        placement = random_placement(problem, rng)
    assert placement is not None
    return placement


def random_budgets(base: Any, rng: np.random.Generator) -> Budgets:
    """All three budgets, each with little or much room above the original."""
    room = 10 ** rng.uniform(-3, 0, 3) * 100
    return Budgets.parse(flops=f"+{room[0]:.3f}%", params=f"+{room[1]:.3f}%", memory=f"+{room[2]:.3f}%")


def within(gate: Gate, placement: Ints) -> bool:
    """By the cost table's own look-up, in floating point, and the budgets as they were given."""
    totals, base = gate.table.look_up(placement), gate.original
    limits = gate.budgets.limits(base, gate.calibration)
    reserve = sum(base.reserve.values())
    needed = gate.calibration.needed(float(totals.peak_bytes[0]), reserve)
    return bool(
        totals.flops[0] <= (limits["flops"] or 0)
        and totals.params[0] <= (limits["params"] or 0)
        and needed <= (gate.budgets.memory_limit(base, gate.calibration) or 0) + 1  # both are rounded
    )


def count_over(name: str, count: int, trials: int = 50) -> dict[str, Any]:
    """Proposals of a sampler in small spaces: how many were trained over budget, by sums that no proposal code has made."""
    made, over, repeated, seed = 0, 0, 0, 0
    start = time.process_time()
    while made < count:
        rng = np.random.default_rng(seed)
        case = Synthetic(seed, NOISES[0], layers=8, stages=2, climbs=0)
        limits = {key: int(rng.uniform(0.1, 1.0) * 8 * 1e6) for key in ("flops", "params")}
        problem = case.problem.limited(limits)
        trained = []

        def value(placement: Ints, case: Synthetic = case, trained: list[Ints] = trained) -> list[float]:
            trained.append(placement)
            return [case.value(placement)]

        with tempfile.TemporaryDirectory() as folder:
            config = SearchConfig(trials=min(trials, count - made), sampler=name, seed=seed)
            evaluator = TableEvaluator(case.space, value)
            search = Search(StudyFile(Path(folder) / "study"), case.space, case.gains, evaluator, problem, config)
            search.open()
            search.run()
        for placement in trained:
            costs = {key: sum(int(c[i, j]) for i, j in enumerate(placement)) for key, c in case.costs.items()}
            over += any(costs[key] > limit for key, limit in limits.items())
        repeated += len(trained) - len({one.tobytes() for one in trained})
        made, seed = made + len(trained), seed + 1
    return {
        "sampler": name,
        "proposals": made,
        "studies": seed,
        "over_budget": over,
        "repeated": repeated,
        "cpu_seconds": time.process_time() - start,
    }


# --- modes --------------------------------------------------------------------------------------------------------


class Synthetic:
    """50 layers in five stages, 6 options beside "keep"; gains add up within a stage and saturate there."""

    def __init__(self, seed: int, noise: float, layers: int = 50, stages: int = 5, climbs: int = 3) -> None:
        rng = np.random.default_rng(seed)
        options = [Option(kind, {"size": size}) for kind in ("acda", "pafu", "sekg") for size in (1, 2)]
        shape = (layers, len(options) + 1)
        self.stage = np.arange(layers) * stages // layers
        self.space = Space(
            layers=tuple(f"layer{i}" for i in range(layers)),
            stages=tuple(f"stage{k}" for k in self.stage),
            options=tuple(options),
            allowed=np.ones(shape, dtype=np.bool_),
        )
        self.true = rng.normal(0.3, 1.0, shape)
        costs = {name: rng.exponential(1e6, shape).astype(np.int64) for name in ("flops", "params")}
        for values in (self.true, *costs.values()):
            values[:, 0] = 0
        self.costs = costs
        limits = {name: int(values.mean() * layers * 0.35) for name, values in costs.items()}
        self.problem = make_problem(self.space.allowed, costs, dict.fromkeys(costs, 0), limits)
        guess = self.true + noise * rng.normal(size=shape)
        guess[:, 0] = 0.0
        error = np.full(shape, noise)
        error[:, 0] = 0.0
        self.gains = GainTable(
            layers=self.space.layers, options=self.space.labels, gain=guess, error=error, estimator="synthetic"
        )
        self.rank = float(spearmanr(guess[:, 1:].ravel(), self.true[:, 1:].ravel()).statistic)
        self.best = max((self.climb(seed * 100 + k) for k in range(climbs)), default=0.0)

    def value(self, placement: Ints) -> float:
        """Every stage's sum of gains, saturating at about 12."""
        own = self.true[np.arange(len(placement)), placement]
        sums = np.array([own[self.stage == k].sum() for k in range(self.stage[-1] + 1)])
        return float(np.where(sums > 0, 12 * (1 - np.exp(-np.maximum(sums, 0) / 12)), sums).sum())

    def climb(self, seed: int) -> float:
        """Best-known value: from the optimum of the true gains, by feasible changes of one or two layers."""
        rng = np.random.default_rng(seed)
        placement = optimum(self.problem, self.true)
        assert placement is not None
        best = self.value(placement)
        for _ in range(4000):
            trial = placement.copy()
            for layer in rng.choice(len(trial), size=rng.integers(1, 3), replace=False):
                trial[layer] = rng.integers(0, self.problem.shape[1])
            if self.problem.feasible(trial)[0] and self.value(trial) > best:
                placement, best = trial, self.value(trial)
        return best


def compare_modes(seeds: int, trials: int) -> list[dict[str, Any]]:
    """Per cent of the best known value after 20 trials and after all, for every mode and quality of the gain table."""
    rows = []
    for noise in NOISES:
        cases = [Synthetic(seed, noise) for seed in range(seeds)]
        for mode in ("raw tpe", *NAMES):
            curves = [run_mode(case, mode, trials, seed) for seed, case in enumerate(cases)]
            early = [
                100 * curve[min(19, len(curve) - 1)] / case.best for curve, case in zip(curves, cases, strict=True)
            ]
            late = [100 * curve[-1] / case.best for curve, case in zip(curves, cases, strict=True)]
            rows.append(
                {
                    "rank_correlation": float(np.mean([case.rank for case in cases])),
                    "mode": mode,
                    "after_20": float(np.median(early)),
                    "after_all": float(np.median(late)),
                    "lowest": min(late),
                    "highest": max(late),
                }
            )
            print(f"{noise} {mode}: {rows[-1]['after_all']:.0f} %", file=sys.stderr, flush=True)
    return rows


def run_mode(case: Synthetic, mode: str, trials: int, seed: int) -> Floats:
    """Best value so far by trial; what an ordinary tuner does is "raw tpe": no repair, no gain table, budgets as constraints."""
    if mode == "raw tpe":
        return np.maximum.accumulate(_raw_tpe(case, trials, seed))
    with tempfile.TemporaryDirectory() as folder:
        evaluator = TableEvaluator(case.space, lambda placement: [case.value(placement)])
        config = SearchConfig(trials=trials, sampler=mode, seed=seed)
        search = Search(StudyFile(Path(folder) / "study"), case.space, case.gains, evaluator, case.problem, config)
        search.open()
        search.run()
        values = [one.values[0] for one in search.file.records() if one.counts and one.values]
    return np.maximum.accumulate(np.array(values))


def _raw_tpe(case: Synthetic, trials: int, seed: int) -> Floats:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
    values = []
    for _ in range(trials):
        trial = study.ask()
        layers = case.space.layers
        placement = np.array([trial.suggest_categorical(layer, list(range(case.problem.shape[1]))) for layer in layers])
        totals, limits = case.problem.totals(placement)[0], case.problem.limits
        trial.set_constraint("budget", float((totals / limits - 1).max()))
        study.tell(trial, case.value(placement))
        values.append(case.value(placement) if (totals <= limits).all() else 0.0)
    return np.array(values)


if __name__ == "__main__":
    sys.exit(main())
