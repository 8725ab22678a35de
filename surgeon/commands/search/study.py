"""`surgeon study`: inspect a search, running or finished, and extract its best model. Imports torch only to export."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.commands.common import checks
from surgeon.commands.common.arguments import print_json, whole
from surgeon.errors import ConfigError
from surgeon.util.outputs import check_output
from surgeon.util.waiting import waiting

if TYPE_CHECKING:
    from surgeon.search.study.folder import Finished

NEEDS = ("optuna", "torch")  # libraries
DESCRIPTION = "status, best placements, report and export of a search"
EXAMPLES = """  surgeon study status runs/resnet50-classification-search
  surgeon study best runs/resnet50-classification-search --count 3 --json
  surgeon study report runs/resnet50-classification-search --against runs/resnet50-random
  surgeon study export runs/resnet50-classification-search -o runs/resnet50-found
  surgeon convert resnet50 --recipe runs/resnet50-found/recipe.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon study`; --json, --quiet and --debug are common to all commands."""
    parser.add_argument("action", choices=tuple(_ACTIONS), help="what to do; the search may still be running")
    parser.add_argument("folder", metavar="FOLDER", help="a folder written by surgeon search")
    parser.add_argument("--storage", metavar="URL", help="the search's database, if it is on a server")
    parser.add_argument(
        "--count", type=whole, default=5, metavar="K", help="status, best: number of trials (default: 5)"
    )
    parser.add_argument("--against", metavar="FOLDER", help="report: another search (--sampler random) to compare with")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="report, export: folder to write (default: report or export in FOLDER)",
    )
    parser.add_argument("--force", action="store_true", help="export: replace OUT if surgeon wrote it")


def check(args: argparse.Namespace) -> None:
    """Refuse invalid arguments before torch is loaded."""
    checks.positives(args, ("count",))
    checks.search(args.folder)
    if args.against:
        checks.search(args.against)
    if args.action == "export":
        check_output(args.output or Path(args.folder, "export"), force=args.force)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 if there is nothing to show or to export yet."""
    from surgeon.search.study.folder import read_search

    return _ACTIONS[args.action](args, read_search(args.folder, args.storage))


def _status(args: argparse.Namespace, found: "Finished") -> int:
    from surgeon.search.results.summary import status_lines, status_values

    if args.json:
        print_json(status_values(found, args.count))
    else:
        print("\n".join(status_lines(found, args.count)))
    return 0


def _best(args: argparse.Namespace, found: "Finished") -> int:
    from surgeon.search.results.summary import record_values
    from surgeon.util.tables import table

    best = found.ranked()[: args.count]
    if args.json:
        print_json([record_values(found, one) for one in best])
        return 0 if best else 1
    if not best:
        print(f"surgeon: no trial of {args.folder} is complete yet", file=sys.stderr)
        return 1
    for one in best:
        print(f"trial {one.number} ({one.source}): {found.about['task']['primary']} {found.value(one):.5g}")
        rows = [[layer, label] for layer, label in one.placement.items()]
        print((table(["layer", "becomes"], rows, left=2) if rows else "the unmodified model") + "\n")
    return 0


def _report(args: argparse.Namespace, found: "Finished") -> int:
    from surgeon.search.results.report import write_report
    from surgeon.search.study.folder import read_search

    other = read_search(args.against, args.storage) if args.against else None
    with waiting("drawing", quiet=args.quiet):
        page = write_report(found, args.output or found.folder.report, other)
    if args.json:
        print_json({"report": str(page)})
    else:
        print(f"written to  {page}")
    return 0


def _export(args: argparse.Namespace, found: "Finished") -> int:
    """Export the surgeon folder of the best placement, from the finals if there are any, otherwise from the trials."""
    import shutil

    from surgeon.models.folder import fresh_folder
    from surgeon.util.files import check_plain
    from surgeon.util.tables import counted

    source, about = _source(found)
    output = args.output or found.folder.path / "export"
    check_output(output, force=args.force)
    check_plain(source)
    with fresh_folder(output, args.force) as fresh:
        shutil.copytree(source, fresh, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("training"))
        _tell_card(fresh, found, about)
    warnings = _export_warnings(found, about)
    for told in () if args.quiet else warnings:
        print(f"surgeon: WARNING: {told}", file=sys.stderr)
    if args.json:
        print_json({"output": str(output), **about, "warnings": warnings})
    else:
        told, weights = _told(found, about)
        print(f"{counted(len(about['placement']), 'layer')}, {told}\nwritten to  {output}")
        if weights:
            print(f"weights     those of {weights}")
        print(f"recipe      {output / 'recipe.json'}")
    return 0


def _told(found: "Finished", about: dict[str, Any]) -> tuple[str, str | None]:
    """The value and the unmodified model's, and, of finals with several seeds, the one whose weights are exported."""
    from surgeon.util.tables import apart, counted

    primary, seeds = found.about["task"]["primary"], about["values"]
    known = [about[name] for name in ("value", "original") if about[name] is not None]
    value, *rest = apart(*known, *seeds[:1])
    many = len(seeds) > 1
    how = f"{about['stage']}, mean of {counted(len(seeds), 'seed')}" if many else about["stage"]
    beside = f", the unmodified model {rest[0]}" if about["original"] is not None else ""
    weights = f"one seed of {len(seeds)}: {primary} {rest[-1]}" if many else None
    return f"{primary} {value} ({how}){beside}", weights


def _tell_card(folder: Path, found: "Finished", about: dict[str, Any]) -> None:
    """Add to the model card how the placement was found: its own score is that of one training."""
    from surgeon.models.folder import write
    from surgeon.records.card import FILE, found_by_search

    card = folder / FILE
    if card.is_file():
        write(card, card.read_text(encoding="utf-8") + found_by_search(*_told(found, about)))


def _export_warnings(found: "Finished", about: dict[str, Any]) -> list[str]:
    """Limits of the claim that the exported placement is better than the unmodified model."""
    from surgeon.search.results.comparison import comparison
    from surgeon.search.results.summary import unfinished, worse_than_start
    from surgeon.util.tables import apart

    value, original, told = about["value"], about["original"], []
    end = comparison(found)
    sign = 1.0 if found.higher_is_better else -1.0
    if original is not None and sign * (value - original) <= 0:
        both = " against ".join(apart(original, value))
        told.append(f"the unmodified model, trained equally, is {'as good' if value == original else 'better'}: {both}")
    elif about["stage"] == "trials":
        told.append(
            "one short training, the best of many: chance makes some look good; --finals of the search trains the best with seeds"
        )
    elif end is not None and end.verdict == "undecided":
        told.append(f"not settled to be better than the unmodified model, trained equally: gain {end.gain}")
    return told + [note for note in (unfinished(found), worse_than_start(found)) if note is not None]


def _source(found: "Finished") -> tuple[Path, dict[str, Any]]:
    """The folder to copy, and a description of its model: the value it was chosen by, and the values of its seeds."""
    import statistics

    from surgeon.search.evaluate.finals import best_arm
    from surgeon.search.study.folder import read_kept
    from surgeon.util.files import inside

    if found.finals is not None:
        arm = best_arm(found.finals["arms"], higher=found.higher_is_better)
        folder = None if arm is None else found.folder.final_of(arm["hash"])
        if arm is not None and folder is not None:
            return folder, {
                "stage": "finals",
                "hash": arm["hash"],
                "value": statistics.fmean(arm["values"]),
                "values": arm["values"],
                "original": _original_value(found, "finals"),
                "placement": arm["placement"],
            }
    kept = read_kept(found.folder.best)
    if kept is None:
        raise ConfigError(f"no placement with replacements was trained to its end in {found.folder.path} yet")
    about = {"stage": "trials", **kept, "values": [kept["value"]], "original": _original_value(found, "trials")}
    return inside(found.folder.best, kept["hash"]), about


def _original_value(found: "Finished", stage: str) -> float | None:
    import statistics

    if stage == "finals" and found.finals is not None:
        arms = [arm for arm in found.finals["arms"] if arm["role"] == "original" and arm["values"]]
        return statistics.fmean(arms[0]["values"]) if arms else None
    one = found.original()
    return None if one is None else found.value(one)


_ACTIONS = {"status": _status, "best": _best, "report": _report, "export": _export}
