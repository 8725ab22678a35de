"""Operators, the Ad-ResNet-s iteration, memory predictions and a search under a memory budget, on one GPU in 8 minutes.

    python -m benchmarks.gpu [--minutes 8] [--only operators training memory search]

Prints tables and writes benchmarks/results/gpu.json. Parts that did not fit in the time are listed. Without
CUDA it prints one line and exits 1.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from benchmarks import memory_accuracy
from benchmarks._gpu_operators import cases, compare, measure
from benchmarks._results import RESULTS, table, write_json
from surgeon import zoo
from surgeon.cli import main as surgeon_main
from surgeon.costs.measure import interleaved
from surgeon.costs.measure import measure as measure_memory
from surgeon.costs.settings import make_settings
from surgeon.layers.ops.dispatch import ENVIRONMENT

DTYPES = (torch.bfloat16, torch.float32)
MEMORY_MODELS = ("resnet18", "resnet50", "convnext_tiny", "densenet121", "efficientnet_b0")
SEARCH_BUDGET = 3 << 30  # bytes: the process may not allocate more
Row = dict[str, Any]


class Deadline:
    """When no new row is begun; what was left out is kept by name."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def allows(self, what: str) -> bool:
        if time.monotonic() < self.end:
            return True
        self.left_out.append(what)
        return False


def operators(device: torch.device, deadline: Deadline, shapes: Any = None, repeats: int = 20) -> Iterator[Row]:
    """One row for every operator, shape and dtype."""
    for dtype in DTYPES:
        for case in cases(shapes):
            name = str(dtype).removeprefix("torch.")
            if deadline.allows(f"{case.name} {case.shape} {name}"):
                steps = measure(case, device, dtype, repeats)
                yield {"case": case.name, "shape": case.shape, "dtype": name, "steps": steps}


def training(
    device: torch.device,
    deadline: Deadline,
    batch: int = 64,
    size: int = 224,
    backends: Sequence[str] = ("triton", "torch"),
) -> Iterator[Row]:
    """A training iteration of Ad-ResNet-s and of its convolutional twin (ACDA, Table 7): seconds, and bytes by the allocator."""
    for amp in (False, "bfloat16"):
        twin: nn.Module = zoo.create("ad_resnet_s_conv")
        settings = make_settings(twin, input_size=(3, size, size), batch_size=batch, amp=amp)
        for backend in backends:
            what = f"ad_resnet_s {'AMP' if amp else 'float32'} on {backend}"
            if not deadline.allows(what):
                continue
            with environment(ENVIRONMENT, backend):
                models = [zoo.create("ad_resnet_s"), twin]
                times = interleaved(models, settings, rounds=10, device=device.type)
                peaks = [measure_memory(m, settings).peak_bytes if device.type == "cuda" else 0 for m in models]
            yield {
                "what": what,
                "batch": batch,
                "seconds": [t.median for t in times],
                "peak_bytes": peaks,
                "time_ratio": times[0].median / times[1].median,
                "memory_ratio": peaks[0] / peaks[1] if peaks[1] else None,
            }


def memory(deadline: Deadline, models: Sequence[str] = MEMORY_MODELS) -> Iterator[Row]:
    """Predicted against measured peak memory, as `benchmarks.memory_accuracy` has it."""
    for name in models:
        placements: list[Any] = [{}, memory_accuracy._placement(name)]
        for key, case in memory_accuracy._cases(name, placements, [32], ["train", "train-amp"]):
            if deadline.allows(f"memory of {key}"):
                yield {"key": key} | memory_accuracy._row(name, **case)


def search(device: torch.device, deadline: Deadline, budget: int = SEARCH_BUDGET, **given: str) -> Iterator[Row]:
    """A short search whose process may not allocate more than the budget that the search was given, bytes."""
    if not deadline.allows("search under a memory budget"):
        return
    cuda = device.type == "cuda"
    chosen = {"trials": "6", "steps": "20", "batch-size": "64"}
    chosen |= {key.replace("_", "-"): value for key, value in given.items()} | {"device": "auto" if cuda else "cpu"}
    model = "resnet18"
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "search"
        colored_images(data)
        arguments = ["search", model, "--task", "classification", "--data", str(data), "--weights", "random", "--json"]
        arguments += ["--max-memory", str(budget), "--gains", "uniform", "--quiet", "-o", str(out)]
        arguments += [word for key, value in chosen.items() for word in (f"--{key}", value)]
        if cuda:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(budget / total)
            torch.cuda.reset_peak_memory_stats()
        printed, start = io.StringIO(), time.monotonic()
        try:
            with contextlib.redirect_stdout(printed):
                code = surgeon_main(arguments)
        finally:
            if cuda:
                torch.cuda.set_per_process_memory_fraction(1.0)
        yield {
            "what": f"{model}, {chosen['trials']} trials",
            "budget_bytes": budget,
            "exit": code,
            "seconds": time.monotonic() - start,
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
            "result": json.loads(printed.getvalue() or "null"),
        }


