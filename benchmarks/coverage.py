"""Coverage: every library model (the smallest of each timm family) x every layer type, all spatial convolutions.

    python -m benchmarks.coverage [--all] [--only GLOB …] [--types acda …] [--through fx|export] [--fresh] [--report]

For each: convolutions found, replaced, refused with reasons; output error; a training step; a state-dict round trip. Each
model runs in a separate process with a limit on time and memory. Resumes if interrupted. Writes
benchmarks/results/coverage.json and docs/coverage.md. `--through` converts the traced or exported graph of each model instead
(coverage-fx.json, coverage-export.json; a section of the same page next to the tree's figures). Exit code 1 if something failed.
"""

import argparse
import fnmatch
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import third_party
from benchmarks._models import Case, cases, timm_families
from benchmarks._results import RESULTS, ROOT, Rows, machine, markdown, only, write_json

TYPES = ("acda", "pafu", "sekg")
GOOD = ("ok", "refused", "none", "untraceable")
THROUGH = {"fx": "torch.fx.symbolic_trace", "export": "torch.export"}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    args.name += f"-{args.through}" if args.through else ""
    chosen = cases(every=args.all)
    if args.only:
        chosen = [case for case in chosen if any(fnmatch.fnmatch(case.key, pattern) for pattern in args.only)]
    rows = Rows(args.results / f"{args.name}.jsonl", fresh=args.fresh)
    if not args.report:
        run(chosen, rows, args)
    failed = [row for row in rows.values() if row["status"] not in GOOD]
    write_json(args.results / f"{args.name}.json", {"rows": [said(row) for row in rows.values()]})
    args.docs.parent.mkdir(parents=True, exist_ok=True)
    args.docs.write_text(_page(args, rows.values()))
    print(f"{len(rows.values())} rows, {len(failed)} failed; written: {args.results / args.name}.json, {args.docs}")
    for row in failed:
        print(f"  {row['library']}/{row['model']} {row['type']}: {'; '.join(row['failures'])}")
    return int(bool(failed))


