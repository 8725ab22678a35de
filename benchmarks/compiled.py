"""Does torch.compile win on the CPU? Plain formulas, compiled, against the lean operators, forward and backward.

    python -m benchmarks.compiled [--case acda/A …] [--repeats N] [--fresh]

The formulas are the portable operators (taps and products that a compiler can fuse; nothing is unfolded); for DConv with given
kernels the backward pass is also written by hand, as sums over taps, and compiled separately. Last, a whole ADFNet, forward only,
one image of 128×128: compiled with the operators as they are, and with the portable ones (SURGEON_BACKEND=portable). Process CPU
time, one thread, interleaved medians; the compiler's own time is listed, too. Writes benchmarks/results/compiled.json;
resumes if interrupted.
"""

import argparse
import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._bench import interleaved
from benchmarks._models import awaken_kernels
from benchmarks._operator_cases import SHAPES
from benchmarks._results import RESULTS, Rows, table, write_json
from surgeon import zoo
from surgeon.layers.acda.operator import acda_conv
from surgeon.layers.ops.dispatch import ENVIRONMENT
from surgeon.layers.ops.portable import acda_conv_portable, dconv_layer_portable, dconv_portable
from surgeon.layers.sekg.operator import dconv, dconv_layer

SAME = ((1, 1), (1, 1), (1, 1))
ADFNET = {"128": 128}
Runs = dict[str, Callable[[], object]]


class TapsByHand(torch.autograd.Function):
    """DConv of 3×3 kernels, stride 1, with forward and backward formulas that are compiled one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernels)
        return _taps(x, kernels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return _taps_backward(grads[0], *ctx.saved_tensors)


@torch.compile(dynamic=False)
def _taps(x: Tensor, kernels: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1))
    taps = [kernels[:, :, 3 * i + j] * padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return functools.reduce(torch.add, taps)


@torch.compile(dynamic=False)
def _taps_backward(grad: Tensor, x: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """d/dkernels is the shifted input times the gradient; d/dx gathers the product of the two from the other side."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1))
    shifted = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    grad_kernels = torch.stack([grad * tap for tap in shifted], 2)
    product = F.pad(grad[:, :, None] * kernels, (1, 1, 1, 1))
    gathered = [
        product[:, :, 3 * i + j, 2 - i : 2 - i + height, 2 - j : 2 - j + width] for i in range(3) for j in range(3)
    ]
    return functools.reduce(torch.add, gathered), grad_kernels


def dconv_runs(shape: str) -> tuple[Runs, Runs, dict[str, float]]:
    """Forward runs, forward-and-backward runs, and seconds that compiling took."""
    n, c, size = SHAPES[shape]
    x = torch.randn(n, c, size, size, requires_grad=True)
    kernels = torch.randn(n, c, 9, size, size, requires_grad=True)
    compiled = torch.compile(dconv_portable, dynamic=False)
    functions: dict[str, Callable[[], Tensor]] = {
        "lean": partial(dconv, x, kernels, (3, 3), padding=(1, 1), backend="torch"),
        "compiled formula": partial(compiled, x, kernels, (3, 3), *SAME),
        "compiled by hand": lambda: TapsByHand.apply(x, kernels),
    }
    return _runs(functions, (x, kernels))


def dconv_layer_runs(shape: str) -> tuple[Runs, Runs, dict[str, float]]:
    """As `dconv_runs`, with the kernels made by a 1×1 convolution C → 9C."""
    n, c, size = SHAPES[shape]
    x, features = (torch.randn(n, c, size, size, requires_grad=True) for _ in range(2))
    weight, static = (torch.randn(*sizes, requires_grad=True) for sizes in ((9 * c, c), (c, 1, 3, 3)))
    compiled = torch.compile(dconv_layer_portable, dynamic=False)
    functions: dict[str, Callable[[], Tensor]] = {
        "lean": partial(dconv_layer, x, features, weight, static, padding=(1, 1), backend="torch"),
        "compiled formula": partial(compiled, x, features, weight, static, None, *SAME),
    }
    return _runs(functions, (x, features, weight, static))


