"""The cost table against whole traces of random placements, its speed, and the ACDA paper's Table 6.

    python -m benchmarks.cost_table [--models resnet50 convnext_atto efficientnet_b0] [--placements 50] [--batch-size 32]

Prints the largest errors in FLOPs, parameters and peak memory, seconds to build, look-ups per second, seconds of a whole trace,
and writes benchmarks/results/cost_table.json.
"""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from benchmarks._results import RESULTS, table, write_json
from surgeon.costs import CostTable, Option, cost, cost_table
from surgeon.costs.build import option_layer
from surgeon.layers.base import LayerConfig
from surgeon.layers.registry import layer_types
from surgeon.sites.sites import find_sites

MODELS = ("resnet50", "convnext_atto", "efficientnet_b0")
OPTIONS = (
    *(
        Option("acda", {}),
        Option("acda", {"atoms": 3, "scales": 2}),
        Option("pafu", {}),
        Option("pafu", {"group_size": 4}),
    ),
    *(Option("sekg", {}), Option("sekg", {"kernel_size": 5})),
)
LOOK_UPS = 100_000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--placements", type=int, default=50, metavar="N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    options = [option for option in OPTIONS if option.type in layer_types()]
    rows = [check(name, options, args.placements, args.batch_size) for name in args.models]
    header = ("model", "layers", "options", "build s", "look-ups/s", "trace s", "FLOPs err", "params err", "memory err")
    keys = (
        "model",
        "layers",
        "options",
        "build_s",
        "look_ups_per_s",
        "trace_s",
        "flops_error",
        "params_error",
        "memory_error",
    )
    table(header, [[_text(key, row[key]) for key in keys] for row in rows])
    write_json(args.results / "cost_table.json", {"placements": args.placements, "rows": rows})
    print(f"written: {args.results / 'cost_table.json'}")
    return 0


def _text(key: str, value: Any) -> str:
    if key.endswith("_error"):
        return f"{value:.4%}"
    return f"{value:.2f}" if key.endswith("_s") and key != "look_ups_per_s" else f"{value}"


def check(name: str, options: list[Option], placements: int, batch: int) -> dict[str, Any]:
    """Compare the table of one model with whole traces."""
    model = timm.create_model(name)
    start = time.perf_counter()
    costs = cost_table(model, options, batch_size=batch, cache=False)
    build = time.perf_counter() - start
    rng = np.random.default_rng(0)
    geometries = {site.name: site.geometry for site in find_sites(model).convs}
    configs: dict[Any, LayerConfig] = {}
    worst = {"flops_error": 0.0, "params_error": 0.0, "memory_error": 0.0}
    trace = []
    for placement in random_placements(costs, placements, rng):
        work = copy.deepcopy(model)
        for layer, choice in zip(costs.layers, placement, strict=True):
            geometry = geometries[layer]
            if choice and geometry is not None:
                work.set_submodule(layer, option_layer(geometry, options[choice - 1], configs))
        start = time.perf_counter()
        whole = cost(work, batch_size=batch)
        trace.append(time.perf_counter() - start)
        found = costs.look_up(placement)
        for key, mine, theirs in (
            ("flops_error", found.flops[0], whole.flops),
            ("params_error", found.params[0], whole.params),
            ("memory_error", found.peak_bytes[0], whole.peak_bytes),
        ):
            worst[key] = max(worst[key], abs(float(mine) / theirs - 1))
    many = random_placements(costs, LOOK_UPS, rng)
    start = time.perf_counter()
    costs.look_up(many)
    return {
        "model": name,
        "layers": len(costs.layers),
        "options": len(costs.options),
        "build_s": build,
        "look_ups_per_s": round(LOOK_UPS / (time.perf_counter() - start)),
        "trace_s": float(np.median(trace)),
        **worst,
    }


def random_placements(costs: CostTable, count: int, rng: np.random.Generator) -> Any:
    """(count, L) options, each allowed for its layer, about half of the layers kept."""
    scores = np.where(costs.allowed[None], rng.random((count, *costs.allowed.shape)), -1.0)
    scores[:, :, 0] *= rng.random((count, 1)) * 2
    return scores.argmax(axis=2)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
