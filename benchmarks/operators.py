"""Our operators against the published implementation (unfold) and plain convolutions, with targets and ratios.

    python -m benchmarks.operators                      # every case, about 10 minutes on one core
    python -m benchmarks.operators --runs 3             # three times over: medians, and their scatter on this machine
    python -m benchmarks.operators --threads 2          # on several cores, compared by wall time
    python -m benchmarks.operators --op acda --quick    # fewer repeats, in one process, no memory measurement
    python -m benchmarks.operators --dtype bfloat16     # in half precision, against torch's operators
    SURGEON_LANES=8 python -m benchmarks.operators      # compiled for AVX2 on a machine with AVX-512

The cases and targets are in `_operator_cases.py`.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks._bench import in_subprocess, interleaved, peak_rss, saved_bytes
from benchmarks._operator_cases import OPERATORS, SHAPES, TARGETS, Case, Step, Target, half_targets
from benchmarks._results import write_json
from surgeon.layers.ops.native.compiler import library, why_no_library

PROBE = 512  # rows and columns of the matrix product whose rate is taken for the machine's
ALL = ", all threads"
COPIED = 1 << 23  # floats whose copy is taken for its bandwidth
COLUMNS = {"forward": "forward", "both": "fwd+bwd", "saved_bytes": "saved MB", "peak_bytes": "peak MB"}


def measure(case: Case, repeats: int, memory: bool, threads: int) -> dict[str, Any]:
    """Times in ms, all steps interleaved; saved and peak bytes of every step of a case, of those that are trained."""
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
    trained = {name: step for name, step in steps.items() if step.trained}
    for kind, wrap, chosen in (("forward", forward_only, steps), ("both", both, trained)):
        runs = _probes() | {name: wrap(step) for name, step in chosen.items()}
        found = _times(runs, repeats)
        if threads == 1:
            found |= _on_all_threads({name: runs[name] for name in ("mm", "copy", "ours")}, repeats)
        for name, times in found.items():
            result.setdefault(name, {})[kind] = times
    for name, step in trained.items():
        result[name]["saved_bytes"] = saved_bytes(step.forward, step.inputs)
        if memory and _has_peak_target(case, name):
            arguments = ["--peak-of", case.name, name, "--threads", str(threads)]
            result[name]["peak_bytes"] = in_subprocess("benchmarks.operators", arguments, threads)
    return result


def _has_peak_target(case: Case, step: str) -> bool:
    """A process for each of the others would take longer than all the times."""
    held = [t for t in TARGETS if (t.operator, t.variant, t.measure) == (case.operator, case.variant, "peak")]
    return any(case.shape in t.must | t.aim and step in (t.a, t.b) for t in held)


def _times(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    found = interleaved(list(runs.values()), repeats)
    return {name: {"cpu_ms": cpu, "wall_ms": wall} for name, (cpu, wall) in zip(runs, found, strict=True)}


def _on_all_threads(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """The same on as many threads as there are cores, each name with `ALL` behind it."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        return {name + ALL: times for name, times in _times(runs, repeats).items()}
    finally:
        torch.set_num_threads(before)


def _probes() -> dict[str, Callable[[], object]]:
    """What the machine can do in float32, in which all operators compute: a matrix product, and a copy."""
    a, b, product = (torch.randn(PROBE, PROBE, dtype=torch.float32) for _ in range(3))
    source = torch.randn(COPIED, dtype=torch.float32)
    target = torch.empty_like(source)
    return {"mm": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}


