"""Write the tables of docs/measurements.md anew from benchmarks/results/*.json; the text around them stays.

    python -m benchmarks.report [--check]

A table stands between `<!-- begin NAME -->` and `<!-- end -->`. A result that is not there leaves its table as it is. --check
writes nothing and exits 1 where a table does not say what the results say.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._results import RESULTS, ROOT, markdown

DOCUMENT = ROOT / "docs" / "measurements.md"
Table = Callable[[dict[str, Any]], str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the document is up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="default: %(default)s")
    args = parser.parse_args(argv)
    before = args.document.read_text()
    after = filled(before, args.results)
    if args.check:
        print(
            "up to date"
            if after == before
            else f"{args.document} is not what the results say: python -m benchmarks.report"
        )
        return int(after != before)
    args.document.write_text(after)
    print(f"written: {args.document}")
    return 0


def filled(text: str, results: Path) -> str:
    """The document with every table made anew; a marker of an unknown name is an error."""

    def fill(match: re.Match[str]) -> str:
        file = results / f"{match[1]}.json"
        if match[1] not in TABLES:
            raise SystemExit(f"{match[0].splitlines()[0]}: there is no table of this name, only {', '.join(TABLES)}")
        if not file.is_file():
            return match[0]
        content = json.loads(file.read_text())
        return f"<!-- begin {match[1]} -->\n\n{_where(content['machine'])}\n\n{TABLES[match[1]](content)}\n<!-- end -->"

    return re.sub(r"<!-- begin (\S+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def _where(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    device = machine.get("gpu") or f"{machine['cores']} cores of an {machine['cpu']}"
    return f"*{device}, Python {machine['python']}, {versions}; commit {machine['commit']}.*"


def _bold_if(missed: bool, text: str) -> str:
    return f"**{text}**" if missed else text


def operators(content: dict[str, Any]) -> str:
    """Ratios by operator and shape; a missed must in bold."""
    table: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in content["targets"]:
        case, measure = row["what"].split(": ", 1)
        operator, shape = case.rsplit(" ", 1)
        table.setdefault((operator, measure), {})[shape] = row
    lines = []
    for (operator, measure), cells in table.items():
        ratios = [_bold_if(cells[s]["met"] is False, f"{cells[s]['ratio']:.3g}") if s in cells else "" for s in "ABCD"]
        musts = [row["must"].split()[-1] for row in cells.values() if row["must"]]
        sign = next((row["must"].split()[0] for row in cells.values() if row["must"]), "")
        lines.append([operator, measure, *ratios, f"{sign} {'/'.join(musts)}".strip()])
    return markdown(["operator", "ratio", "A", "B", "C", "D", "must"], lines)


def trained(content: dict[str, Any]) -> str:
    """A row a network and data set: its score, and the worst change of an image by layer type."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        for data, values in row["datasets"].items():
            found.setdefault((row["network"], data), {})[row["type"]] = values
    lines = []
    for (network, data), types in found.items():
        any_ = types["original"]
        changes = [
            _bold_if(not types[t]["kept"], f"{types[t]['difference']:.1g}") if t in types else "not run"
            for t in ("acda", "pafu", "sekg")
        ]
        lines.append([network, data, any_["images"], f"{any_['original']:.2f} {any_['unit']}", " / ".join(changes)])
    return markdown(["network", "data", "images", "original", "worst change, acda / pafu / sekg"], lines)


def compress(content: dict[str, Any]) -> str:
    """A row a network and number of atoms; plain and activation-aware truncation beside each other."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        found.setdefault((row["network"], row["atoms"]), {})[row["truncation"]] = row
    lines = []
    for (network, atoms), rows in found.items():
        plain, aware = rows.get("plain"), rows.get("aware")
        if plain is None or aware is None:
            continue
        worse = aware["output_error"] > plain["output_error"]
        scores = [
            f"{name} ({plain['images'][name]}): {plain['scores'][name]:.2f} → {aware['scores'][name]:.2f} (before {value:.2f})"
            for name, value in plain["original"].items()
        ]
        after = _bold_if(worse, f"{aware['output_error']:.3f}")
        errors = f"{plain['output_error']:.3f} → {after}"
        lines.append([network, atoms, errors, plain["unit"], "; ".join(scores)])
    headers = ["network", "m", "output error, plain → aware", "unit", "data (images): score, plain → aware"]
    return markdown(headers, lines)


def memory_accuracy(content: dict[str, Any]) -> str:
    """Median and worst error by kind of step."""
    import statistics

    groups: dict[tuple[str, bool], list[float]] = {}
    for row in content["rows"]:
        groups.setdefault((row["kind"], bool(row["converted"])), []).append(abs(row["error"]))
    lines = [
        [kind, "converted" if converted else "original", len(e), f"{statistics.median(e):.2%}", f"{max(e):.2%}"]
        for (kind, converted), e in sorted(groups.items())
    ]
    headers = ["step", "network", "models x batch sizes", "median error", "worst error"]
    return f"Measured by {content['measured_by']}.\n\n" + markdown(headers, lines)


def convert_speed(content: dict[str, Any]) -> str:
    """Seconds by layer type."""
    return markdown(
        ["type", "replaced", "s"], [[r["type"], r["replaced"], f"{r['seconds']:.2f}"] for r in content["rows"]]
    )


def cost_table(content: dict[str, Any]) -> str:
    """Speed, and the table's answer against a whole trace on random placements."""
    headers = ["model", "layers", "build, s", "look-ups a s", "whole trace, s", "FLOPs error", "memory error"]
    lines = [
        [
            *(r["model"], r["layers"], f"{r['build_s']:.1f}", f"{r['look_ups_per_s']:,}", f"{r['trace_s']:.2f}"),
            *(f"{r['flops_error']:.2%}", f"{r['memory_error']:.2%}"),
        ]
        for r in content["rows"]
    ]
    return f"{content['placements']} random placements a model.\n\n" + markdown(headers, lines)


