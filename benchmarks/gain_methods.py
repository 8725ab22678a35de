"""How well does every gain estimator rank what layers really gain? The default of `surgeon search --gains` comes from here.

    python -m benchmarks.gain_methods [--methods fisher …] [--seeds 3] [--training all|new] [--fresh]

Ground truth: the one-layer fine-tunes of `benchmarks.fine_tunes` (results/fine_tunes.json): the unmodified network's loss minus
that of the network with one layer replaced, trained with the same seed, averaged over the seeds. Its reliability is
the rank correlation of its two halves, averaged over random halvings. `rank` is the rank correlation (Spearman) of an
estimator with the truth, over all (layer, option), `rank_placements` that of its summed gains with the whole placements of the
exhaustive part. Estimators use different seeds than the truth. Cost is CPU time; if the cheap setting of a method
costs much less than the others, there is a more expensive one as well. Writes benchmarks/results/gain_methods.json and the
git-ignored gain_tables.json (for the other training with -new); resumes if interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from tqdm import tqdm

from benchmarks import _data as data
from benchmarks._results import RESULTS, Rows, table, write_json
from benchmarks.fine_tunes import TRAININGS, Size, make_evaluator, sized
from benchmarks.finetune_defaults import NEEDS
from surgeon.search.gains.gain import GainTable
from surgeon.search.gains.method import make_gains
from surgeon.search.gains.probe import ProbeConfig, entries
from surgeon.search.placement.place import gain_of
from surgeon.search.placement.problem import Floats
from surgeon.search.space import Space

# By name: (method, what it is given). Batches are of 32 images.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient": ("gradient", {"batches": 16}),
    "fisher": ("fisher", {"batches": 16}),
    "fisher-64": ("fisher", {"batches": 64}),
    "snr": ("snr", {"batches": 16}),
    "snr-64": ("snr", {"batches": 64}),
    "nqm": ("nqm", {"batches": 16}),
    "nqm-64": ("nqm", {"batches": 64}),
    "probe": ("probe", {"config": ProbeConfig(steps=4, seeds=2, batches=4)}),
    "probe-16": ("probe", {"config": ProbeConfig(steps=16, seeds=2, batches=4)}),
    "ablation": ("ablation", {"config": ProbeConfig(steps=16, seeds=2)}),
    "halving": ("halving", {"config": ProbeConfig(steps=4, seeds=2)}),
}
FIRST_SEED = 1000  # of the estimators
HALVINGS = 2000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of every estimator (default: %(default)s)")
    parser.add_argument("--training", choices=tuple(TRAININGS), default="all", help="default: %(default)s")
    parser.add_argument("--table", type=Path, help="default: that of benchmarks.fine_tunes with this training")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted run")
    parser.add_argument("--data", type=Path, default=data.data_folder(), help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    size, name = sized("gain_methods", args.training)
    truth = args.table or RESULTS / f"{sized('fine_tunes', args.training)[1]}.json"
    lacking = [str(args.data / name) for name in data.missing(NEEDS, args.data)]
    lacking += [] if truth.is_file() else [str(truth)]
    if lacking:
        print(f"not there: {', '.join(lacking)}", file=sys.stderr)
        return 2
    rows = Rows(args.results / f"{name}.jsonl", fresh=args.fresh)
    for method, seed in tqdm([(m, s) for s in range(args.seeds) for m in args.methods], desc="estimates", disable=None):
        if f"{method}/{seed}" not in rows:
            rows.add(f"{method}/{seed}", estimate(method, seed, args.data, size))
    finish(rows, json.loads(truth.read_text()), make_evaluator(args.data, size).space, args.results / f"{name}.json")
    return 0


def estimate(name: str, seed: int, folder: Path, size: Size) -> dict[str, Any]:
    """One table of one method."""
    method, options = SETTINGS[name]
    evaluator = make_evaluator(folder, size, seed=FIRST_SEED + 100 * seed)
    start = time.process_time()
    gains = make_gains(method, evaluator, fresh=True, **options)
    return {
        "method": name,
        "seed": seed,
        "cpu_seconds": round(time.process_time() - start, 1),
        "gains": gains.to_dict(),
    }


# --- truth --------------------------------------------------------------------------------------------------------


def single_gains(content: Mapping[str, Any], space: Space) -> Floats:
    """(seeds, entries): the gain of every entry of the singles, where all of them were trained with the seed."""
    own = [entry for entry in entries(space) if space.layers[entry[0]] in content["settings"]["layers"]["singles"]]
    losses = {(json.dumps(row["placement"], sort_keys=True), row["seed"]): row["loss"] for row in content["rows"]}
    found = []
    for seed in sorted({row["seed"] for row in content["rows"]}):
        names = [json.dumps({space.layers[i]: space.labels[j]}, sort_keys=True) for i, j in own]
        if ("{}", seed) in losses and all((name, seed) in losses for name in names):
            found.append([losses["{}", seed] - losses[name, seed] for name in names])
    return np.array(found, dtype=np.float64)


def agreement(gains: Floats) -> float | None:
    """Mean rank correlation of two halves of the seeds, over so many random halvings; None with fewer than two seeds."""
    if len(gains) < 2:
        return None
    rng = np.random.default_rng(0)
    values = []
    for _ in range(HALVINGS):
        half, rest = np.array_split(rng.permutation(len(gains)), 2)
        values.append(rank(gains[half].mean(axis=0), gains[rest].mean(axis=0)))
    return fmean(values)


def rank(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation; 0 where one of the two is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)


def whole(content: Mapping[str, Any], space: Space) -> list[tuple[dict[str, str], float]]:
    """Placements of the exhaustive part with their values, higher being better; empty where that part was not run."""
    layers = set(content["settings"]["layers"]["space"])
    found = [(r["placement"], -r["loss"]) for r in content["rows"] if r["seed"] == 0 and set(r["placement"]) <= layers]
    rows = [i for i, layer in enumerate(space.layers) if layer in layers]
    return found if len(found) == np.prod(space.allowed[rows].sum(axis=1)) else []


# --- what comes out -----------------------------------------------------------------------------------------------


def finish(rows: Rows, content: Mapping[str, Any], space: Space, path: Path) -> None:
    """Print a line for every method, best first, and write the JSON, and a table of each beside it."""
    truth = single_gains(content, space)
    own = [entry for entry in entries(space) if space.layers[entry[0]] in content["settings"]["layers"]["singles"]]
    placements = whole(content, space)
    lines, tables = [], {}
    for name in SETTINGS:
        found = [row for row in rows.values() if row["method"] == name]
        if not found:
            continue
        gains = [GainTable.from_dict(row["gains"]).for_space(space) for row in found]
        ranks = [rank(np.array([one.gain[entry] for entry in own]), truth.mean(axis=0)) for one in gains]
        sums = [[gain_of(one.gain, space.placement(placement)) for placement, _ in placements] for one in gains]
        whole_ranks = [rank(np.array(one), np.array([value for _, value in placements])) for one in sums if placements]
        lines.append(
            {
                "method": name,
                "seeds": len(found),
                "rank": fmean(ranks),
                "sd": pstdev(ranks),
                "rank_placements": fmean(whole_ranks) if placements else None,
                "cpu_seconds": fmean(row["cpu_seconds"] for row in found),
            }
        )
        tables[name] = found[0]["gains"]
    lines.sort(key=lambda line: -float(line["rank"]))
    facts = {
        "entries": len(own),
        "truth_seeds": len(truth),
        "agreement": agreement(truth),
        "placements": len(placements),
        "gain_mean": truth.mean(axis=0).tolist(),
        "gain_sd": truth.std(axis=0).tolist(),
        "names": [f"{space.layers[i]} {space.labels[j]}" for i, j in own],
    }
    if lines:
        table(list(lines[0]), [list(line.values()) for line in lines])
    agree = facts["agreement"]
    print(
        f"\ntruth: {len(own)} gains, {len(truth)} seeds, two halves agree at {'-' if agree is None else f'{agree:.2f}'}"
    )
    write_json(path, {"truth": facts, "methods": lines})
    write_json(tables_of(path), {"tables": tables})
    print(f"written: {path}, {tables_of(path)}")


def tables_of(path: Path) -> Path:
    """Where the tables of the methods are, which are not committed, beside the result about them."""
    return path.with_name(path.name.replace("gain_methods", "gain_tables"))


if __name__ == "__main__":
    sys.exit(main())
