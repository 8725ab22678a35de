"""Regenerate the tables in docs/ from benchmarks/results/*.json; the text around them stays.

    python -m benchmarks.report [--check]

A table is between `<!-- begin NAME -->` and `<!-- end -->`. A missing result leaves its table unchanged. --check
writes nothing and exits 1 if a table differs from the results.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _search_tables
from benchmarks._results import RESULTS, ROOT, markdown
from surgeon.util.tables import count

DOCUMENTS = tuple(sorted((ROOT / "docs").glob("*.md")))
Table = Callable[[dict[str, Any]], str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the document is up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--document", type=Path, nargs="+", default=DOCUMENTS, help="default: all of docs/")
    args = parser.parse_args(argv)
    stale = [path for path in args.document if filled(path.read_text(), args.results) != path.read_text()]
    for path in stale:
        if args.check:
            print(f"{path} is not what the results say: python -m benchmarks.report")
        else:
            path.write_text(filled(path.read_text(), args.results))
            print(f"written: {path}")
    if not stale:
        print("up to date")
    return int(args.check and bool(stale))


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
    """Ratios by operator and shape; a missed must in bold, a reached aim in italics, by the median of the runs."""
    table: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in content["targets"]:
        case, measure = row["what"].split(": ", 1)
        operator, shape = case.rsplit(" ", 1)
        table.setdefault((operator, measure), {})[shape] = row
    lines = []
    for (operator, measure), cells in table.items():
        ratios = [_ratio(cells[s]) if s in cells else "" for s in "ABCD"]
        lines.append([operator, measure, *ratios, _bounds(cells, "must"), _bounds(cells, "aim")])
    musts = [not row["met"] for row in content["targets"] if row["must"]]
    aims = [row["aim_met"] for row in content["targets"] if row["aim"]]
    counted = f"Musts missed: {sum(musts)} of {len(musts)}. Aims reached: {sum(aims)} of {len(aims)}.\n"
    return f"{markdown(['operator', 'ratio', *'ABCD', 'must', 'aim'], lines)}\n{counted}{_shares(content.get('shares', []))}"


def _shares(rows: list[dict[str, Any]]) -> str:
    """The share of the machine's rate that each step of an operator reaches, a column a shape; empty where none was taken."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        operator, variant, shape = row["case"].split("/")
        key = (f"{operator} {variant}", f"{row['step']}, {row['measure']}", row["of"])
        cells.setdefault(key, {})[shape] = f"{row['share']:.2f}"
    lines = [[*key, *(found.get(shape, "") for shape in "ABCD")] for key, found in cells.items()]
    return "\n" + markdown(["operator", "step", "share of", *"ABCD"], lines) if lines else ""


def _ratio(row: dict[str, Any]) -> str:
    """The median of the runs, and from where to where they reach."""
    text = f"{row['ratio']:.3g}"
    text = _bold_if(row["met"] is False, f"*{text}*" if row["aim_met"] else text)
    return text if row["least"] == row["most"] else f"{text} ({row['least']:.3g} to {row['most']:.3g})"


def _bounds(cells: dict[str, dict[str, Any]], kind: str) -> str:
    """`>= 25/16/8/20`, of the shapes that have one."""
    said = [row[kind].split() for row in cells.values() if row[kind]]
    return f"{said[0][0]} {'/'.join(bound for _, bound in said)}" if said else ""


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


def finetune_defaults(content: dict[str, Any]) -> str:
    """Loss and accuracy by type, warm-up and rate of the new parameters."""
    from benchmarks.finetune_defaults import lines

    before = content["rows"][0]
    told = f"Before training {before['loss_before']:.3f} / {before['top1_before']:.1f}.\n\n"
    return told + markdown(*lines(content["rows"]))


def collapsed(content: dict[str, Any]) -> str:
    """Original, converted and collapsed beside each other."""
    rows = content["rows"]
    said = (
        f"{content['model']}, {content['units']} units, {len(content['kept'])} kept; evidence: "
        f"{', '.join(content['evidence'])}; outputs differ by at most {content['max_rel_error']:.1g} (relative).\n\n"
    )
    return said + markdown(
        list(rows[0]), [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows]
    )


def adfnet(content: dict[str, Any]) -> str:
    """Both formulations, and what lies between them."""
    lines = [
        [name, *(f"{content[key][value]:,.0f}" for value in ("cpu_ms", "peak_growth_mb"))]
        for name, key in (("surgeon", "surgeon"), ("unfold", "unfold"))
    ]
    lines.append(["unfold / surgeon", f"{content['time_ratio']:.2f}", f"{content['memory_ratio']:.2f}"])
    size = f"{content['size']}×{content['size']}"
    told = f"`{content['network']}`, one image of {size}, {content['machine']['threads']} thread; "
    told += f"largest difference of the outputs {content['difference']:.1e}.\n\n"
    return told + markdown(["filtering", "CPU time, ms", "growth of peak memory, MB"], lines)