def toys(content: dict[str, Any]) -> str:
    """A row an arm of the papers' toy experiments."""
    names = ("toy", "arm", "seed", "steps", "parameters", "error", "equivariance", "from_dirac", "from_zero", "seconds")
    return markdown(names, [[row.get(name) for name in names] for row in content["rows"]])


def placement(content: dict[str, Any]) -> str:
    """Budgets that hold, speed of the program and of proposals, and the modes on a synthetic space."""
    milp = content["milp"][0]
    text = (
        f"100 layers × 8 options × 2 budgets: {milp['exact_median_cpu_s']:.2f} s of CPU (highest "
        f"{milp['exact_max_cpu_s']:.2f} s), rough {milp['rough_median_cpu_s']:.2f} s.\n\n"
    )
    gates = [
        [r["model"], r["proposals"], r["over_budget"], r["wild_refused"], r["traced"], f"{r['worst_error']:.2%}"]
        for r in content["gate"]
    ]
    headers = [
        "model",
        "proposals",
        "over budget",
        "thrown at the gate, refused",
        "traced whole",
        "worst error of the table",
    ]
    text += markdown(headers, gates) + "\n"
    times = [[r["mode"], f"{r['proposal_median_s']:.3f}", f"{r['proposal_max_s']:.3f}"] for r in content["overhead"]]
    text += markdown(["mode", "proposal, median s", "highest s"], times) + "\n"
    modes = [
        [f"{r['rank_correlation']:.2f}", r["mode"], f"{r['after_20']:.0f}", f"{r['after_all']:.0f}"]
        for r in content["modes"]
    ]
    return text + markdown(["gain table's rank correlation", "mode", "after 20 trials, %", "after all, %"], modes)


def tabulated(content: dict[str, Any]) -> str:
    """A row a case, mode and gain table; what does not reach 95 % is bold."""
    spaces = [
        [
            *(c["case"], c["placements"], f"{c['original_loss']:.3f}", f"{c['optimum_loss']:.3f}"),
            f"{c['better_than_original']:.0%}",
        ]
        for c in content["cases"]
    ]
    headers = ["case", "placements", "original's loss", "optimum's", "better than the original"]
    lines = [
        [
            *(r["case"], r["mode"], r["gains"], _bold_if(not r["met"], f"{r['found_median']:.0f} %")),
            *(f"{r['found_lowest']:.0f} %", f"{r['seeds_that_reach_95']} of {content['seeds']}"),
        ]
        for r in content["rows"]
    ]
    found = f"found in {content['trials']} trials, median"
    rows = markdown(["case", "mode", "gains", found, "lowest", "seeds that reach 95 %"], lines)
    return markdown(headers, spaces) + "\n" + rows


def gain_methods(content: dict[str, Any]) -> str:
    """A row a method, best first."""
    truth = content["truth"]
    agree = "-" if truth["agreement"] is None else f"{truth['agreement']:.2f}"
    lines = [
        [
            *(r["method"], r["seeds"], f"{r['rank']:.2f} ± {r['sd']:.2f}", f"{r['rank_placements']:.2f}"),
            f"{r['cpu_seconds']:.0f}",
        ]
        for r in content["methods"]
    ]
    headers = ["method", "seeds", "rank correlation", "with whole placements", "CPU s"]
    told = f"{truth['entries']} gains, {truth['truth_seeds']} seeds; two halves of the truth agree at {agree}.\n\n"
    return told + markdown(headers, lines)


def search_cifar(content: dict[str, Any]) -> str:
    """A row an arm."""
    search = content["search"]
    lines = [
        [
            *(
                a["arm"],
                a["replaced"],
                f"{a['flops']:+.1%}",
                f"{a['memory']:+.1%}",
                _bold_if(not a["within"], _yes(a["within"])),
            ),
            *(a["seeds"], _spread(a["loss"], a["loss_sd"], 3), _spread(a["top1"], a["top1_sd"], 1)),
        ]
        for a in content["arms"]
    ]
    headers = ["arm", "replaced", "FLOPs", "memory", "within the budgets", "seeds", "loss", "top-1, %"]
    told = f"{search['trials']} trials in {search['seconds'] / 60:.1f} minutes, gains {search['gains']}, mode {search['mode']}."
    return f"{told}\n\n" + markdown(headers, lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _spread(mean: float, sd: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


TABLES: dict[str, Table] = {
    "placement": placement,
    "tabulated": tabulated,
    "gain_methods": gain_methods,
    "search_cifar": search_cifar,
    "toys-quick": toys,
    "toys": toys,
    "operators": operators,
    "trained": trained,
    "compress": compress,
    "memory_accuracy": memory_accuracy,
    "convert_speed": convert_speed,
    "cost_table": cost_table,
}


if __name__ == "__main__":
    sys.exit(main())
