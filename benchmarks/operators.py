"""Our operators against the published way (unfold) and against plain convolutions, with the targets beside the ratios.

    python benchmarks/operators.py                      # every case, about 10 minutes on one core
    python benchmarks/operators.py --op acda --quick    # fewer repeats, no memory measurement

A case is one operator on one shape: `ours` and named `baselines`, each a `Step` (what to run, and the tensors to
differentiate by). A new operator is one function that yields its cases, and a line in OPERATORS; its targets are lines in TARGETS.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _bench import in_subprocess, interleaved, machine, peak_rss, saved_bytes
from torch import Tensor

from surgeon.layers.kernels.acda import acda_conv

SHAPES = {"A": (8, 64, 56), "B": (8, 128, 28), "C": (8, 256, 14), "D": (4, 32, 128)}


@dataclass(frozen=True)
class Step:
    """A forward computation and the tensors its gradient is taken by."""

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """`build` makes the steps, by name, "ours" first; tensors exist only while the case is measured."""

    operator: str
    shape: str
    variant: str
    build: Callable[[], dict[str, Step]]

    @property
    def name(self) -> str:
        return f"{self.operator}/{self.variant}/{self.shape}"


def acda_cases() -> Iterator[Case]:
    """ACDA with the paper's m = 6 and K = 18, for windows 7 and 3; the operator without the generator."""
    for window in (7, 3):
        for shape in SHAPES:
            yield Case("acda", shape, f"l={window}", lambda shape=shape, window=window: _acda_steps(shape, window))


