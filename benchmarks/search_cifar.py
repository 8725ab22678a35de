"""A whole search on a trained CIFAR ResNet under two budgets, and its result against the papers' own placements.

    python -m benchmarks.search_cifar [--network resnet20_cifar] [--wide] [--trials 16] [--seeds 3] [--quick] [--report] [--fresh]

Arms, all trained equally with every seed: the network without conversion, the placement that the search found, a random feasible
one, PAFU in the first convolution of every stage and ACDA in the last stage, as the papers place them. The search sees one half
of the JPEG test images, the arms are evaluated on the other half; the found placement is compared with each other arm by paired
differences over the seeds. The rate is that which `benchmarks.learning --only resnet20` found best for the original and for PAFU.
An arm over the budgets is marked but still trained, so that the search does not look good because others were left out. ResNet-56
(search_cifar-resnet56_cifar) takes arms half as long. `--wide` (search_cifar-wide) allows twice the FLOPs and more memory; arms
that no budget changes are those of the other run, if it is there. Writes benchmarks/results/search_cifar.json; resumes if
interrupted (the search is in results/search_cifar.study).
"""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import optuna
from tqdm import tqdm

from benchmarks import _data as data
from benchmarks._cifar import TEST_SET, Cifar, CifarTask
from benchmarks._paired import differences, outcome, signed
from benchmarks._results import RESULTS, Rows, table, write_json
from benchmarks.finetune_defaults import NEEDS, NETWORK, WEIGHTS, network
from surgeon.commands.search.setup import GAINS
from surgeon.costs.table import Option
from surgeon.search.budget import Budgets
from surgeon.search.evaluate.training import ShortConfig, TrainingEvaluator, bound
from surgeon.search.gains.method import make_gains
from surgeon.search.gate import Gate
from surgeon.search.placement.draw import random_placement
from surgeon.search.placement.problem import Ints
from surgeon.search.run import Search, SearchConfig
from surgeon.search.sampling.sampler import derived_seed
from surgeon.search.space import SpaceConfig
from surgeon.search.study.study_file import StudyFile
from surgeon.sites.select import select
from surgeon.sites.sites import find_sites
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.finetune import FinetuneConfig
from surgeon.zoo.tasks import TaskConfig

BUDGETS = {"flops": "+110%", "memory": "+50%"}  # at which the papers' own placements fit
WIDE = {"flops": "+220%", "memory": "+100%"}
FREE = ("no conversion", "ACDA, last stage", "PAFU, first of stage")  # arms that no budget changes
ACDA, PAFU = Option("acda", {}), Option("pafu", {"group_size": 8})
FEWER_ATOMS = Option("acda", {"atoms": 4, "scales": 1})
OPTIONS = (ACDA, FEWER_ATOMS, Option("pafu", {"group_size": 4}), PAFU, Option("sekg", {}))
BATCH, RATE = 64, 1e-3


@dataclass(frozen=True)
class Size:
    """How long a trial trains, how much longer an arm (2^rung), and how many images each half has."""

    steps: int = 80
    rung: int = 2
    images: int = 2500


SIZES = {"resnet20_cifar": Size(), "resnet56_cifar": Size(rung=1, images=1000)}
QUICK = Size(steps=4, rung=0, images=50)


