"""ACDA's generator in its three forms: its cost, and its effect on the pattern-detection toy.

    python -m benchmarks.generators [--seeds N] [--steps N] [--repeats N] [--only cost toy] [--fresh]

cost: multiply-accumulates of the generator relative to those of the replaced 3×3 convolution, and process CPU time (one
thread, interleaved medians) of the whole layer over that convolution's, forward without gradients and forward with backward, on
the shapes A to D of benchmarks.operators. toy: one ACDA layer in place of a 7×7 convolution, the same steps for each form
and seed (see benchmarks.toys); mean squared error on the training image. Writes benchmarks/results/generators.json;
resumes if interrupted.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._bench import interleaved
from benchmarks._operator_cases import SHAPES
from benchmarks._results import RESULTS, Rows, table, write_json
from benchmarks.toys import QUICK_STEPS
from benchmarks.toys import run as run_toy
from surgeon.layers.acda import ACDAConfig, ACDAConv2d

FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "separable": {"generator": "separable"},
    "lowrank 16": {"generator": "lowrank", "generator_rank": 16},
    "lowrank 4": {"generator": "lowrank", "generator_rank": 4},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--steps", type=int, default=QUICK_STEPS["pattern"], metavar="N", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--only", nargs="+", choices=("cost", "toy"), default=["cost", "toy"])
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted or finished run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = Rows(args.results / "generators.jsonl", fresh=args.fresh)
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if "cost" in args.only:
        jobs += [(f"cost/{shape}", partial(cost, shape, args.repeats)) for shape in args.shapes]
    if "toy" in args.only:
        jobs += [(f"toy/{form}/{s}", partial(toy, form, s, args.steps)) for s in range(args.seeds) for form in FORMS]
    for key, job in jobs:
        if key not in rows:
            rows.add(key, job())
            write_json(args.results / "generators.json", {"rows": rows.values()})
    table(*cost_table(rows.values()))
    print()
    table(*toy_table(rows.values()))
    write_json(args.results / "generators.json", {"rows": rows.values()})
    return 0


def cost(shape: str, repeats: int) -> dict[str, Any]:
    """MACs and CPU times of every form on one shape, the convolution beside them."""
    n, c, size = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(n, c, size, size, requires_grad=True)
    conv = nn.Conv2d(c, c, 3, padding=1)
    layers = {form: ACDAConv2d.from_conv(conv, ACDAConfig(**options)) for form, options in FORMS.items()}
    modules: dict[str, nn.Module] = {"conv3": conv, **layers}

    def forward(module: nn.Module) -> Tensor:
        with torch.no_grad():
            y: Tensor = module(x)
            return y

    def both(module: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x).sum(), [x, *module.parameters()], allow_unused=True)

    times = {
        kind: [cpu for cpu, _ in interleaved([partial(run, module) for module in modules.values()], repeats)]
        for kind, run in (("forward", forward), ("both", both))
    }
    plain = layers["full"].geometry.macs(size, size)
    found = {
        name: {kind: values[i] for kind, values in times.items()} | {"parameters": _parameters(module)}
        for i, (name, module) in enumerate(modules.items())
    }
    for form, layer in layers.items():
        found[form]["generator_macs"] = layer.generator.macs(size, size) / plain
        found[form]["layer_macs"] = layer.macs(size, size) / plain
    return {"kind": "cost", "shape": shape, "forms": found}


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def toy(form: str, seed: int, steps: int) -> dict[str, Any]:
    """One ACDA layer with this generator, trained from scratch on pattern detection."""

    def make() -> nn.Module:
        return ACDAConv2d.from_conv(nn.Conv2d(1, 1, 7, padding=3), ACDAConfig(**FORMS[form]))

    found = run_toy("pattern", form, seed, steps, Path(), make)
    return {"kind": "toy"} | found


def cost_table(rows: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[list[Any]]]:
    """Ratios to the 3×3 convolution by form and shape."""
    lines: list[list[Any]] = []
    for row in (row for row in rows if row["kind"] == "cost"):
        plain = row["forms"]["conv3"]
        for form in FORMS:
            found = row["forms"][form]
            ratios = [found["generator_macs"], found["layer_macs"]]
            ratios += [found[kind] / plain[kind] for kind in ("forward", "both")]
            lines.append([row["shape"], form, *(f"{ratio:.2f}" for ratio in ratios), found["parameters"]])
    headers = ("shape", "generator", "its MACs / conv3", "layer's MACs / conv3", "forward / conv3", "both / conv3")
    return (*headers, "parameters"), lines


def toy_table(rows: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[list[Any]]]:
    """Errors by form: one column a seed, and their mean."""
    found: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    for row in rows:
        if row["kind"] == "toy":
            found[row["arm"]].append(row)
    lines = [
        [
            form,
            own[0]["parameters"],
            own[0]["steps"],
            " ".join(f"{row['error'] * 1e4:.2f}" for row in own),
            f"{sum(row['error'] for row in own) / len(own) * 1e4:.2f}",
        ]
        for form, own in found.items()
        if own
    ]
    return ("generator", "parameters", "steps", "error · 10⁴, by seed", "mean"), lines


if __name__ == "__main__":
    sys.exit(main())