def shares(cases: Iterable[Case], results: dict[str, list[dict[str, Any]]], clock: str) -> list[dict[str, Any]]:
    """What part of the machine's rate an operator reaches, medians of the runs: of a matrix product's, or of a copy's.

    The arithmetic of the definition (or the bytes of inputs and output) over time and rate. What is computed again in the
    backward pass does not count. On all threads operator and rate are compared by wall time. PAFU's arithmetic is that of its
    3×3 convolution: where that one reaches a share of s, PAFU at the product's own rate would take s times as long.
    """
    rows = []
    for case in cases:
        names = ("ours", "torch", "ours" + ALL, *(["conv3"] if case.operator == "pafu" else []))
        for step, kind in ((step, kind) for step in names for kind in ("forward", "both")):
            probe, whole, most = ("copy", case.moved, 8 * COPIED) if case.moved else ("mm", case.flops, 2 * PROBE**3)
            whole *= case.passes if kind == "both" else 1
            own, by = (probe + ALL, "wall_ms") if step.endswith(ALL) else (probe, clock)
            found = [
                whole / run[step][kind][by] * run[own][kind][by] / most
                for run in results[case.name]
                if kind in run.get(step, {})
            ]
            if found and not (case.moved and kind == "both"):  # how often memory must be read backward is no definition
                rows.append({"case": case.name, "step": step, "measure": kind, "of": probe, "share": median(found)})
    return rows


def shares_table(rows: list[dict[str, Any]]) -> str:
    """A line a case and step: the share forward, and forward and backward."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row["case"], row["step"], row["of"]), {})[row["measure"]] = row["share"]
    lines = [f"{'share of the rate of a product (mm) or a copy':<48} {'forward':>9} {'fwd+bwd':>9}"]
    for (case, step, of), values in found.items():
        told = " ".join(f"{values[kind]:9.2f}" if kind in values else f"{'-':>9}" for kind in ("forward", "both"))
        lines.append(f"{f'{case} {step}, of {of}':<48} {told}")
    return "\n".join(lines)


def peak_of(case: Case, name: str) -> int:
    """Growth of resident memory during one forward and backward pass, in bytes; to be run in a fresh process."""
    step = case.build()[name]
    tiny = torch.randn(1, 1, 4, 4)
    F.conv2d(tiny, torch.randn(1, 1, 3, 3))
    before = peak_rss()
    step.forward().sum().backward()
    return peak_rss() - before


def compare(
    results: dict[str, list[dict[str, Any]]], clock: str, targets: Iterable[Target] = TARGETS
) -> list[dict[str, Any]]:
    """Every target with the ratio that was measured, of a case's runs the median; `met` is None where there is only an aim."""
    rows = []
    for target in targets:
        for shape in sorted(target.must | target.aim):
            runs = results.get(f"{target.operator}/{target.variant}/{shape}", [])
            ratios = [ratio for run in runs if (ratio := _ratio(target, shape, run, clock)) is not None]
            if not ratios:
                continue
            ratio, must, aim = median(ratios), target.must.get(shape), target.aim.get(shape)
            row = {
                "what": f"{target.operator} {target.variant} {shape}: {target.measure}, {target.a} / {target.b}",
                "ratio": ratio,
                "least": min(ratios),
                "most": max(ratios),
                "must": "" if must is None else f"{target.sign} {must:.3g}",
                "aim": "" if aim is None else f"{target.sign} {aim:.3g}",
                "met": None if must is None else _holds(ratio, target.sign, must),
                "aim_met": None if aim is None else _holds(ratio, target.sign, aim),
            }
            rows.append(row)
    return rows


def _holds(ratio: float, sign: str, bound: float) -> bool:
    return ratio >= bound if sign == ">=" else ratio <= bound


def _ratio(target: Target, shape: str, found: dict[str, Any], clock: str) -> float | None:
    if target.measure == "saved":
        images, channels, size = SHAPES[shape]
        return float(found[target.a]["saved_bytes"]) / (4 * images * channels * size * size)
    a, b = (_best(found, names.split("|"), target.measure, clock) for names in (target.a, target.b))
    return None if a is None or b is None else a / b


def _best(found: dict[str, Any], names: list[str], measure: str, clock: str) -> float | None:
    if measure == "peak":
        return min((found[name]["peak_bytes"] for name in names if "peak_bytes" in found[name]), default=None)
    return min(found[name][measure][clock] for name in names)


def table(results: dict[str, list[dict[str, Any]]], clock: str) -> str:
    """One line a step: ms forward and forward + backward, saved and peak MB, medians of the runs; "-" where not measured."""
    lines = [f"{'case':<18} {'step':<18} {' '.join(f'{title:>9}' for title in COLUMNS.values())}"]
    for case, runs in results.items():
        for name in runs[0]:
            steps = [run[name] for run in runs]
            values = [_median(_shown(step[kind], clock) for step in steps if kind in step) for kind in COLUMNS]
            lines.append(f"{case:<18} {name:<18} {' '.join(values)}")
    return "\n".join(lines)


