"""Real short fine-tunes of the trained CIFAR ResNet-20, tabulated, to compare searches and gain estimators with.

    python -m benchmarks.fine_tunes [--parts singles space] [--seeds 28] [--training all|new] [--quick] [--fresh]

`space`: every placement of 4 options (keep, ACDA, PAFU, SEKG) in 4 layers, 256 fine-tunes with one seed, as a search's trials have.
`singles`: 9 layers in all three stages, one replaced at a time, and the unmodified network, with several seeds. A fine-tune is
that of `surgeon search`, on CIFAR-10 images kept as JPEG; its value is the cross-entropy on test images, of the last weights.
`--training all`: SGD at a high rate for everything, so that 16 steps tell layers apart; most replacements then do harm.
`--training new`: AdamW for 32 steps, new parameters at 3e-4 and the others at a thirtieth of it, as adapters are trained; then
replacements help. Writes benchmarks/results/fine_tunes.json (fine_tunes-new.json); resumes if interrupted.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import _data as data
from benchmarks._cifar import CifarTask
from benchmarks._results import RESULTS, Rows, table, write_json
from benchmarks.finetune_defaults import NEEDS, network
from surgeon.costs.table import Option
from surgeon.search.evaluate.training import ShortConfig, TrainingEvaluator, bound
from surgeon.search.gains.probe import entries, single
from surgeon.search.placement.problem import Ints
from surgeon.search.space import Space, SpaceConfig, make_space
from surgeon.sites.sites import find_sites
from surgeon.zoo.finetune import FinetuneConfig
from surgeon.zoo.tasks import TaskConfig

OPTIONS = (Option("acda", {"atoms": 4, "scales": 1}), Option("pafu", {"group_size": 4}), Option("sekg", {}))
SPACE = ("layer2.0.conv1", "layer2.1.conv1", "layer3.0.conv1", "layer3.1.conv1")
SINGLES = (
    "layer1.0.conv1",
    "layer1.1.conv2",
    "layer1.2.conv1",
    *SPACE[:2],
    "layer2.2.conv2",
    *SPACE[2:],
    "layer3.2.conv2",
)
PARTS = ("singles", "space")


@dataclass(frozen=True)
class Size:
    """How much is run."""

    space: tuple[str, ...] = SPACE
    singles: tuple[str, ...] = SINGLES
    steps: int = 16
    test: int = 400
    training: str = "all"


FULL = Size()
QUICK = Size(space=SPACE[2:], singles=SPACE[2:], steps=2, test=50)
NEW = Size(steps=32, training="new")
TRAININGS: dict[str, dict[str, Any]] = {
    # SGD: with the first steps of Adam at such rates luck decides more than the layer
    "all": {"opt": "sgd", "lr": 0.01, "new_lr_scale": 1.0},
    "new": {"opt": "adamw", "lr": 1e-5, "new_lr_scale": 30.0},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=28, metavar="N", help="of the singles (default: %(default)s)")
    parser.add_argument("--training", choices=tuple(TRAININGS), default="all", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="two layers, two steps")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted run")
    parser.add_argument("--data", type=Path, default=data.data_folder(), help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    lacking = data.missing(NEEDS, args.data)
    if lacking:
        print(f"not in {args.data}: {', '.join(lacking)}", file=sys.stderr)
        return 2
    size, name = sized("fine_tunes", args.training, quick=args.quick)
    rows = Rows(args.results / f"{name}.jsonl", fresh=args.fresh)
    evaluator = make_evaluator(args.data, size)
    todo = [one for part in args.parts for one in placements(part, evaluator.space, size, args.seeds)]
    for placement, seed in tqdm(todo, desc="fine-tunes", disable=None):
        key = f"{evaluator.space.hash_of(placement)}/{seed}"
        if key not in rows:
            rows.add(key, measure(evaluator, placement, seed))
    finish(rows, evaluator, size, args.results / f"{name}.json")
    return 0


def sized(name: str, training: str, *, quick: bool = False) -> tuple[Size, str]:
    """What is run, and the name of the result of a program about it."""
    size, named = (FULL, name) if training == "all" else (NEW, f"{name}-{training}")
    return (replace(QUICK, training=training), f"{named}-quick") if quick else (size, named)


def make_evaluator(folder: Path, size: Size, *, steps: int | None = None, seed: int = 0) -> TrainingEvaluator:
    """The fine-tune of a search on the trained network, in the space of all layers of both parts."""
    task = CifarTask(TaskConfig(data=folder, val_limit=size.test))
    model = bound(network(folder), task)
    layers = ",".join(dict.fromkeys((*size.space, *size.singles)))
    sites = find_sites(model, input_size=(3, 32, 32)).convs
    space = make_space(model, SpaceConfig(options=OPTIONS, layers=layers), sites=sites)
    # statistics of BatchNorm are those the network came with
    base = FinetuneConfig(
        batch_size=32, eval_batch_size=100, freeze_bn=True, recalibrate=0, device="cpu", **TRAININGS[size.training]
    )
    short = ShortConfig(steps=steps or size.steps, evaluations=1, base=replace(base, seed=seed))
    return TrainingEvaluator(model, task, space, short)


def placements(part: str, space: Space, size: Size, seeds: int) -> Iterator[tuple[Ints, int]]:
    """(placement, seed) of all fine-tunes of a part."""
    if part == "space":
        columns = [space.layers.index(layer) for layer in size.space]
        for chosen in product(range(len(space.labels)), repeat=len(columns)):
            placement = np.zeros(len(space.layers), dtype=np.int64)
            placement[columns] = chosen
            yield placement, 0
        return
    kept = {space.layers.index(layer) for layer in size.singles}
    for seed in range(seeds):
        yield single(space, 0, 0), seed
        for layer, option in entries(space):
            if layer in kept:
                yield single(space, layer, option), seed


def measure(evaluator: TrainingEvaluator, placement: Ints, seed: int) -> dict[str, Any]:
    """One fine-tune."""
    start = time.process_time()
    metrics = evaluator.train(placement, seed=seed).metrics
    return {
        "placement": evaluator.space.names(placement),
        "seed": seed,
        "loss": metrics["loss"],
        "top1": 100 * metrics["top1"],
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def finish(rows: Rows, evaluator: TrainingEvaluator, size: Size, path: Path) -> None:
    """Write all rows, and print the best and the original by seed."""
    found = rows.values()
    lines = []
    for seed in sorted({row["seed"] for row in found}):
        own = [row for row in found if row["seed"] == seed]
        plain = [row["loss"] for row in own if not row["placement"]]
        best = min(own, key=lambda row: float(row["loss"]))
        told = ", ".join(f"{layer} {label}" for layer, label in best["placement"].items())
        lines.append((seed, len(own), plain[0] if plain else None, best["loss"], told or "the original"))
    table(("seed", "fine-tunes", "original's loss", "lowest", "of"), lines)
    settings = {"layers": {"space": size.space, "singles": size.singles}, "test": size.test}
    settings |= {"options": evaluator.space.labels, "training": evaluator.config.at(0).to_dict()}
    write_json(path, {"settings": settings, "rows": found})
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
