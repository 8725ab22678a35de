"""Duration of a conversion: resnet50, all spatial convolutions, each layer type, verified, in process.

    python -m benchmarks.convert_speed [--model NAME] [--types acda …] [--repeat 3]

Prints seconds by stage of the pass (the fastest of the repeats) and writes benchmarks/results/convert_speed.json. The target is
at most 10 s on 2 cores. Building the model and importing are not counted.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import nn

import surgeon
from benchmarks._results import RESULTS, table, write_json

TYPES = ("acda", "pafu", "sekg")
AIM = 10.0  # seconds, 2 cores


class Stopwatch:
    """A `progress` callable that books the time since the last call under the stage that call was about."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a timm name (default: %(default)s)")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--size", type=int, default=224, help="of the example image (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()
    rows = [measure(model, kind, args.size, args.repeat) for kind in args.types]
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages"]))
    lines = [
        (row["type"], row["replaced"], f"{row['seconds']:.2f}", *(f"{row['stages'].get(s, 0):.2f}" for s in stages))
        for row in rows
    ]
    print(f"{args.model}, all spatial convolutions, verified; seconds, fastest of {args.repeat}")
    table(("type", "replaced", "total", *stages), lines)
    path = args.results / "convert_speed.json"
    write_json(path, {"model": args.model, "size": args.size, "aim_seconds": AIM, "rows": rows})
    print(f"written: {path}")
    return 0


def measure(model: nn.Module, kind: str, size: int, repeat: int) -> dict[str, object]:
    """The fastest of `repeat` conversions of the same model."""
    best: dict[str, object] = {}
    example = torch.rand(1, 3, size, size)
    for _ in range(repeat):
        watch = Stopwatch()
        start = time.perf_counter()
        _, report = surgeon.convert(model, layers="all", type=kind, example_inputs=example, progress=watch)
        seconds = time.perf_counter() - start
        if not best or seconds < best["seconds"]:
            watch.seconds["other"] = max(seconds - sum(watch.seconds.values()), 0.0)
            best = {
                "type": kind,
                "replaced": len(report.replaced),
                "seconds": seconds,
                "stages": watch.seconds,
                "max_rel_error": report.max_rel_error,
                "precision": report.precision,
            }
    return best


if __name__ == "__main__":
    sys.exit(main())