def _page(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The page written anew, or with `--through` the present one with its section."""
    if not args.through:
        return report(rows, args.results)
    tree = args.results / "coverage.json"
    beside = json.loads(tree.read_text())["rows"] if tree.is_file() else []
    page = args.docs.read_text() if args.docs.is_file() else "# Coverage\n"
    return _with_section(page, _graph_section(args.through, rows, beside))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every timm name, not one a family")
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="models by library/name, as 'timm/res*'")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--through", choices=THROUGH, help="convert the graph that this makes of each model")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an interrupted or finished run")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument(
        "--report", action="store_true", help="only write the JSON and the table from the rows there are"
    )
    parser.add_argument(
        "--timeout", type=float, default=900, help="seconds for a model and type (default: %(default)s)"
    )
    parser.add_argument("--memory", type=float, default=14, help="GiB of address space, 0 for no limit (default: 14)")
    parser.add_argument("--name", default="coverage", help="of the results (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "coverage.md", help="default: %(default)s")
    return parser


# --- running ----------------------------------------------------------------------------------------------------------


def run(chosen: list[Case], rows: Rows, args: argparse.Namespace) -> None:
    """Run every (model, type) that has no row yet."""
    again = {key for key, row in rows.rows.items() if args.retry and row["status"] not in GOOD}
    with tqdm(chosen, desc="coverage", unit="model", disable=None) as bar:
        for case in bar:
            bar.set_postfix_str(case.key)
            types = [kind for kind in args.types if (key := f"{case.key}/{kind}") not in rows or key in again]
            while types:  # a process that ends early takes only the type it was at with it
                done = run_case(case, types, args)
                for kind, facts in done.items():
                    identity = {"library": case.library, "kind": case.kind, "family": case.family, "model": case.name}
                    rows.add(f"{case.key}/{kind}", identity | {"type": kind} | facts)
                    if sys.stderr.isatty() is False:
                        print(f"{case.key} {kind}: {facts['status']} {'; '.join(facts['failures'])}", flush=True)
                types = [kind for kind in types if kind not in done]


def run_case(case: Case, types: list[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows by type from one process; the type at which it ended early gets a row that says how."""
    words = (case.library, case.kind, case.family, case.name, ",".join(types), str(args.memory))
    words += (args.through,) if args.through else ()
    command = [sys.executable, "-m", "benchmarks._coverage_worker", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done: dict[str, dict[str, Any]] = {}
    with (
        (args.results / f".{args.name}.stderr").open("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT
        ) as process,
    ):
        ended = _collect(process, done, len(types), args.timeout)
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["no message"])[-1][:300]
    if len(done) < len(types):
        done[types[len(done)]] = {"status": "crashed", "failures": [f"{ended}: {last}"]}
    return done


def _collect(process: subprocess.Popen[str], done: dict[str, dict[str, Any]], count: int, timeout: float) -> str:
    """Read rows until the process ends, or one takes longer than `timeout` seconds; returns how it ended."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + timeout
    while len(done) < count:
        try:
            line = lines.get(timeout=max(deadline - time.monotonic(), 0.1))
        except queue.Empty:
            process.kill()
            return f"killed after {timeout:g} s"
        if line is None:
            break
        if not line.startswith("{"):  # a library that prints
            continue
        facts = json.loads(line)
        done[facts.pop("type")] = facts
        deadline = time.monotonic() + timeout
    return f"ended with code {process.wait()}"


FIELDS = (
    *(
        "key",
        "library",
        "family",
        "model",
        "type",
        "status",
        "failures",
        "why",
        "found",
        "sensitivity",
        "replaced",
        "functional",
    ),
    *("folded", "max_rel_error", "precision", "worst_layer_error", "own_error", "round_trip", "train_step"),
)


def said(row: dict[str, Any]) -> dict[str, Any]:
    """What the page says of a row."""
    reasons = {"refused": [only(site, ["reasons"]) for site in row["refused"]]} if "refused" in row else {}
    return only(row, FIELDS) | reasons


# --- the table --------------------------------------------------------------------------------------------------------


def report(rows: list[dict[str, Any]], results: Path = RESULTS) -> str:
    """The Markdown page: a summary by type, one line a model, and every reason for a refusal."""
    facts = machine()
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    parts = [
        "# Coverage",
        "",
        "Written by `python -m benchmarks.coverage`: do not edit. Every spatial convolution (k >= 2) of each model is asked to",
        "become each layer type, from random weights in which nothing is switched off. *Error* is the largest relative",
        "difference of the outputs in eval mode (float64, marked ᵈ, where depth amplifies float32 rounding beyond 1e-5; with the",
        "original's convolutions in the converted model, marked ᶜ, where it amplifies float64 rounding beyond 1e-10, the layers",
        "then being exact to 1e-12), then that of a layer's output, each on the inputs it really got. *Sensitivity* is the",
        "relative change of the output where every weight of those convolutions changes by a tenth: where it is small, the errors",
        "of the layers are the evidence.",
        f"Made with {versions}.",
        "",
        "## Summary",
        "",
        markdown(
            ("type", "models", "ok", "all refused", "failed", "convolutions", "replaced", "refused"), _summary(rows)
        ),
        "## Models",
        "",
        markdown(("model", "family", "found", "sensitivity", *TYPES), _lines(rows)),
        "A cell: replaced (refused), error of the output, largest of a layer, `s` the training step ran, `r` the state dict went",
        "round.",
        "",
        "## Reasons for refusals",
        "",
        markdown(("reason", "type", "convolutions", "models"), _reasons(rows)),
    ]
    without = [(module, found["reason"]) for module, found in timm_families().items() if not found["model"]]
    if without:
        parts += ["## timm families that have none", "", markdown(("family", "why"), without)]
    if (others := RESULTS / "third_party.json").is_file():
        parts.append(third_party.section(json.loads(others.read_text())))
    parts += [
        _graph_section(how, json.loads(found.read_text())["rows"], rows)
        for how in THROUGH
        if (found := results / f"coverage-{how}.json").is_file()
    ]
    return "\n".join(parts)


def _graph_section(how: str, rows: list[dict[str, Any]], tree: list[dict[str, Any]]) -> str:
    """What the pass did to graphs, one line a model, beside the errors of the same model's tree."""
    beside = {(row["library"], row["model"], row["type"]): row for row in tree}
    models: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        models.setdefault(f"{row['library']}/{row['model']}", []).append(row)
    whys = {name: own[0]["why"][:110] for name, own in models.items() if "why" in own[0]}
    counts = ("found", "replaced", "functional", "folded")
    lines = []
    for name, own in models.items():
        if name in whys or own[0]["status"] == "none":
            continue
        cells = {row["type"]: _graph_cell(row, beside.get((row["library"], row["model"], row["type"]))) for row in own}
        numbers = [max((row.get(count, 0) for row in own), default=0) for count in counts]
        lines.append(
            [name, *numbers, max(len(row.get("refused", [])) for row in own), *(cells.get(t, "") for t in TYPES)]
        )
    failed = sum(row["status"] not in GOOD for row in rows)
    tried, made = len(models), len(lines)
    parts = [
        f"## Through {THROUGH[how]}",
        "",
        f"Written by `python -m benchmarks.coverage --through {how}`: `surgeon.passes.DynamicConvPass` on the graph of each model,",
        "all convolutions with k >= 2. *Found* are the tree's; *functions* are those of the replaced that the graph computes by a",
        "function, *folded* those of them whose weight is computed from a parameter. A cell: error of the output and largest of a",
        "layer as reported (ᵈ: in float64), behind the bar the tree's error of the output.",
        f"{tried} models, {made} of them made a graph; {failed} (model, type) failed.",
        "",
        markdown(("model", "found", "replaced", "functions", "folded", "refused", *TYPES), lines),
    ]
    if whys:
        parts += [
            "Not made a graph:",
            "",
            markdown(("model", "why"), [[name, f"`{why}`"] for name, why in whys.items()]),
        ]
    return "\n".join(parts)


def _graph_cell(row: dict[str, Any], tree: dict[str, Any] | None) -> str:
    if row["status"] != "ok":
        return f"**{row['status']}**: {'; '.join(row['failures'])[:120]}"
    beside = "-" if tree is None or tree.get("max_rel_error") is None else _error(tree)
    return f"{_error(row)}, {row['worst_layer_error']:.0e} / {beside}"


def _error(row: dict[str, Any]) -> str:
    return f"{row['max_rel_error']:.0e}{'ᵈ' if row['precision'] == 'float64' else ''}"


def _with_section(page: str, section: str) -> str:
    """The page with this section in the place of the one of the same heading, or at its end."""
    heading = section.partition("\n")[0].removeprefix("## ")
    parts = page.rstrip("\n").split("\n## ")
    kept = [part for part in parts if part.partition("\n")[0] != heading]
    return "\n## ".join([*(part.rstrip("\n") + "\n" for part in kept), section.removeprefix("## ")])


def _summary(rows: list[dict[str, Any]]) -> list[list[Any]]:
    lines = []
    for kind in TYPES:
        own = [row for row in rows if row["type"] == kind]
        status = [row["status"] for row in own]
        counts = [sum(row.get("found", 0) for row in own), sum(row.get("replaced", 0) for row in own)]
        refused = sum(len(row.get("refused", [])) for row in own)
        failed = len(own) - status.count("ok") - status.count("refused") - status.count("none")
        lines.append([kind, len(own), status.count("ok"), status.count("refused"), failed, *counts, refused])
    return lines


def _lines(rows: list[dict[str, Any]]) -> list[list[Any]]:
    models: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        models.setdefault((f"{row['library']}/{row['model']}", row["family"]), {})[row["type"]] = row
    return [
        [name, family, _largest(by_type, "found"), _largest(by_type, "sensitivity")]
        + [_result(by_type.get(kind)) for kind in TYPES]
        for (name, family), by_type in models.items()
    ]


def _largest(by_type: dict[str, dict[str, Any]], fact: str) -> Any:
    """The largest over the types; "-" where none was measured."""
    return max((row[fact] for row in by_type.values() if row.get(fact) is not None), default="-")


def _result(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"] if row["status"] == "none" else f"**{row['status']}**: {'; '.join(row['failures'])[:120]}"
    error = row["own_error"]
    value, mark = error["rel_error"], "ᵈ" if error["precision"] == "float64" else ""
    if "around" in error:
        value, mark = error["around"], "ᶜ"
    marks = ("s" if row["train_step"] else "") + ("r" if row["round_trip"] else "")
    refused = f" ({len(row['refused'])})" if row["refused"] else ""
    return f"{row['replaced']}{refused}, {value:.0e}{mark}, {row['worst_layer_error']:.0e}, {marks}"


def _reasons(rows: list[dict[str, Any]]) -> list[list[Any]]:
    counted: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for site in row.get("refused", []):
            for reason in site["reasons"]:
                counted.setdefault((reason, row["type"]), []).append(row["model"])
    return [
        [reason, kind, len(models), ", ".join(sorted(set(models))[:4]) + (" …" if len(set(models)) > 4 else "")]
        for (reason, kind), models in sorted(counted.items())
    ]


if __name__ == "__main__":
    sys.exit(main())