def adfnet_runs(shape: str) -> tuple[Runs, Runs, dict[str, float]]:
    """The color ADFNet of the paper, its kernels awake; no backward pass."""
    model, x = zoo.create("adfnet").eval(), torch.rand(1, 3, ADFNET[shape], ADFNET[shape])
    awaken_kernels(model)
    compiled = torch.compile(model, fullgraph=True)
    # The variable is read while the graph is made; two graphs of the same code need a name each.
    portable = torch.compile(lambda x: model(x), fullgraph=True)

    def through_portable() -> Tensor:
        with patch.dict(os.environ, {ENVIRONMENT: "portable"}):
            return portable(x)

    return _runs({"lean": lambda: model(x), "compiled": lambda: compiled(x), "compiled formula": through_portable}, ())


def acda_runs(shape: str) -> tuple[Runs, Runs, dict[str, float]]:
    """As `dconv_runs`, for l = 7, m = 6, K = 18."""
    n, c, size = SHAPES[shape]
    x, alpha = (torch.randn(n, channels, size, size, requires_grad=True) for channels in (c, 6 * 18))
    coeff = torch.randn(c, c, 6, requires_grad=True)
    psi, static = torch.randn(18, 7, 7), torch.empty(0, 7, 7)
    geometry = ((1, 1), (3, 3), (1, 1), 1)
    compiled = torch.compile(acda_conv_portable, dynamic=False)
    functions: dict[str, Callable[[], Tensor]] = {
        "lean": partial(acda_conv, x, alpha, psi, static, coeff, *geometry, backend="torch"),
        "compiled formula": partial(compiled, x, alpha, psi, static, coeff, *geometry),
    }
    return _runs(functions, (x, alpha, coeff))


def _runs(
    functions: dict[str, Callable[[], Tensor]], inputs: tuple[Tensor, ...]
) -> tuple[Runs, Runs, dict[str, float]]:
    """Without `inputs` to differentiate by, forward only."""
    expected = functions["lean"]().detach()
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(functions["lean"](), inputs, grad) if inputs else ()
    seconds: dict[str, float] = {}
    for name, function in functions.items():
        started = time.process_time()
        with torch.no_grad():
            torch.testing.assert_close(function(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        found = torch.autograd.grad(function(), inputs, grad) if inputs else ()
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
        seconds[name] = time.process_time() - started

    def forward(function: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return function()

    def both(function: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(), inputs, grad)

    return (
        {name: partial(forward, function) for name, function in functions.items()},
        {name: partial(both, function) for name, function in functions.items()} if inputs else {},
        seconds,
    )


OPERATORS = {"dconv": dconv_runs, "dconv layer": dconv_layer_runs, "acda": acda_runs, "adfnet": adfnet_runs}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [f"{operator}/{shape}" for operator in OPERATORS for shape in (ADFNET if operator == "adfnet" else SHAPES)]
    parser.add_argument("--case", nargs="+", choices=cases, default=cases, metavar="CASE", help=", ".join(cases))
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted or finished run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True  # what the compiler takes is what it takes the first time
    warnings.simplefilter("ignore")
    rows = Rows(args.results / "compiled.jsonl", fresh=args.fresh)
    for case in args.case:
        if case not in rows:
            rows.add(case, measure(case, args.repeats))
            write_json(args.results / "compiled.json", {"rows": rows.values()})
    table(*lines(rows.values()))
    write_json(args.results / "compiled.json", {"rows": rows.values()})
    return 0


def measure(case: str, repeats: int) -> dict[str, Any]:
    """CPU ms of every way, forward and both, and the seconds of its first calls."""
    operator, _, shape = case.partition("/")
    torch.manual_seed(0)
    torch.compiler.reset()
    forward, both, seconds = OPERATORS[operator](shape)
    ways: dict[str, dict[str, float]] = {name: {"first_calls_s": seconds[name]} for name in forward}
    for kind, runs in (("forward", forward), ("both", both)):
        for name, (cpu, _) in zip(runs, interleaved(list(runs.values()), repeats), strict=True):
            ways[name][kind] = cpu
    return {"operator": operator, "shape": shape, "ways": ways}


def lines(rows: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[list[Any]]]:
    """A row a case and compiled way: its time over that of the lean operator (below 1 it wins)."""
    found = []
    for row in rows:
        lean = row["ways"]["lean"]
        for name, way in row["ways"].items():
            if name != "lean":
                ratios = [f"{way[kind] / lean[kind]:.2f}" if kind in way else "-" for kind in ("forward", "both")]
                found.append([f"{row['operator']} {row['shape']}", name, *ratios, f"{way['first_calls_s']:.0f}"])
    return ("operator", "way", "forward, / lean", "both, / lean", "first calls, CPU s"), found


if __name__ == "__main__":
    sys.exit(main())