class Half(CifarTask):
    """Judged on every other test image, from `first` (0 or 1) on."""

    def __init__(self, config: TaskConfig, first: int, images: int) -> None:
        super().__init__(config, seed=0)
        tests = data.cifar_jpeg((config.data or data.data_folder()) / TEST_SET)
        half = data.Labeled(tests.x[first::2], tests.y[first::2]).every(images)
        self.sets["val"] = Cifar(half, 0, train=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(SIZES), default=NETWORK, help="default: %(default)s")
    parser.add_argument("--wide", action="store_true", help="twice the FLOPs, and more memory")
    parser.add_argument("--trials", type=int, default=16, metavar="N")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of every arm (default: %(default)s)")
    parser.add_argument("--sampler", default="posterior", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="few steps and images")
    parser.add_argument("--report", action="store_true", help="search, but train no arm: only print those there are")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted run")
    parser.add_argument("--data", type=Path, default=data.data_folder(), help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    lacking = data.missing((*NEEDS, WEIGHTS.format(args.network)), args.data)
    if lacking:
        print(f"not in {args.data}: {', '.join(lacking)}", file=sys.stderr)
        return 2
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    name = "search_cifar" if args.network == NETWORK else f"search_cifar-{args.network}"
    size, name = (QUICK, f"{name}-quick") if args.quick else (SIZES[args.network], name)
    budgets, tight, name = (WIDE, name, f"{name}-wide") if args.wide else (BUDGETS, None, name)
    rows = Rows(args.results / f"{name}.jsonl", fresh=args.fresh)
    for key, row in Rows(args.results / f"{tight}.jsonl").rows.items() if tight else ():
        if row.get("arm") in FREE and key not in rows:
            rows.add(key, row)
    study = args.results / f"{name}.study"
    if args.fresh:
        shutil.rmtree(study, ignore_errors=True)
    evaluator, gate = prepare(args.data, args.network, size, budgets)
    found = search(evaluator, gate, study, args.trials, args.sampler, rows)
    placements = arms(gate, found)
    for arm, placement in placements.items():
        for seed in tqdm(range(args.seeds), desc=arm, disable=None):
            key = f"{arm}/{seed}"
            if key not in rows and not args.report:
                trained = next(
                    (row for other in alike(placements, arm) if (row := rows.rows.get(f"{other}/{seed}"))), None
                )
                row = trained or train(evaluator, placement, seed, args.data, size)
                rows.add(key, row | {"key": key, "arm": arm, "seed": seed})
    finish(rows, gate, placements, args.network, size, budgets, args.results / f"{name}.json")
    return 0


def prepare(folder: Path, name: str, size: Size, budgets: Mapping[str, str]) -> tuple[TrainingEvaluator, Gate]:
    """The evaluator of trials and the budgets."""
    task = Half(TaskConfig(data=folder), 0, size.images)
    model = bound(network(folder, name), task)
    config = FinetuneConfig(lr=RATE, batch_size=BATCH, eval_batch_size=100, recalibrate=0, device="cpu")
    gate = Gate(
        model,
        SpaceConfig(options=OPTIONS),
        Budgets.parse(**budgets),
        input_size=(3, 32, 32),
        batch_size=BATCH,
        optimizer="adamw",
    )
    short = ShortConfig(steps=size.steps, evaluations=2, base=config)
    return TrainingEvaluator(model, task, gate.space, short), gate


def search(evaluator: TrainingEvaluator, gate: Gate, folder: Path, trials: int, sampler: str, rows: Rows) -> Ints:
    """The best placement with replacements of a search; what it was goes into the rows."""
    file = StudyFile(folder / "study.jsonl")
    gains = make_gains(GAINS, evaluator)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=evaluator.config.interval(0), reduction_factor=2)
    config = SearchConfig(trials=trials, sampler=sampler, seed=0)
    run = Search(file, gate.space, gains, evaluator, gate, config, pruner=pruner)
    run.open(resume=file.exists())
    if run.run().stopped == "interrupted":
        sys.exit(130)
    records = run.file.records()
    done = [one for one in records if one.state == "complete" and one.values and one.placement]
    best = min(done, key=lambda one: (one.values or (0.0,))[0])
    facts = {
        "seconds": round(sum(one.attributes.get("seconds", 0.0) for one in records), 1),  # of the trials
        "trials": sum(one.counts for one in records),
        "refused": sum(one.state == "refused" for one in records),
        "mode": sampler,
        "gains": GAINS,
        "value": (best.values or (0.0,))[0],
        "original": next(((one.values or (0.0,))[0] for one in done_original(records)), None),
    }
    rows.add("search", facts)
    return gate.space.placement(best.placement)


def done_original(records: Sequence[Any]) -> list[Any]:
    """The trial of the unmodified network."""
    return [one for one in records if one.state == "complete" and not one.placement]


def arms(gate: Gate, found: Ints) -> dict[str, Ints]:
    """Placements by name."""
    space = gate.space
    sites = find_sites(network_of(gate), input_size=(3, 32, 32)).convs

    def everywhere(selection: str, option: Option) -> Ints:
        chosen = {site.name for site in select(sites, selection)}
        column = space.labels.index(option.label)
        return np.array([column if layer in chosen else 0 for layer in space.layers], dtype=np.int64)

    drawn = random_placement(gate.problem, np.random.default_rng(derived_seed(0, "arm")))
    assert drawn is not None
    return {
        "no conversion": np.zeros(len(space.layers), dtype=np.int64),
        "found": found,
        "ACDA, last stage": everywhere("layer3.*", ACDA),
        "PAFU, first of stage": everywhere("first-of-stage", PAFU),
        "random feasible": drawn,
    }