def paper_tables(content: dict[str, Any]) -> str:
    """Every table and setting that has rows, under a heading of its own."""
    from benchmarks.paper_tables import summary, texts

    tables = [f"### {title}\n\n{markdown(headers, lines)}" for title, headers, lines in texts(content["rows"])]
    return "\n".join([f"{summary(content['rows'])}\n", *tables])


def export_coverage(content: dict[str, Any]) -> str:
    """A row a network: what is free, the error of the file, and why it is not more."""
    from benchmarks.export_coverage import HEADERS, line

    rows = content["rows"]
    counts = {
        status: sum(row["status"] == status for row in rows) for status in dict.fromkeys(r["status"] for r in rows)
    }
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    return f"{len(rows)} networks: {told}.\n\n" + markdown(HEADERS, [line(row) for row in rows])


def generators(content: dict[str, Any]) -> str:
    """What the forms of the generator cost, and what they do to the toy."""
    from benchmarks.generators import cost_table, toy_table

    return markdown(*cost_table(content["rows"])) + "\n" + markdown(*toy_table(content["rows"]))


def compiled(content: dict[str, Any]) -> str:
    """Compiled formulas over lean operators."""
    from benchmarks.compiled import lines

    return markdown(*lines(content["rows"]))


def native_models(content: dict[str, Any]) -> str:
    """Layers and networks with compiled operators and with torch's."""
    from benchmarks.native_models import lines

    return markdown(*lines(content["rows"]))


def large_image(content: dict[str, Any]) -> str:
    """Growth of memory by layer."""
    from benchmarks.large_image import lines

    sizes = sorted({f"1×{row['channels']}×{row['size']}×{row['size']}" for row in content["rows"]})
    return f"Input {', '.join(sizes)}, float32.\n\n" + markdown(*lines(content["rows"]))


def learning(content: dict[str, Any]) -> str:
    """A table per study: every arm at the rate that its own images chose, and the paired differences."""
    parts = []
    headers = [
        "network",
        "parameters",
        "FLOPs",
        "cosine distance",
        "rate (swept)",
        "seeds",
        "scores",
        "against",
        "difference",
    ]
    for entry in content["studies"].values():
        lines = [
            [
                line["arm"],
                f"{line['parameters']:,}",
                count(line["FLOPs"]),
                "" if line["distance"] is None else f"{line['distance']:.2f}",
                f"{line['rate']:g} ({', '.join(f'{rate:g}' for rate in line['swept'])}{'; at its edge' * line['at edge']})",
                line["seeds"],
                line["scores"],
                line["against"] if line["difference"] else "",
                "; ".join(
                    _bold_if(word != "undecided", f"{gap}: {word}")
                    for gap, word in zip(line["difference"].split("; "), line["verdicts"].values(), strict=False)
                ),
            ]
            for number, line in enumerate(entry["lines"])
            if line["difference"] or line["arm"] not in [other["arm"] for other in entry["lines"][:number]]
        ]  # an arm beside a network that was not trained has one line, and no comparison
        parts.append(f"**{entry['title']}**\n\n{markdown(headers, lines)}")
    return "\n".join(parts)


TABLES: dict[str, Table] = {
    "learning": learning,
    "placement": _search_tables.placement,
    "tabulated": _search_tables.tabulated,
    "tabulated-new": _search_tables.tabulated,
    "gain_methods": _search_tables.gain_methods,
    "gain_methods-new": _search_tables.gain_methods,
    "search_cifar": _search_tables.search_cifar,
    "search_cifar-wide": _search_tables.search_cifar,
    "search_cifar-resnet56_cifar": _search_tables.search_cifar,
    "finetune_defaults": finetune_defaults,
    "collapsed": collapsed,
    "adfnet": adfnet,
    "paper_tables": paper_tables,
    "export_coverage": export_coverage,
    "generators": generators,
    "compiled": compiled,
    "large_image": large_image,
    "toys": toys,
    "operators": operators,
    "operators_threads": operators,
    "native_models": native_models,
    "trained": trained,
    "compress": compress,
    "memory_accuracy": memory_accuracy,
    "convert_speed": convert_speed,
    "cost_table": cost_table,
}


if __name__ == "__main__":
    sys.exit(main())
