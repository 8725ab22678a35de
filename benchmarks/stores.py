"""Storage options of a study: the cost of a trial with 100 layers, and the effect of a `kill -9`.

    python -m benchmarks.stores [--trials 20] [--layers 100]

`trial_s`: seconds of a whole trial without training: a random proposal, every parameter and attribute, the result. `optuna
journal` is Optuna's unchanged JournalStorage, `journal` the one of `search.study.journal`, `sqlite` and `postgresql` (if a
server can be started) Optuna's RDBStorage. `torn`: whether a study can be read, and written, after a line torn by a kill was
followed by another. `waits_s`: seconds until another worker gets the lock of one that was killed while it held it.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from benchmarks._results import RESULTS, table, write_json
from surgeon.costs.table import Option
from surgeon.search.evaluate.evaluator import TableEvaluator
from surgeon.search.gains.gain import uniform_gains
from surgeon.search.placement.problem import Problem, make_problem
from surgeon.search.run import Search, SearchConfig
from surgeon.search.sampling.tuners import RandomPlacements
from surgeon.search.space import Space
from surgeon.search.study.database import StudyDatabase
from surgeon.search.study.journal import StudyJournal
from surgeon.search.study.study import Study
from surgeon.search.study.study_file import StudyFile

_HOLD = """
import sys, time
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from pathlib import Path
from surgeon.search.study.journal import file_lock
path = sys.argv[2]
lock = JournalFileSymlinkLock(path) if sys.argv[1] == "optuna" else None
if lock is not None:
    lock.acquire()
    print("held", flush=True)
    time.sleep(600)
with file_lock(Path(path + ".lock")):
    print("held", flush=True)
    time.sleep(600)
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, metavar="N")
    parser.add_argument("--layers", type=int, default=100, metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []
    for name, run in _RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"store": name, "trial_s": run(Path(folder), args.layers, args.trials)})
            if name in _TORN:
                rows[-1]["torn"] = torn(Path(folder) / "torn", _TORN[name])
                rows[-1]["waits_s"] = waits(Path(folder) / "held", name)
    rows += [{"store": "postgresql", "trial_s": seconds} for seconds in _on_a_server(args.layers, args.trials)]
    headers = ["store", "trial_s", "torn", "waits_s"]
    table(headers, [[row.get(header, "-") for header in headers] for row in rows])
    write_json(args.results / "stores.json", {"layers": args.layers, "trials": args.trials, "rows": rows})
    return 0


def made_up(layers: int) -> tuple[Space, Problem]:
    """Layers of which each has four types with two options each, and one budget."""
    options = [Option("acda", {"atoms": n}) for n in (2, 4)] + [Option("pafu", {"group_size": n}) for n in (4, 8)]
    allowed = np.ones((layers, len(options) + 1), dtype=np.bool_)
    space = Space(
        layers=tuple(f"layer{i}" for i in range(layers)),
        stages=("stage1",) * layers,
        options=tuple(options),
        allowed=allowed,
    )
    costs = np.random.default_rng(0).integers(1, 10**6, allowed.shape)
    costs[:, 0] = 0
    return space, make_problem(allowed, {"flops": costs}, {"flops": 0}, {"flops": int(costs.sum() / 8)})


def searched(study: Study, layers: int, trials: int) -> float:
    """Seconds a trial of a search in this study."""
    space, problem = made_up(layers)
    evaluator = TableEvaluator(space, lambda placement: [float(placement.sum())])
    config = SearchConfig(trials=trials, sampler="random", optima=1)
    search = Search(study, space, uniform_gains(space), evaluator, problem, config)
    search.open()
    start = time.perf_counter()
    search.run()
    study.close()
    return (time.perf_counter() - start) / trials


def optimized(storage: Any, layers: int, trials: int) -> float:
    """Seconds a trial of `study.optimize`."""
    space, problem = made_up(layers)
    sampler = RandomPlacements(space, problem, optima=1)
    study = optuna.create_study(storage=storage, sampler=sampler)
    start = time.perf_counter()
    study.optimize(lambda trial: float(sampler.suggest(trial).sum()), n_trials=trials)
    return (time.perf_counter() - start) / trials


def torn(path: Path, make: Callable[[Path], Any]) -> str:
    """What becomes of a line that was torn, and followed by another."""
    study = optuna.create_study(storage=JournalStorage(make(path)), study_name="x")
    study.add_trial(optuna.create_trial(value=1.0))
    with path.open("ab") as file:
        file.write(b'{"op_code": 5, "worker_id": "dead", "par')
    try:
        again = optuna.load_study(storage=JournalStorage(make(path)), study_name="x")
        again.add_trial(optuna.create_trial(value=2.0))
        found = optuna.load_study(storage=JournalStorage(make(path)), study_name="x").trials
    except Exception as error:
        return f"cannot be read: {type(error).__name__}"
    return "nothing is lost" if [one.value for one in found] == [1.0, 2.0] else f"{len(found)} of 2 trials are left"


def waits(path: Path, name: str) -> float:
    """Seconds until the lock of a killed worker is had by the next."""
    kind = "optuna" if name.startswith("optuna") else "surgeon"
    make = _TORN[name]
    path.touch()
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLD, kind, str(path)], stdout=subprocess.PIPE, env=os.environ, cwd=Path.cwd()
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    start = time.perf_counter()
    optuna.create_study(storage=JournalStorage(make(path)), study_name="x")
    return time.perf_counter() - start


def _on_a_server(layers: int, trials: int) -> list[float]:
    from tests.support.search.servers import postgresql, why_no_postgresql

    if why_no_postgresql() is not None:
        print(f"postgresql is left out: {why_no_postgresql()}", file=sys.stderr)
        return []
    with postgresql() as server:
        return [searched(StudyDatabase(server.url, "x"), layers, trials)]


_TORN: dict[str, Callable[[Path], Any]] = {
    "optuna journal": lambda path: JournalFileBackend(str(path)),
    "journal": StudyJournal,
}
_RUNS: dict[str, Callable[[Path, int, int], float]] = {
    "optuna journal": lambda folder, *rest: optimized(JournalStorage(JournalFileBackend(str(folder / "s"))), *rest),
    "journal": lambda folder, *rest: searched(StudyFile(folder / "s"), *rest),
    "sqlite": lambda folder, *rest: searched(StudyDatabase(f"sqlite:///{folder / 's.db'}", "x"), *rest),
}


if __name__ == "__main__":
    sys.exit(main())
