"""Converting a trained network preserves its function: all spatial convolutions, each layer type, on real data.

    python -m benchmarks.trained [--quick] [--only NAME …] [--types acda …] [--originals] [--fresh]

Targets: the same class for every image, the PSNR of every image to 0.001 dB, every count to 0.01. Writes
benchmarks/results/trained.json; resumes if interrupted. Exit code 1 if something was lost.
"""

import argparse
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
from benchmarks._results import RESULTS, Rows, table, write_json
from benchmarks._tasks import TASKS, Score, Task, evaluate

TYPES = ("acda", "pafu", "sekg")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    name = "trained-quick" if args.quick else "trained"
    rows = Rows(args.results / f"{name}.jsonl", fresh=args.fresh)
    skipped: dict[str, str] = {}
    for task in (TASKS[key] for key in args.only):
        lacking = data.missing(task.needs, args.data)
        if lacking:
            skipped[task.name] = f"not in {args.data}: {', '.join(lacking)}"
            continue
        run_task(task, rows, args)
    finish(rows, skipped, args.results / f"{name}.json")
    return int(any(not dataset["kept"] for row in rows.values() for dataset in row["datasets"].values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images of every dataset")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--originals", action="store_true", help="only the networks as they are")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted run")
    parser.add_argument("--data", type=Path, default=data.data_folder(), help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    return parser


def run_task(task: Task, rows: Rows, args: argparse.Namespace) -> None:
    """Evaluate the original once, and every type that has no row yet."""
    types = [] if args.originals else [kind for kind in args.types if f"{task.name}/{kind}" not in rows]
    if not types and f"{task.name}/original" in rows:
        return
    limit = task.quick if args.quick else None
    model = task.build(args.data)
    start = time.perf_counter()
    original = scored(model, task, args.data, limit, "original")
    rows.add(
        f"{task.name}/original",
        {"network": task.name, "type": "original", "seconds_evaluate": round(time.perf_counter() - start, 1)}
        | {"datasets": compare(original, original, task)},
    )
    for kind in types:
        converted, facts = convert(model, task, kind, args.data)
        start = time.perf_counter()
        scores = scored(converted, task, args.data, limit, kind)
        facts["seconds_evaluate"] = round(time.perf_counter() - start, 1)
        facts["datasets"] = compare(original, scores, task)
        rows.add(f"{task.name}/{kind}", {"network": task.name, "type": kind} | facts)


def convert(model: nn.Module, task: Task, kind: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Convert every spatial convolution; what the report says of it."""
    torch.manual_seed(0)
    start = time.perf_counter()
    converted, report = surgeon.convert(model, layers="all", type=kind, example_inputs=task.calibration(folder, 2))
    refused = [{"name": site.name, "reasons": list(site.reasons)} for site in report.skipped if site.selected]
    return converted, {
        "seconds_convert": round(time.perf_counter() - start, 1),
        "replaced": len(report.replaced),
        "refused": refused,
        "max_rel_error": report.max_rel_error,
        "precision": report.precision,
    }


def scored(model: nn.Module, task: Task, folder: Path, limit: int | None, label: str) -> dict[str, Score]:
    """`evaluate` with a progress bar."""
    with tqdm(desc=f"{task.name} {label}", unit="img", leave=False, disable=None) as bar:
        return evaluate(model, task, folder, limit=limit, progress=bar.update)


def compare(original: dict[str, Score], other: dict[str, Score], task: Task) -> dict[str, dict[str, Any]]:
    """By dataset: both scores, the largest difference of an image, and whether that is nothing lost."""
    out: dict[str, dict[str, Any]] = {}
    for name, score in original.items():
        difference = score.difference(other[name])
        out[name] = {
            "unit": task.unit,
            "images": len(score.values),
            "original": score.summary,
            "converted": other[name].summary,
            "difference": difference,
            "allowed": score.allowed,
            "kept": difference <= score.allowed,
            "published": task.published.get(name),
        }
    return out


def finish(rows: Rows, skipped: dict[str, str], path: Path) -> None:
    """Print the table and write the JSON."""
    lines = []
    for row in rows.values():
        for name, d in row["datasets"].items():
            scores = (f"{d['original']:.4f}", f"{d['converted']:.4f}", d["unit"], f"{d['difference']:.2g}", d["kept"])
            facts = (row.get("replaced"), len(row.get("refused", [])), row.get("max_rel_error"))
            lines.append((row["network"], row["type"], *facts, name, d["images"], *scores))
    headers = ("network", "type", "replaced", "refused", "rel. error", "data", "images", "original", "converted")
    table((*headers, "unit", "max change", "kept"), lines)
    print("\nmax change: images with another class, or the largest change of one image's PSNR (dB) or count.")
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    write_json(path, {"rows": rows.values(), "skipped": skipped})
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
