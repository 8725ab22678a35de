"""Converted networks fine-tuned along with their originals: the same data, steps and rates, several seeds.

    python -m benchmarks.finetuned [--only NAME …] [--seeds N] [--quick] [--fresh]

Every arm starts from the same trained weights; a converted network is equivalent to the original until it is trained, so all
arms of an experiment have the same score *before*. The last weights are evaluated, not the best. *original* is the network without
conversion, trained like the others. Seeds set the order of the images, their augmentation and noise.
Writes benchmarks/results/finetuned.json (--quick: finetuned-quick.json); resumes if interrupted.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import surgeon
from benchmarks import _data as data
from benchmarks._experiments import CIFAR, EXPERIMENTS, Experiment
from benchmarks._paired import outcome, standard_error
from benchmarks._results import RESULTS, Rows, table, write_json
from benchmarks._tasks import TASKS, evaluate
from surgeon.errors import TrainingError
from surgeon.zoo.finetune import FinetuneConfig, finetune
from surgeon.zoo.tasks import Task

ORIGINAL = "original"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    name = "finetuned-quick" if args.quick else "finetuned"
    rows = Rows(args.results / f"{name}.jsonl", fresh=args.fresh)
    skipped: dict[str, str] = {}
    chosen = []
    for experiment in (EXPERIMENTS[key] for key in args.only):
        lacking = data.missing(experiment.needs, args.data)
        if lacking:
            skipped[experiment.name] = f"not in {args.data}: {', '.join(lacking)}"
        else:
            chosen.append(experiment)
    plan = [(e, arm, seed) for seed in range(args.seeds) for e in chosen for arm in (ORIGINAL, *e.arms)]
    for experiment, arm, seed in tqdm(plan, desc="runs", disable=None):
        key = f"{experiment.name}/{arm}/{seed}"
        if key not in rows:
            rows.add(key, run(experiment, arm, seed, args.data, quick=args.quick))
    _print(rows.values())
    for what, why in skipped.items():
        print(f"{what} left out: {why}", file=sys.stderr)
    write_json(args.results / f"{name}.json", {"rows": rows.values(), "skipped": skipped})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--quick", action="store_true", help="a few steps and images: only to see that everything runs")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted or finished run")
    parser.add_argument("--data", type=Path, default=data.data_folder(), help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    return parser


def run(experiment: Experiment, arm: str, seed: int, folder: Path, *, quick: bool = False) -> dict[str, Any]:
    """Convert and train one arm; scores before and after by data set or metric."""
    images = 2 if quick else experiment.images
    steps = 2 if quick else experiment.steps
    facts: dict[str, Any] = {"experiment": experiment.name, "arm": arm, "seed": seed, "replaced": []}
    facts |= {"unit": experiment.unit, "steps": steps, "batch": experiment.batch, "lr": experiment.lr}
    facts["new_lr_scale"] = experiment.new_lr_scale
    if experiment.folds == 1:
        return facts | _run_once(experiment, arm, seed, folder, experiment.task(folder, seed, images), steps, images)
    parts, weights = [], []
    for fold in range(experiment.folds):
        task = experiment.task(folder, seed, images, fold)
        weights.append(len(task.dataset("val")))
        parts.append(_run_once(experiment, arm, seed, folder, task, steps, images))
        if parts[-1]["after"] is None:
            return facts | parts[-1]
    facts |= parts[0] | {"folds": experiment.folds, "seconds": round(sum(part["seconds"] for part in parts), 1)}
    for when in ("before", "after"):
        facts[when] = {
            what: sum(weight * part[when][what] for weight, part in zip(weights, parts, strict=True)) / sum(weights)
            for what in parts[0][when]
        }
    return facts


def _run_once(
    experiment: Experiment, arm: str, seed: int, folder: Path, task: Task, steps: int, images: int | None
) -> dict[str, Any]:
    torch.manual_seed(seed)  # of a head that is new
    model = experiment.build(folder)
    facts: dict[str, Any] = {}
    if arm != ORIGINAL:
        model, report = surgeon.convert(model, recipe=experiment.arms[arm], input_size=experiment.input_size)
        facts["replaced"] = [row.name for row in report.replaced]
    config = FinetuneConfig(
        max_steps=steps,
        epochs=1e6,
        batch_size=experiment.batch,
        eval_batch_size=1 if experiment.judge and experiment.name not in CIFAR else 50,
        lr=experiment.lr,
        new_lr_scale=experiment.new_lr_scale,
        seed=seed,
        keep="last",
        recalibrate=0,
        eval_every="100%",
        checkpoint_every="100%",
    )
    before = None if experiment.judge is None else _judged(model, experiment.judge, folder, images)
    started = time.perf_counter()
    try:
        result = finetune(model, task, config)
    except TrainingError as error:
        return facts | {"before": before, "after": None, "failed": str(error)}
    summary = result.summary
    seconds = round(time.perf_counter() - started, 1)
    if experiment.judge is None:
        before = _own(experiment, summary.start.metrics)
        after = _own(experiment, summary.result.metrics)
    else:
        after = _judged(result.model, experiment.judge, folder, images)
    parameters = summary.result.parameters
    return facts | {"before": before, "after": after, "parameters": parameters, "seconds": seconds}


def _judged(model: nn.Module, judge: str, folder: Path, images: int | None) -> dict[str, float]:
    scores = evaluate(model, TASKS[judge], folder, limit=images)
    return {name: score.summary for name, score in scores.items()}


def _own(experiment: Experiment, metrics: dict[str, float]) -> dict[str, float]:
    return {name: factor * metrics[name] for name, factor in experiment.metrics.items()}


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row an experiment, arm and data set or metric: before, and mean and spread (sample standard deviation) of after.

    `gain` is the mean difference to the original of the same seed, `gain_error` its standard error (None with one seed).
    """
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["experiment"], row["arm"]), {})[row["seed"]] = row
    found = []
    for (experiment, arm), by_seed in groups.items():
        good = {seed: row for seed, row in by_seed.items() if row["after"] is not None}
        for what in next(iter(good.values()))["after"] if good else ():
            after = [row["after"][what] for row in good.values()]
            plain = {s: r for s, r in groups.get((experiment, ORIGINAL), {}).items() if r["after"] is not None}
            gains = [good[s]["after"][what] - plain[s]["after"][what] for s in good if s in plain]
            first = next(iter(good.values()))
            found.append(
                {
                    **{"experiment": experiment, "arm": arm, "what": what, "unit": first["unit"], "seeds": len(good)},
                    **{"before": statistics.mean(row["before"][what] for row in good.values())},
                    **{"after": statistics.mean(after), "spread": _spread(after)},
                    **{"gain": statistics.mean(gains) if gains and arm != ORIGINAL else None},
                    **{"gain_error": standard_error(gains) if arm != ORIGINAL else None},
                    **{"verdict": outcome(gains, first["unit"] == "people") if gains and arm != ORIGINAL else ""},
                    **{"failed": len(by_seed) - len(good), "parameters": first["parameters"], "steps": first["steps"]},
                    **{"seconds": statistics.mean(row["seconds"] for row in good.values())},
                }
            )
    return found


def _spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _print(rows: list[dict[str, Any]]) -> None:
    columns = (
        "experiment",
        "arm",
        "what",
        "seeds",
        "before",
        "after",
        "spread",
        "gain",
        "gain_error",
        "verdict",
        "seconds",
    )
    lines = means(rows)
    table(columns, [[line[column] for column in columns] for line in lines])


if __name__ == "__main__":
    sys.exit(main())