def colored_images(folder: Path, classes: int = 2, each: int = 64, size: int = 64) -> None:
    """An image folder whose classes differ in color, for trainings that need no download."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(each if split == "train" else each // 4):
                pixels = torch.randint(0, 200, (size, size, 3), generator=generator, dtype=torch.uint8)
                pixels[..., label] += 55
                Image.fromarray(pixels.numpy()).save(folder / split / f"class{label}" / f"{number}.png")


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """An environment variable, for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def operator_lines(rows: list[Row]) -> list[tuple[Any, ...]]:
    """A line for every step of every operator row."""
    return [
        (f"{row['case']} {row['shape']} {row['dtype']}", name, *_numbers(step))
        for row in rows
        for name, step in row["steps"].items()
    ]


def _numbers(step: Row) -> tuple[str, str, str, str]:
    if "error" in step:
        return step["error"], "", "", ""
    return f"{step['forward_ms']:.3f}", f"{step['both_ms']:.3f}", f"{step['peak_bytes'] / 1e6:.0f}", step["timed"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="no row is begun afterwards (default: %(default)s)")
    names = ("operators", "training", "memory", "search")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and this machine has none", file=sys.stderr)
        return 1
    warnings.simplefilter("ignore")
    device, deadline = torch.device("cuda"), Deadline(args.minutes)
    sections: dict[str, Callable[[], Iterator[Row]]] = {
        "operators": lambda: operators(device, deadline),
        "training": lambda: training(device, deadline),
        "memory": lambda: memory(deadline),
        "search": lambda: search(device, deadline),
    }
    content: dict[str, Any] = {}
    # The short sections first: the operators may take what is left of the time.
    for name in sorted(args.only, key=lambda name: name == "operators"):
        content[name] = []
        for row in sections[name]():
            content[name].append(row)
            print(f"{name}: {row.get('what') or row.get('key') or row['case']}", file=sys.stderr, flush=True)
            write_json(args.results / "gpu.json", content | {"left_out": deadline.left_out})
    report(content, deadline)
    write_json(args.results / "gpu.json", content | {"left_out": deadline.left_out})
    print(f"written: {args.results / 'gpu.json'}")
    return 0


def report(content: dict[str, Any], deadline: Deadline) -> None:
    """Print every section that has rows, the operators with their targets."""
    if content.get("operators"):
        table(("case", "step", "forward ms", "fwd+bwd ms", "peak MB", "timed"), operator_lines(content["operators"]))
        content["targets"] = compare(content["operators"])
        lines = [(r["what"], f"{r['ratio']:.3g}", r["must"], r["aim"], r["met"]) for r in content["targets"]]
        table(("ratio", "measured", "must", "aim", "met"), lines)
    if content.get("training"):
        lines = [(r["what"], f"{r['time_ratio']:.3g}", f"{r['memory_ratio'] or 0:.3g}") for r in content["training"]]
        table(("training step against the convolutional twin", "time (must <= 0.87)", "memory (must <= 1.24)"), lines)
    if content.get("memory"):
        lines = [
            (r["key"], f"{r['predicted'] / 2**20:.0f}", f"{r['measured'] / 2**20:.0f}", f"{r['error']:+.2%}")
            for r in content["memory"]
        ]
        table(("memory", "predicted MiB", "measured MiB", "error"), lines)
    for row in content.get("search", []):
        print(
            f"search {row['what']}: exit {row['exit']}, "
            f"peak {row['peak_bytes'] / 2**20:.0f} of {row['budget_bytes'] / 2**20:.0f} MiB"
        )
    if deadline.left_out:
        print(f"left out for want of time: {', '.join(deadline.left_out)}")


if __name__ == "__main__":
    sys.exit(main())