def alike(placements: Mapping[str, Ints], arm: str) -> list[str]:
    """The other arms with the placement of this one: what one of them trained is a result of all."""
    return [other for other in placements if other != arm and np.array_equal(placements[other], placements[arm])]


def network_of(gate: Gate) -> Any:
    """The gate's network, on the meta device."""
    return gate.build(np.zeros(len(gate.space.layers), dtype=np.int64))


def train(evaluator: TrainingEvaluator, placement: Ints, seed: int, folder: Path, size: Size) -> dict[str, Any]:
    """One placement with one seed, judged on the images that the search has not seen."""
    start = time.perf_counter()
    model = evaluator.train(placement, rung=size.rung, seed=seed).model
    metrics = evaluate(model, Half(TaskConfig(data=folder), 1, size.images), batch_size=100)
    seconds = round(time.perf_counter() - start, 1)
    return {"loss": metrics["loss"], "top1": 100 * metrics["top1"], "seconds": seconds}


def finish(
    rows: Rows, gate: Gate, placements: dict[str, Ints], name: str, size: Size, budgets: Mapping[str, str], path: Path
) -> None:
    """Print a line for every arm, and write the JSON."""
    lines = []
    for arm, placement in placements.items():
        own = [row for row in rows.values() if row.get("arm") == arm]
        if not own:
            continue
        costs, verdict = gate.trace(placement), gate.check(placement)
        loss, top1 = [row["loss"] for row in own], [row["top1"] for row in own]
        lines.append(
            {
                "arm": arm,
                "replaced": int((placement != 0).sum()),
                "flops": costs.flops / gate.original.flops - 1,
                "memory": costs.peak_bytes / gate.original.peak_bytes - 1,
                "within": verdict.fits,
                "seeds": len(own),
                "loss": fmean(loss),
                "loss_sd": stdev(loss) if len(loss) > 1 else None,
                "top1": fmean(top1),
                "top1_sd": stdev(top1) if len(top1) > 1 else None,
            }
        )
    gaps = differences_of_found(rows, alike(placements, "found"))
    table(list(lines[0]), [list(line.values()) for line in lines])
    print("\nthe found placement against")
    table(list(gaps[0]), [list(gap.values()) for gap in gaps])
    settings = {
        "network": name,
        "images": size.images,
        "budgets": dict(budgets),
        "batch": BATCH,
        "rate": RATE,
        "trial_steps": size.steps,
        "arm_steps": size.steps << size.rung,
    }
    named = {arm: gate.space.names(placement) for arm, placement in placements.items()}
    search_facts = rows.rows["search"]
    print(f"\nsearch: {search_facts['trials']} trials in {search_facts['seconds'] / 60:.1f} minutes")
    write_json(
        path,
        {
            "settings": settings,
            "search": search_facts,
            "arms": lines,
            "differences": gaps,
            "placements": named,
            "rows": rows.values(),
        },
    )
    print(f"written: {path}")


def differences_of_found(rows: Rows, same: Sequence[str]) -> list[dict[str, Any]]:
    """The found placement minus each other arm, over the seeds that both have; `same` are the arms with that placement."""
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows.values():
        if "arm" in row:
            scores.setdefault(row["arm"], {})[row["seed"]] = {"loss": row["loss"], "top1": row["top1"]}
    found = scores.pop("found")
    lines = []
    for arm, other in scores.items():
        gaps = differences(found, other)
        lines.append(
            {"against": arm}
            | {
                f"{what} {name}": "the same placement" if name == "verdict" and arm in same else value
                for what in gaps
                for name, value in _told(gaps[what], what == "loss").items()
            }
        )
    return lines


def _told(values: list[float], lower: bool) -> dict[str, str]:
    return {"difference": signed(values, 3 if lower else 2), "verdict": outcome(values, lower)}


if __name__ == "__main__":
    sys.exit(main())
