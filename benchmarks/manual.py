"""Regenerate docs/cli.md from the parsers of `surgeon`; the text before the marker stays.

    python -m benchmarks.manual [--check]

--check writes nothing and exits 1 if the page differs from `--help`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import surgeon.cli
from benchmarks._results import ROOT, markdown

PAGE = ROOT / "docs" / "cli.md"
MARKER = "<!-- from here on: python -m benchmarks.manual -->"
COMMON = {"--json", "-q", "--quiet", "--debug"}  # of all commands; the text before the marker has them
PAGES = {
    "try": "try.md",
    "finetune": "finetuning.md",
    "evaluate": "tasks.md",
    "collapse": "collapse.md",
    "visualize": "pictures.md",
    "export": "export.md",
    "push": "hub.md",
    "cost": "cost.md",
    "bench": "cost.md",
    "zoo": "zoo.md",
    "doctor": "operators.md",
    "place": "search.md",
    "gains": "search.md",
    "search": "search.md",
    "study": "search.md",
    "convert": "converting.md",
    "verify": "converting.md",
    "revert": "converting.md",
    "inspect": "selecting.md",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    args = parser.parse_args(argv)
    text = PAGE.read_text()
    wanted = filled(text)
    if text == wanted:
        print("up to date")
    elif args.check:
        print(f"{PAGE} is not what --help says: python -m benchmarks.manual")
        return 1
    else:
        PAGE.write_text(wanted)
        print(f"written: {PAGE}")
    return 0


def filled(text: str) -> str:
    """The page with everything behind the marker made anew."""
    before, marker, _ = text.partition(MARKER)
    if not marker:
        raise SystemExit(f"{PAGE} has no line {MARKER!r}")
    return f"{before}{MARKER}\n\n{manual(surgeon.cli._parser())}"


def manual(parser: argparse.ArgumentParser) -> str:
    """All commands: a table of them, the options of `surgeon` itself, and a section each."""
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    lines = [[f"[{name}](#{name})", command.description] for name, command in commands.choices.items()]
    own = [row for group in parser._action_groups for row in _rows(group) if "COMMAND" not in row[0]]
    parts = [f"## All commands\n\n{markdown(['command', 'what it does'], lines)}", markdown(["surgeon", ""], own)]
    parts += [_section(name, command) for name, command in commands.choices.items()]
    return "\n".join(parts)


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    said = f"{parser.description[0].upper()}{parser.description[1:]}."
    page = PAGES.get(name)
    more = f" More: [{page}]({page})." if page else ""
    parts = [f"## {name}\n\n{said}{more}\n"]
    for group in parser._action_groups:
        rows = list(_rows(group))
        if rows:
            parts.append(markdown([group.title, ""], rows))
    parts.append(f"```text\n{parser.epilog.strip()}\n```\n")
    return "\n".join(parts)


def _rows(group: argparse._ArgumentGroup) -> Iterator[list[str]]:
    """What is typed and what is said of it, of every argument that --help shows."""
    formatter = argparse.HelpFormatter("surgeon")
    for action in group._group_actions:
        shown = action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
        if shown and not COMMON & set(action.option_strings):
            yield [f"`{_typed(action)}`", formatter._expand_help(action) if action.help else ""]


def _typed(action: argparse.Action) -> str:
    """`-o, --output OUT`, the same in all versions of Python."""
    value = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest)
    shown = {0: "", "?": f"[{value}]", "*": f"[{value} ...]", "+": f"{value} [{value} ...]"}.get(
        0 if action.nargs == 0 else action.nargs or "", str(value)
    )
    return f"{', '.join(action.option_strings)} {shown}".strip()


if __name__ == "__main__":
    sys.exit(main())
