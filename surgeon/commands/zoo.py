"""`surgeon zoo`: the papers' networks, their origin, published numbers against ours. Imports torch late."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from surgeon.commands.common.arguments import print_json

if TYPE_CHECKING:
    from surgeon.zoo.table import ZooRow

DESCRIPTION = "list the papers' networks; published numbers against ours"
EXAMPLES = """  surgeon zoo
  surgeon zoo ad_resnet_s
  surgeon zoo 'adfnet*' --table
  surgeon zoo --markdown > zoo-table.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `surgeon zoo`; --json, --quiet and --debug are common to all commands."""
    parser.add_argument("name", nargs="?", metavar="NAME|PATTERN", help="one network, or a glob or part of the names")
    parser.add_argument(
        "--table", action="store_true", help="parameters and MACs, published and ours, and why they differ"
    )
    parser.add_argument("--markdown", action="store_true", help="the table as markdown, for documents")
    parser.add_argument("--fresh", action="store_true", help="recount everything (the whole table: a minute)")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 if a number is off by more than 1 % without a reason."""
    from surgeon import zoo

    names = _matching(args.name, zoo.names())
    if args.table or args.markdown:
        return _table(args, names)
    if args.name in names:
        return _one(args, args.name)
    from surgeon.zoo.table import describe

    entries = [describe(zoo.entry(name)) for name in names]
    if args.json:
        print_json(entries)
        return 0
    longest = max(len(name) for name in names)
    for found in entries:
        print(f"{found['name']:<{longest}}  {found['summary']}")
    return 0


def _matching(pattern: str | None, names: list[str]) -> list[str]:
    """A full name means itself; otherwise a glob or part of names. Raises `ModelError` if nothing matches."""
    import fnmatch

    from surgeon import zoo

    if pattern is None:
        return names
    pattern = pattern.removeprefix("zoo/")
    if pattern in names:
        return [pattern]
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [name for name in names if fnmatch.fnmatchcase(name, glob)] or [zoo.entry(pattern).name]


def _one(args: argparse.Namespace, name: str) -> int:
    from surgeon.commands.common.console import width
    from surgeon.util.tables import paragraph
    from surgeon.zoo import entry
    from surgeon.zoo.table import describe, make_row

    found, row = describe(entry(name)), make_row(name, fresh=args.fresh)
    if args.json:
        print_json(found | {"params": row.params, "macs": row.macs})
        return 0
    columns = width()
    print(f"{name}\n")
    for part in found["description"].split("\n\n"):
        print(paragraph(" ".join(part.split()), width=columns) + "\n")
    print(
        f"parameters  {row.params:,}"
        + (f" (compared: {row.compared_params:,})" if row.compared_params != row.params else "")
    )
    print(f"MACs        {row.macs / 1e9:,.3f} G at {'x'.join(map(str, row.at))}")
    if found["published"]:
        print(f"published   {_published(row)}")
    if found["difference"]:
        print(paragraph(f"differs     {found['difference']}", width=columns, hang=" " * 12))
    for training in found["training"]:
        preset = f" --preset {training['preset']}" if training["preset"] else ""
        print(f"training    surgeon finetune zoo/{name} --recipe {training['recipe']}{preset} --data DIR")
    if found["by_hand"]:
        print(paragraph(f"beside it   {found['plain']}; {found['by_hand']}", width=columns, hang=" " * 12))
    elif found["plain"]:
        print(f"made from   {found['plain']}, by the recipe (surgeon convert --recipe zoo/{name})")
        print_json(found["recipe"])
    return 0


def _published(row: "ZooRow") -> str:
    parts = []
    if row.published_params is not None and row.params_off is not None:
        parts.append(f"{row.published_params / 1e6:.2f} M parameters ({row.params_off:+.1%})")
    if row.published_macs is not None and row.macs_off is not None:
        parts.append(f"{row.published_macs / 1e9:.1f} G ({row.macs_off:+.1%})")
    return ", ".join(parts) + f"; {row.where}"


def _table(args: argparse.Namespace, names: list[str]) -> int:
    from surgeon.commands.common.console import Progress, width
    from surgeon.util.tables import paragraph, table
    from surgeon.zoo.table import make_table, markdown, percent

    with Progress(enabled=not args.quiet) as tell:
        rows = make_table(names, tell, fresh=args.fresh)
    unexplained = [row.name for row in rows if row.unexplained]
    if args.json:
        print_json([row.to_dict() for row in rows])
    elif args.markdown:
        print(markdown(rows), end="")
    else:
        header = ["network", "params", "published", "off", "GMAC", "published", "off"]
        print(table(header, [_line(row, percent) for row in rows], width=width()))
        for row in rows:
            if row.difference:
                print("\n" + paragraph(f"{row.name}: {row.difference} ({row.where}).", width=width(), hang="  "))
    for name in unexplained:
        print(f"surgeon: {name} is off by more than 1 % and nothing says why", file=sys.stderr)
    return 1 if unexplained else 0


def _line(row: "ZooRow", percent: Any) -> list[str]:
    return [
        row.name,
        f"{row.params / 1e6:.3f}M",
        "" if row.published_params is None else f"{row.published_params / 1e6:.2f}M",
        percent(row.params_off),
        f"{row.macs / 1e9:.3f}",
        "" if row.published_macs is None else f"{row.published_macs / 1e9:.1f}",
        percent(row.macs_off),
    ]
