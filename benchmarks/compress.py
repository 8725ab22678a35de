"""The cost of compressed ACDA: `static_atoms=0` at m atoms, plain against activation-aware truncation, on real data.

    python -m benchmarks.compress [--atoms 4 6 8] [--only NAME …] [--every-image] [--fresh]

The activation-aware truncation uses calibration images that are not test images. *output error* is the relative
RMS error of the network's output on those; the target is: never larger than that of the plain one. *layer error* is that of
a replaced layer given its inputs in the original (root mean square over the layers); the aware one may trade it
for undoing what earlier layers lost. *re-estimated*: the score after recomputing the batch-norm statistics on the same images.
Writes benchmarks/results/compress.json; resumes if interrupted. Exit code 1 if the aware one is worse.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import surgeon
from benchmarks import _data as data
from benchmarks._results import RESULTS, Rows, table, write_json
from benchmarks._tasks import TASKS, Score, Task, evaluate
from surgeon.layers.base import DynamicConv2d
from surgeon.layers.norm import SignalNorm


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    rows = Rows(args.results / f"{args.name}.jsonl", fresh=args.fresh)
    skipped: dict[str, str] = {}
    for task in (TASKS[key] for key in args.only):
        lacking = data.missing(task.needs, args.data)
        if lacking:
            skipped[task.name] = f"not in {args.data}: {', '.join(lacking)}"
            continue
        run_task(task, rows, args)
    return finish(rows.values(), skipped, args.results / f"{args.name}.json")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", nargs="+", type=int, default=[4, 6, 8], metavar="M")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help=", ".join(TASKS))
    parser.add_argument(
        "--every-image", action="store_true", help="all test images (default: a part of the large sets)"
    )
    parser.add_argument("--quick", action="store_true", help="very few test images")
    parser.add_argument("--calibration", type=int, help="images for calibration (default: 256 for CIFAR, otherwise 32)")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted run")
    parser.add_argument("--data", type=Path, default=data.data_folder(), help="default: %(default)s")
    parser.add_argument("--name", default="compress", help="of the results (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    return parser


def run_task(task: Task, rows: Rows, args: argparse.Namespace) -> None:
    """All rows of one network that are not there yet."""
    wanted = [(m, aware) for m in args.atoms for aware in (False, True) if _key(task, m, aware) not in rows]
    if not wanted:
        return
    limit = None if args.every_image else task.quick if args.quick else 4 * task.quick
    model = task.build(args.data)
    inputs = task.calibration(args.data, args.calibration or task.calibrate)
    scores = _scored(model, task, args.data, limit, "original")
    images, original = {name: len(score.values) for name, score in scores.items()}, _summaries(scores)
    for atoms, aware in wanted:
        label = f"m={atoms} {'aware' if aware else 'plain'}"
        torch.manual_seed(0)
        converted, report = surgeon.convert(
            model,
            layers="all",
            type="acda",
            example_inputs=task.calibration(args.data, 2),
            atoms=atoms,
            static_atoms=0,
            calibration=inputs if aware else None,
        )
        layer_error, output_error = errors(model, converted, inputs)
        facts = {
            "network": task.name,
            "atoms": atoms,
            "truncation": "aware" if aware else "plain",
            "replaced": len(report.replaced),
            "parameters": [report.params_before, report.params_after],
            "macs": [report.macs_before, report.macs_after],
            "layer_error": layer_error,
            "output_error": output_error,
            "unit": task.unit,
            "images": images,
            "original": original,
            "scores": _summaries(_scored(converted, task, args.data, limit, label)),
        }
        if reestimate(converted, inputs):
            facts["reestimated"] = _summaries(_scored(converted, task, args.data, limit, f"{label} re-estimated"))
        rows.add(_key(task, atoms, aware), facts)


def _key(task: Task, atoms: int, aware: bool) -> str:
    return f"{task.name}/{atoms}/{'aware' if aware else 'plain'}"


def _scored(model: nn.Module, task: Task, folder: Path, limit: int | None, label: str) -> dict[str, Score]:
    with tqdm(desc=f"{task.name} {label}", unit="img", leave=False, disable=None) as bar:
        return evaluate(model, task, folder, limit=limit, split="test", progress=bar.update)


def _summaries(scores: dict[str, Score]) -> dict[str, float]:
    return {name: score.summary for name, score in scores.items()}


def errors(original: nn.Module, converted: nn.Module, inputs: tuple[Any, ...]) -> tuple[float, float]:
    """(layer error, output error) on these inputs; see the module's docstring."""
    sums: dict[str, list[float]] = {}

    def compare(name: str, layer: DynamicConv2d) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += float((layer(*args) - out).square().sum())
            total[1] += float(out.square().sum())

        return hook

    layers = {name: m for name, m in converted.named_modules() if isinstance(m, DynamicConv2d)}
    handles = [original.get_submodule(n).register_forward_hook(compare(n, layer)) for n, layer in layers.items()]
    try:
        with torch.no_grad():
            out = original.eval()(*inputs)
            difference = float((converted.eval()(*inputs) - out).square().sum())
    finally:
        for handle in handles:
            handle.remove()
    relative = [a / b for a, b in sums.values() if b > 0]
    return math.sqrt(sum(relative) / len(relative)), math.sqrt(difference / float(out.square().sum()))


def reestimate(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Measure the model's batch-norm statistics again on these inputs, in place; False where it has none of its own."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    norms = [norm for norm in norms if not isinstance(norm, SignalNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0  # only what is seen now counts
        norm.train()
    if norms:
        with torch.no_grad():
            model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return bool(norms)


def finish(rows: list[dict[str, Any]], skipped: dict[str, str], path: Path) -> int:
    """Print the table, write the JSON; 1 where the activation-aware truncation has the larger output error."""
    by_key = {(row["network"], row["atoms"], row["truncation"]): row for row in rows}
    worse = [
        f"{network} m={atoms}"
        for (network, atoms, truncation), row in by_key.items()
        if truncation == "aware"
        and (plain := by_key.get((network, atoms, "plain"))) is not None
        and row["output_error"] > plain["output_error"] * (1 + 1e-6)
    ]
    lines = [
        (
            *(row["network"], row["atoms"], row["truncation"]),
            *(f"{row['layer_error']:.5f}", f"{row['output_error']:.5f}"),
            *(f"{row['parameters'][1] / row['parameters'][0]:.2f}", _joined(row["original"]), _joined(row["scores"])),
            _joined(row.get("reestimated")),
            row["unit"],
        )
        for row in rows
    ]
    headers = ("network", "m", "truncation", "layer error", "output error", "params x", "original", "compressed")
    table((*headers, "re-estimated", "unit"), lines)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    write_json(path, {"rows": rows, "skipped": skipped, "aware_is_worse": worse})
    print(f"activation-aware worse in output error: {', '.join(worse) or 'never'}; written: {path}")
    return int(bool(worse))


def _joined(scores: dict[str, float] | None) -> str:
    return " / ".join(f"{value:.2f}" for value in scores.values()) if scores else "-"


if __name__ == "__main__":
    sys.exit(main())
