"""Peak memory of one 4-megapixel image through a dynamic layer, compared with the convolution that it replaces; inference.

    python -m benchmarks.large_image [--size 2048] [--channels 32]

Each layer runs in a separate process, one thread; the growth of resident memory over the input and the weights is
measured (Linux: VmHWM). "acda, whole" is ACDA with its bands switched off. Writes benchmarks/results/large_image.json;
resumes if interrupted.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks._bench import in_subprocess, peak_rss
from benchmarks._models import awaken_kernels
from benchmarks._results import RESULTS, Rows, table, write_json
from surgeon.layers import ACDAConv2d, PAFUConv2d, SEKGConv2d
from surgeon.layers.acda import layer as acda


def _conv(channels: int, depthwise: bool = False) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels if depthwise else 1)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "conv 3×3": _conv,
    "conv 7×7": lambda channels: nn.Conv2d(channels, channels, 7, padding=3),
    "conv 3×3, depthwise": lambda channels: _conv(channels, True),
    "dconv, depthwise": lambda channels: SEKGConv2d.from_conv(_conv(channels, True)),
    "dconv behind a conv": lambda channels: SEKGConv2d.from_conv(_conv(channels)),
    "acda": lambda channels: ACDAConv2d.from_conv(_conv(channels)),
    "acda, whole": lambda channels: ACDAConv2d.from_conv(_conv(channels)),
    "pafu": lambda channels: PAFUConv2d.from_conv(_conv(channels)),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048, metavar="N", help="height and width (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=list(LAYERS), default=list(LAYERS), metavar="LAYER")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted or finished run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one, args.size, args.channels)))
        return 0
    rows = Rows(args.results / "large_image.jsonl", fresh=args.fresh)
    for name in args.only:
        key = f"{name} {args.channels}x{args.size}"
        if key not in rows:
            words = ["--one", name, "--size", str(args.size), "--channels", str(args.channels)]
            where = {"layer": name, "size": args.size, "channels": args.channels}
            rows.add(key, where | in_subprocess("benchmarks.large_image", words, 1))
            write_json(args.results / "large_image.json", {"rows": rows.values()})
    table(*lines(rows.values()))
    write_json(args.results / "large_image.json", {"rows": rows.values()})
    return 0


def measure(name: str, size: int, channels: int) -> dict[str, Any]:
    """Growth in bytes and seconds of one forward pass; to be run in a fresh process."""
    torch.manual_seed(0)
    layer = LAYERS[name](channels).eval()
    awaken_kernels(layer, std=0.01)  # a generator at zero would be folded by nobody, but should not be special
    with torch.no_grad():
        if name == "acda, whole":
            acda.BAND_BYTES = 1 << 60
        layer(torch.randn(1, channels, 16, 16))  # what is loaded at the first call
        x = torch.randn(1, channels, size, size)
        before, started = peak_rss(), time.process_time()
        y = layer(x)
        cpu_s = time.process_time() - started
    return {"growth_bytes": peak_rss() - before, "output_bytes": y.numel() * y.element_size(), "cpu_s": cpu_s}


def lines(rows: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[list[Any]]]:
    """Growth, and its ratio to that of the 3×3 convolution."""
    plain = next((row["growth_bytes"] for row in rows if row["layer"] == "conv 3×3"), None)
    found = [
        [
            row["layer"],
            f"{row['growth_bytes'] / 2**20:,.0f}",
            "-" if plain is None else f"{row['growth_bytes'] / plain:.2f}",
            f"{row['cpu_s']:.1f}",
        ]
        for row in rows
    ]
    return ("layer", "growth, MiB", "/ conv 3×3", "CPU, s"), found


if __name__ == "__main__":
    sys.exit(main())
