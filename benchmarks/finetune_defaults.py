"""How fast should new parameters learn, and how long should the rates warm up? The defaults of `surgeon finetune` come from here.

    python -m benchmarks.finetune_defaults [--quick] [--types acda …] [--fresh]

The trained CIFAR ResNet-20 is converted and all of it fine-tuned on CIFAR-10 images (kept as JPEG, on which it loses ten points),
with every combination of `new_lr_scale` and `warmup`; and the unconverted network with the same steps. The last weights
are evaluated, not the best. Writes benchmarks/results/finetune_defaults.json; resumes if interrupted.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn
from tqdm import tqdm

import surgeon
from benchmarks import _data as data
from benchmarks._cifar import TEST_SET, TRAIN_SET, CifarTask
from benchmarks._results import RESULTS, Rows, table, write_json
from surgeon.errors import TrainingError
from surgeon.zoo import create, load_foreign
from surgeon.zoo.finetune import FinetuneConfig, finetune
from surgeon.zoo.tasks import Task, TaskConfig

WEIGHTS = "weights/{}10.pth"
NETWORK = "resnet20_cifar"
NEEDS = (WEIGHTS.format(NETWORK), TRAIN_SET, TEST_SET)
CONV = "conv"


@dataclass(frozen=True)
class Size:
    """How much of a study is run."""

    layers: str
    steps: int
    batch: int
    test: int
    rates: tuple[float, ...]
    scales: tuple[float, ...]
    warmups: tuple[str, ...]
    seeds: int
    options: dict[str, dict[str, Any]]


FULL = Size(
    layers="layer2,layer3",
    steps=48,
    batch=32,
    test=1000,
    rates=(1e-3,),
    scales=(0.03, 0.1, 0.3, 1.0),
    warmups=("0", "20%"),
    seeds=2,
    options={"acda": {}, "pafu": {}, "sekg": {}},
)
QUICK = Size(
    layers="layer2,layer3",
    steps=16,
    batch=32,
    test=400,
    rates=(3e-4,),
    scales=(0.1, 0.3, 1.0),
    warmups=("0", "20%"),
    seeds=1,
    options={"acda": {"scales": 1}, "pafu": {"group_size": 4}, "sekg": {}},
)


# --- the study ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    lacking = data.missing(NEEDS, args.data)
    if lacking:
        print(f"not in {args.data}: {', '.join(lacking)}", file=sys.stderr)
        return 2
    name = "finetune_defaults-quick" if args.quick else "finetune_defaults"
    size = QUICK if args.quick else FULL
    rows = Rows(args.results / f"{name}.jsonl", fresh=args.fresh)
    task = CifarTask(TaskConfig(data=args.data, val_limit=size.test))
    for settings in tqdm(list(combinations(size, args.types)), desc="runs", disable=None):
        key = "/".join(map(str, settings.values()))
        if key not in rows:
            rows.add(key, settings | one(task, size, args.data, **settings))
    finish(rows, size, args.results / f"{name}.json")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, settings and images")
    parser.add_argument("--types", nargs="+", choices=tuple(FULL.options), default=tuple(FULL.options))
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted run")
    parser.add_argument("--data", type=Path, default=data.data_folder(), help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    return parser


def combinations(size: Size, types: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Settings of every run; for the unconverted network the scale has no meaning."""
    for seed, rate, warmup in product(range(size.seeds), size.rates, size.warmups):
        yield {"type": CONV, "lr": rate, "scale": 1.0, "warmup": warmup, "seed": seed}
        for kind, scale in product(types, size.scales):
            yield {"type": kind, "lr": rate, "scale": scale, "warmup": warmup, "seed": seed}


def one(
    task: Task, size: Size, folder: Path, *, type: str, lr: float, scale: float, warmup: str, seed: int
) -> dict[str, Any]:
    """One run: metrics before and after it."""
    model = network(folder)
    if type != CONV:
        model, _ = surgeon.convert(model, layers=size.layers, type=type, input_size=(3, 32, 32), **size.options[type])
    config = FinetuneConfig(
        max_steps=size.steps,
        epochs=1000.0,
        batch_size=size.batch,
        eval_batch_size=250,
        lr=lr,
        new_lr_scale=scale,
        warmup=warmup,
        seed=seed,
        keep="last",
        recalibrate=0,
        eval_every="100%",
        checkpoint_every="25%",
    )
    try:
        summary = finetune(model, task, config).summary
    except TrainingError as error:
        return {"loss": None, "top1": None, "failed": str(error)}
    before, after = summary.start.metrics, summary.result.metrics
    return {
        "loss": after["loss"],
        "top1": 100 * after["top1"],
        "loss_before": before["loss"],
        "top1_before": 100 * before["top1"],
        "rollbacks": summary.rollbacks,
        "seconds": round(summary.seconds, 1),
    }


def network(folder: Path, name: str = NETWORK) -> nn.Module:
    """A trained CIFAR ResNet."""
    model = create(name)
    load_foreign(model, folder / WEIGHTS.format(name), network=name)
    return model.eval()


def finish(rows: Rows, size: Size, path: Path) -> None:
    """Write the rows, and print the means over the seeds."""
    table(*lines(rows.values()))
    settings = {key: value for key, value in vars(size).items() if key != "options"}
    write_json(path, {"settings": settings | {"options": size.options}, "rows": rows.values()})


def lines(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers, and a line for every type, rate and warm-up: means over the seeds by the scale of the new rate."""
    scales = sorted({row["scale"] for row in rows})
    lines = []
    for kind, rate, warmup in dict.fromkeys((row["type"], row["lr"], row["warmup"]) for row in rows):
        line = [kind, f"{rate:g}", warmup]
        for scale in scales:
            found = [
                row
                for row in rows
                if (row["type"], row["lr"], row["warmup"], row["scale"]) == (kind, rate, warmup, scale)
            ]
            line.append(_cell(found))
        lines.append(line)
    return ["type", "lr", "warm-up", *(f"new x {scale:g}" for scale in scales)], lines


def _cell(found: list[dict[str, Any]]) -> str:
    """Mean loss, mean top-1 and the number of seeds; runs that failed are counted."""
    good = [row for row in found if row["loss"] is not None]
    told = ""
    if good:
        told = f"{mean(row['loss'] for row in good):.3f} / {mean(row['top1'] for row in good):.1f} ({len(good)})"
    if len(good) < len(found):
        told += f" {len(found) - len(good)} failed"
    return told.strip()


if __name__ == "__main__":
    sys.exit(main())
