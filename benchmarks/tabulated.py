"""How much of the optimum of an exhaustively measured space does a search find in few trials?

    python -m benchmarks.tabulated [--training all|new] [--trials 20] [--seeds 20] [--gains NAME …]

The space is that of `benchmarks.fine_tunes` (results/fine_tunes.json or fine_tunes-new.json): every placement of 4 options in 4
layers of the trained CIFAR ResNet-20, each a real short fine-tune. Searches look values up. They use a gain table:
that of every estimator in results/gain_tables.json (or -new), and "uniform", without any information. "posterior" is what `surgeon
search` does by default; "optimize" is an ordinary `study.optimize` with the same `PlacementSampler` and an objective of the user's
own. For comparison, ordinary tuners without table, repair and start: raw categorical TPE, raw NSGA-II (budgets as
constraints, an infeasible trial is a trial), and random feasible placements.

`found` is the share of the optimum's gain over the unmodified network, trained equally, in percent; the median over the seeds.
Once without a budget, once under the FLOPs budget that half of the placements meet. Writes benchmarks/results/tabulated.json
(tabulated-new.json).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from tqdm import tqdm

from benchmarks._results import RESULTS, table, write_json
from benchmarks.fine_tunes import OPTIONS, TRAININGS, sized
from surgeon.costs import cost_table
from surgeon.search.evaluate.evaluator import TableEvaluator
from surgeon.search.gains.gain import GainTable, uniform_gains
from surgeon.search.placement.problem import Problem, of_table
from surgeon.search.run import Search, SearchConfig
from surgeon.search.sampling.sampler import PlacementSampler
from surgeon.search.sampling.tuners import NAMES
from surgeon.search.space import Space, SpaceConfig, make_space
from surgeon.search.study.study_file import StudyFile
from surgeon.sites.sites import find_sites
from surgeon.zoo import create

RAW = ("raw tpe", "raw nsga2", "raw random")
ALONE = "optimize"  # study.optimize with PlacementSampler and an objective of the user's own
ENOUGH = 95.0  # per cent of the optimum's gain


@dataclass(frozen=True)
class Case:
    """A tabulated space under a budget: values by placement (higher is better), and the best of them."""

    name: str
    space: Space
    problem: Problem
    values: Mapping[tuple[int, ...], float]

    @property
    def original(self) -> float:
        return self.values[(0,) * len(self.space.layers)]

    def feasible(self) -> list[tuple[int, ...]]:
        """All placements within the budget."""
        every = list(self.values)
        return [one for one, fits in zip(every, self.problem.feasible(np.array(every)), strict=True) if fits]

    @property
    def best(self) -> float:
        return max(self.values[one] for one in self.feasible())

    def found(self, value: float) -> float:
        """Per cent of the optimum's gain over the original."""
        room = self.best - self.original
        return 100 * (value - self.original) / room if room > 0 else 100.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, metavar="N")
    parser.add_argument("--seeds", type=int, default=20, metavar="N")
    parser.add_argument(
        "--modes", nargs="+", choices=(*NAMES, ALONE, *RAW), default=(*NAMES, ALONE, *RAW), metavar="MODE"
    )
    parser.add_argument("--training", choices=tuple(TRAININGS), default="all", help="default: %(default)s")
    parser.add_argument("--gains", nargs="+", metavar="NAME", help="estimators (default: all that are there)")
    parser.add_argument("--from", type=Path, default=RESULTS, dest="folder", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    truth, tables, name = (f"{sized(one, args.training)[1]}.json" for one in ("fine_tunes", "gain_tables", "tabulated"))
    if not (args.folder / truth).is_file():
        print(f"there is no {args.folder / truth}: python -m benchmarks.fine_tunes makes it", file=sys.stderr)
        return 2
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    content = json.loads((args.folder / truth).read_text())
    space, values = read_table(content)
    missing = int(np.prod(space.allowed.sum(axis=1))) - len(values)
    if missing:
        print(
            f"{args.folder / truth} has not {missing} of the placements: python -m benchmarks.fine_tunes",
            file=sys.stderr,
        )
        return 2
    cases = make_cases(space, values)
    rows = []
    work = [
        (case, *arm) for case in cases for arm in arms(args.modes, gain_tables(args.folder / tables, space, args.gains))
    ]
    for case, mode, gains in tqdm(work, desc="arms", disable=None):
        rows.append(compare(case, mode, gains, args.trials, args.seeds))
    headers = list(rows[0])
    table(headers, [list(row.values()) for row in rows])
    spaces = [{"case": case.name, "placements": len(case.feasible()), **outline(case)} for case in cases]
    table(list(spaces[0]), [list(one.values()) for one in spaces])
    path = args.results / name
    write_json(path, {"trials": args.trials, "seeds": args.seeds, "cases": spaces, "rows": rows})
    print(f"written: {path}")
    return 0


# --- the space ----------------------------------------------------------------------------------------------------


def read_table(content: Mapping[str, Any]) -> tuple[Space, dict[tuple[int, ...], float]]:
    """The space of the exhaustive part, and minus the loss of every placement in it."""
    model = create("resnet20_cifar").eval()
    layers = content["settings"]["layers"]["space"]
    sites = find_sites(model, input_size=(3, 32, 32)).convs
    space = make_space(model, SpaceConfig(options=OPTIONS, layers=",".join(layers)), sites=sites)
    values = {}
    for row in content["rows"]:
        if row["seed"] == 0 and set(row["placement"]) <= set(layers):
            values[tuple(int(j) for j in space.placement(row["placement"]))] = -float(row["loss"])
    return space, values


def make_cases(space: Space, values: Mapping[tuple[int, ...], float]) -> list[Case]:
    """Without a budget, and with one that half of the placements meet."""
    model = create("resnet20_cifar").eval()
    costs = cost_table(model, list(space.options), layers=space.selection, input_size=(3, 32, 32))
    free = of_table(costs, {})
    flops = [free.costs(one)["flops"] for one in values]
    return [
        Case("no budget", space, free, values),
        Case("FLOPs of the median", space, free.limited({"flops": int(np.median(flops))}), values),
    ]


def outline(case: Case) -> dict[str, Any]:
    """What the space is like: the original, the optimum, and where the original stands among all."""
    feasible = [case.values[one] for one in case.feasible()]
    better = float(np.mean([value > case.original for value in feasible]))
    limit = case.problem.limit("flops")
    return {
        "flops_limit": None if limit is None else limit / int(case.problem.base[case.problem.of("flops")][0]),
        "original_loss": -case.original,
        "optimum_loss": -case.best,
        "better_than_original": better,
    }


def gain_tables(path: Path, space: Space, names: Sequence[str] | None) -> dict[str, GainTable]:
    """By name: "uniform", and the estimators' where they were made for these layers."""
    found = {"uniform": uniform_gains(space)}
    if path.is_file():
        for name, values in json.loads(path.read_text())["tables"].items():
            found[name] = replace(GainTable.from_dict(values, name).for_space(space), estimator=name)
    else:
        print(
            f'there is no {path}, only "uniform" is compared: python -m benchmarks.gain_methods makes it',
            file=sys.stderr,
        )
    return found if names is None else {name: found[name] for name in names}


def arms(modes: Sequence[str], tables: Mapping[str, GainTable]) -> Iterator[tuple[str, GainTable | None]]:
    """(mode, gain table) of all searches; raw ones have no table, and "random" needs none."""
    for mode in modes:
        if mode in RAW:
            yield mode, None
        else:
            yield from ((mode, gains) for gains in tables.values())


# --- searches -----------------------------------------------------------------------------------------------------


def compare(case: Case, mode: str, gains: GainTable | None, trials: int, seeds: int) -> dict[str, Any]:
    """One row: what this search finds, over the seeds."""
    run = _RUNS.get(mode)
    found = []
    for seed in range(seeds):
        curve = run(case, trials, seed) if run is not None else _search(case, mode, gains, trials, seed)
        found.append(case.found(max(curve, default=case.original)))
    return {
        "case": case.name,
        "mode": mode,
        "gains": "-" if gains is None else gains.estimator,
        "found_median": float(np.median(found)),
        "found_lowest": min(found),
        "seeds_that_reach_95": sum(value >= ENOUGH for value in found),
        "met": float(np.median(found)) >= ENOUGH,
    }


def _search(case: Case, mode: str, gains: GainTable | None, trials: int, seed: int) -> list[float]:
    assert gains is not None
    if mode == ALONE:
        return _optimize(case, gains, trials, seed)
    with tempfile.TemporaryDirectory() as folder:
        evaluator = TableEvaluator(case.space, lambda placement: [case.values[tuple(int(j) for j in placement)]])
        config = SearchConfig(trials=trials, sampler=mode, seed=seed)
        search = Search(StudyFile(Path(folder) / "study"), case.space, gains, evaluator, case.problem, config)
        search.open()
        search.run()
        return [one.values[0] for one in search.file.records() if one.counts and one.values]


def _optimize(case: Case, gains: GainTable, trials: int, seed: int) -> list[float]:
    sampler = PlacementSampler(case.space, case.problem, gains, seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)

    def objective(trial: optuna.Trial) -> float:
        placement = sampler.suggest(trial)
        return case.values[tuple(int(j) for j in placement)]

    study.optimize(objective, n_trials=trials)
    return [trial.value for trial in study.trials if trial.value is not None]


def _raw(case: Case, trials: int, sampler: optuna.samplers.BaseSampler) -> list[float]:
    study = optuna.create_study(direction="maximize", sampler=sampler)
    values = []
    for _ in range(trials):
        trial = study.ask()
        options = range(case.problem.shape[1])
        placement = tuple(int(trial.suggest_categorical(layer, list(options))) for layer in case.space.layers)
        over = (case.problem.totals(placement)[0] - case.problem.limits).max()
        trial.set_constraint("budget", float(over))
        study.tell(trial, case.values[placement])
        if over <= 0:
            values.append(case.values[placement])
    return values


def _raw_tpe(case: Case, trials: int, seed: int) -> list[float]:
    return _raw(case, trials, optuna.samplers.TPESampler(seed=seed))


def _raw_nsga2(case: Case, trials: int, seed: int) -> list[float]:
    return _raw(case, trials, optuna.samplers.NSGAIISampler(population_size=10, seed=seed))


def _raw_random(case: Case, trials: int, seed: int) -> list[float]:
    """Different ones of the feasible placements, all equally likely."""
    every = case.feasible()
    chosen = np.random.default_rng(seed).permutation(len(every))[:trials]
    return [case.values[every[i]] for i in chosen]


_RUNS: dict[str, Callable[[Case, int, int], list[float]]] = {
    "raw tpe": _raw_tpe,
    "raw nsga2": _raw_nsga2,
    "raw random": _raw_random,
}


if __name__ == "__main__":
    sys.exit(main())