def _shown(value: Any, clock: str) -> float:
    """Of a time its ms, of bytes their MB."""
    return float(value[clock]) if isinstance(value, dict) else value / 1e6


def _median(values: Iterable[float]) -> str:
    found = list(values)
    return f"{median(found):9.1f}" if found else f"{'-':>9}"


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """The targets, each with `MISSED` where a must is not met and `aim` where the aim is; from least to most of the runs."""
    lines = [f"{'ratio':<56} {'measured':>8} {'from to':>13} {'must':>9} {'aim':>9}"]
    for row in rows:
        met = "  MISSED" if row["met"] is False else "  aim" if row["aim_met"] else ""
        scatter = f"{row['least']:.3g} {row['most']:.3g}"
        lines.append(f"{row['what']:<56} {row['ratio']:>8.3g} {scatter:>13} {row['must']:>9} {row['aim']:>9}{met}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(OPERATORS), help="only this operator")
    parser.add_argument(
        "--match", default="", metavar="TEXT", help='only cases with TEXT in their name, as "eval n=8/B"'
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE.json",
        help="write the ratios to FILE.json, and what was timed to FILE.raw.json",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of all tensors (default float32); the product and the copy whose rates are shared stay float32",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--runs", type=int, default=1, help="how often everything is measured (default 1)")
    parser.add_argument("--quick", action="store_true", help="few repeats, no memory measurement")
    parser.add_argument("--case", metavar="NAME", help="measure one case here, and print its JSON")
    parser.add_argument("--peak-of", nargs=2, metavar=("CASE", "STEP"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        return _run(args)
    finally:
        torch.set_default_dtype(before)


def _run(args: argparse.Namespace) -> int:
    half = args.dtype != "float32"
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    made = [case for name, make in OPERATORS.items() if args.op in (None, name) for case in make()]
    cases = [case for case in made if args.match in case.name]
    if not cases:
        print(
            f"no case with {args.match!r} in its name; there are {', '.join(case.name for case in made)}",
            file=sys.stderr,
        )
        return 2
    if args.peak_of:
        case = next(case for case in cases if case.name == args.peak_of[0])
        print(json.dumps(peak_of(case, args.peak_of[1])))
        return 0
    repeats = 3 if args.quick else 7
    if args.case:
        case = next(case for case in cases if case.name == args.case)
        print(json.dumps(measure(case, repeats, memory=not (args.quick or half), threads=args.threads)))
        return 0
    results: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    for case in tqdm(cases * args.runs, desc="operators", unit="case", disable=None):
        if args.quick:
            found = measure(case, repeats, memory=False, threads=args.threads)
        else:  # in a process of its own: what the allocator has kept from an earlier case decides about page faults
            found = in_subprocess(
                "benchmarks.operators",
                ["--case", case.name, "--threads", str(args.threads), "--dtype", args.dtype],
                args.threads,
            )
        results[case.name].append(found)
    # One thread: its CPU time, which other work on the machine does not touch. Several: what they are for is wall time.
    clock, said = ("cpu_ms", "CPU ms of the process") if args.threads == 1 else ("wall_ms", "wall ms")
    rows = compare(results, clock, half_targets() if half else TARGETS)
    lanes = "no compiled operators" if why_no_library() else f"vectors of {library().surgeon_lanes()} floats"
    print(f"{said}, {args.threads} thread(s), {args.dtype}, {lanes}, interleaved medians\n")
    of_rate = shares(cases, results, clock)
    print(table(results, clock), comparison_table(rows), shares_table(of_rate), sep="\n\n")
    if args.json:
        write_json(
            args.json,
            {
                "threads": args.threads,
                "dtype": args.dtype,
                "lanes": lanes,
                "runs": args.runs,
                "shapes": SHAPES,
                "targets": rows,
                "shares": of_rate,
            },
        )
        write_json(args.json.with_suffix(".raw.json"), {"results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