def _acda_steps(shape: str, window: int) -> dict[str, Step]:
    n, c, size = SHAPES[shape]
    m, k = 6, 18
    x, alpha = _parameter(n, c, size, size), _parameter(n, m * k, size, size)
    coeff, psi, static = _parameter(c, c, m), torch.randn(k, window, window), torch.empty(0, window, window)
    geometry = ((1, 1), (window // 2, window // 2), (1, 1), 1)

    def operator(backend: str) -> Step:
        return Step(
            lambda: acda_conv(x, alpha, psi, static, coeff, *geometry, backend=backend), (x, alpha, coeff, psi, static)
        )

    return {"ours": operator("lean"), "unfold": operator("reference")} | _convolutions(x, (3, 7))


def _convolutions(x: Tensor, kernels: tuple[int, ...]) -> dict[str, Step]:
    """Plain convolutions of x with as many channels out as in."""
    steps = {}
    for k in kernels:
        weight = _parameter(x.shape[1], x.shape[1], k, k)
        steps[f"conv{k}"] = Step(lambda weight=weight, k=k: F.conv2d(x, weight, padding=k // 2), (x, weight))
    return steps


def _parameter(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


OPERATORS: dict[str, Callable[[], Iterator[Case]]] = {"acda": acda_cases}


@dataclass(frozen=True)
class Target:
    """A row of numbers to beat: `a` over `b` (what was measured, of which step) for each shape, at least or at most.

    `must` and `aim` are by shape; the comparison holds for one operator and variant.
    """

    operator: str
    variant: str
    measure: str
    a: str
    b: str
    sign: str
    must: dict[str, float]
    aim: dict[str, float]


def _by_shape(shapes: str, *values: float) -> dict[str, float]:
    return dict(zip(shapes, values, strict=True))


TARGETS = [
    Target(
        "acda",
        "l=7",
        "forward",
        "unfold",
        "ours",
        ">=",
        _by_shape("ABCD", 25, 16, 8, 20),
        _by_shape("ABCD", 38, 24, 10, 28),
    ),
    Target(
        "acda",
        "l=7",
        "both",
        "unfold",
        "ours",
        ">=",
        _by_shape("ABCD", 8, 5.5, 3.5, 8),
        _by_shape("ABCD", 14, 10, 6, 12),
    ),
    Target(
        "acda",
        "l=7",
        "forward",
        "ours",
        "conv7",
        "<=",
        _by_shape("ABC", 0.9, 0.5, 0.4),
        _by_shape("ABC", 0.6, 0.35, 0.27),
    ),
    Target("acda", "l=7", "peak", "ours", "unfold", "<=", _by_shape("AD", 1 / 6, 1 / 6), {}),
]


def measure(case: Case, repeats: int, slow_repeats: int, memory: bool, threads: int) -> dict[str, Any]:
    """Times in ms, saved and peak bytes of every step of a case."""
    steps = case.build()
    grad = torch.randn_like(next(iter(steps.values())).forward())

    def forward_only(step: Step) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return step.forward()

        return run

    def both(step: Step) -> Callable[[], object]:
        wanted = [t for t in step.inputs if t.requires_grad]
        return lambda: torch.autograd.grad(step.forward(), wanted, grad)

    result: dict[str, Any] = {name: {} for name in steps}
    for kind, wrap in (("forward", forward_only), ("both", both)):
        for names, times in ((["unfold"], slow_repeats), ([n for n in steps if n != "unfold"], repeats)):
            names = [name for name in names if name in steps]
            # "ours" runs in both rounds, so that each ratio is of one round.
            names = list(dict.fromkeys(["ours", *names]))
            for name, (cpu, wall) in zip(names, interleaved([wrap(steps[n]) for n in names], times), strict=True):
                result[name][kind] = {"cpu_ms": cpu, "wall_ms": wall}
    for name, step in steps.items():
        result[name]["saved_bytes"] = saved_bytes(step.forward, step.inputs)
        if memory:
            arguments = ["--peak-of", case.name, name, "--threads", str(threads)]
            result[name]["peak_bytes"] = in_subprocess(Path(__file__), arguments, threads)
    return result


def peak_of(case: Case, name: str) -> int:
    """Growth of resident memory during one forward and backward pass, in bytes; to be run in a fresh process."""
    step = case.build()[name]
    tiny = torch.randn(1, 1, 4, 4)
    F.conv2d(tiny, torch.randn(1, 1, 3, 3))
    before = peak_rss()
    step.forward().sum().backward()
    return peak_rss() - before


def compare(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target with the ratio that was measured."""
    rows = []
    for target in TARGETS:
        for shape, must in target.must.items():
            found = results.get(f"{target.operator}/{target.variant}/{shape}")
            if found is None:
                continue
            a, b = (_value(found[name], target.measure) for name in (target.a, target.b))
            if a is None or b is None:
                continue
            met = a / b >= must if target.sign == ">=" else a / b <= must
            row = {
                "what": f"{target.operator} {target.variant} {shape}: {target.measure}, {target.a} / {target.b}",
                "ratio": a / b,
                "must": f"{target.sign} {must:.3g}",
                "aim": f"{target.sign} {target.aim[shape]:.3g}" if shape in target.aim else "less",
                "met": met,
            }
            rows.append(row)
    return rows


def _value(result: dict[str, Any], measure: str) -> float | None:
    if measure == "peak":
        peak: float | None = result.get("peak_bytes")
        return peak
    value: float = result[measure]["cpu_ms"]
    return value


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line a step: CPU ms forward and forward + backward, saved and peak MB."""
    lines = [f"{'case':<14} {'step':<8} {'forward':>9} {'fwd+bwd':>9} {'saved MB':>9} {'peak MB':>9}"]
    for case, steps in results.items():
        for name, result in steps.items():
            peak = f"{result['peak_bytes'] / 1e6:9.0f}" if "peak_bytes" in result else f"{'-':>9}"
            times = f"{result['forward']['cpu_ms']:9.1f} {result['both']['cpu_ms']:9.1f}"
            lines.append(f"{case:<14} {name:<8} {times} {result['saved_bytes'] / 1e6:9.1f} {peak}")
    return "\n".join(lines)


def comparison_table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'ratio':<48} {'measured':>8} {'must':>9} {'aim':>9}"]
    for row in rows:
        met = "" if row["met"] else "  MISSED"
        lines.append(f"{row['what']:<48} {row['ratio']:>8.3g} {row['must']:>9} {row['aim']:>9}{met}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(OPERATORS), help="only this operator")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--quick", action="store_true", help="few repeats, no memory measurement")
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "STEP"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cases = [case for name, make in OPERATORS.items() if args.op in (None, name) for case in make()]
    if args.peak_of:
        case = next(case for case in cases if case.name == args.peak_of[0])
        print(json.dumps(peak_of(case, args.peak_of[1])))
        return 0
    results = {}
    for i, case in enumerate(cases):
        print(f"[{i + 1}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
        repeats = (3, 1) if args.quick else (9, 3)
        results[case.name] = measure(case, *repeats, memory=not args.quick, threads=args.threads)
    rows = compare(results)
    print(f"CPU ms of the process, {args.threads} thread(s), interleaved medians\n")
    print(table(results), comparison_table(rows), sep="\n\n")
    if args.json:
        document = {"machine": machine(), "shapes": SHAPES, "results": results, "targets": rows}
        args.json.write_text(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
