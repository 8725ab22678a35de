"""Small search spaces with known answers, and a worker process that can be killed."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from surgeon.costs.table import Option
from surgeon.search.evaluate.evaluator import TableEvaluator
from surgeon.search.gains.gain import GainTable
from surgeon.search.placement.place import gain_of
from surgeon.search.placement.problem import Floats, Ints, Problem, make_problem
from surgeon.search.run import Search, SearchConfig
from surgeon.search.space import Space
from surgeon.search.study.database import StudyDatabase
from surgeon.search.study.study_file import StudyFile

SHARE = 0.4  # leaves 56 placements within the budgets
OPTIONS = (Option("acda", {"atoms": 4}), Option("pafu", {"group_size": 4}), Option("sekg", {}))


def toy_space(layers: int = 8) -> Space:
    """Layers in two stages, with three options of which some are refused."""
    allowed = np.ones((layers, len(OPTIONS) + 1), dtype=np.bool_)
    allowed[::3, 3] = False
    return Space(
        layers=tuple(f"layer{i}" for i in range(layers)),
        stages=tuple(f"stage{1 + 2 * i // layers}" for i in range(layers)),
        options=OPTIONS,
        allowed=allowed,
    )


def toy_problem(space: Space, seed: int = 0, share: float = SHARE, max_layers: int | None = None) -> Problem:
    """FLOPs, parameters and six windows of memory, whose budgets leave room for a share of everything; some options save."""
    rng = np.random.default_rng(seed)
    shape = space.allowed.shape
    costs = {name: rng.integers(-(10**5), 10**6, shape) for name in ("flops", "params")}
    memory = rng.integers(-(10**4), 10**6, (*shape, 6))
    for values in (*costs.values(), memory):
        values[:, 0] = 0
    windows = rng.integers(10**6, 2 * 10**6, 6)
    room = int(share * shape[0] * 4 * 10**5)
    limits = {"flops": 10**7 + room, "params": 10**7 + room, "memory": int(windows.max()) + room}
    base = {"flops": 10**7, "params": 10**7}
    return make_problem(space.allowed, costs, base, limits, windows=windows, memory=memory, max_layers=max_layers)


def toy_gains(space: Space, seed: int = 0, noise: float = 0.0) -> Floats:
    """Gains (L, O), some negative; with noise they are estimates of those without."""
    rng = np.random.default_rng(seed)
    gains = rng.normal(0.4, 1.0, space.allowed.shape)
    gains += noise * rng.normal(size=gains.shape)
    gains[:, 0] = 0.0
    return np.where(space.allowed, gains, 0.0)


def toy_table(space: Space, seed: int = 0, noise: float = 0.7) -> GainTable:
    """A gain table that is wrong by some noise."""
    gain = toy_gains(space, seed, noise)
    return GainTable(layers=space.layers, options=space.labels, gain=gain, error=0.3 * (gain != 0), estimator="toy")


def toy_search(path: Path, *, pause: float = 0.0, storage: str | None = None, **options: Any) -> Search:
    """A search whose values are sums of the true gains, after a learning curve of three reports.

    `storage` is a database for its study, else that is the file `path`; beside `path`, calls.txt lists what was evaluated.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = toy_space()
    true = toy_gains(space)

    def curve(placement: Ints) -> list[float]:
        time.sleep(pause)
        with path.with_name("calls.txt").open("a") as file:
            file.write(space.hash_of(placement) + "\n")
        value = gain_of(true, placement)
        return [value / 2, value * 0.8, value]

    pruner = options.pop("pruner", None)
    problem = options.pop("problem", None) or toy_problem(space)
    return Search(
        StudyFile(path) if storage is None else StudyDatabase(storage, "toy", heartbeat=1, grace=60),
        space,
        toy_table(space),
        TableEvaluator(space, curve, name="toy"),
        problem,
        SearchConfig(**options),
        identity={"model": "toy"},
        pruner=pruner,
    )


def main(arguments: Sequence[str]) -> None:
    """PATH MODE TRIALS PAUSE RESUME SHARE [STORAGE]: one worker.

    "wait" resumes once the file `go` is there; SHARE is that of `toy_problem`.
    """
    path, mode, trials, pause, resume, share, *storage = arguments
    chosen = storage[0] if storage else None
    problem = toy_problem(toy_space(), share=float(share))
    options: dict[str, Any] = {"sampler": mode, "trials": int(trials), "seed": 3, "problem": problem}
    search = toy_search(Path(path), pause=float(pause), storage=chosen, **options)
    search.open(resume=resume in ("resume", "wait"))
    print("open", flush=True)
    while resume == "wait" and not Path(path).with_name("go").exists():
        time.sleep(0.01)
    print(search.run().stopped)
    search.file.close()
