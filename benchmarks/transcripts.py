"""Write the outputs of the commands in docs/tour.md, and the excerpts in README.md and docs/search.md, by running them.

    python -m benchmarks.transcripts [FOLDER]

A `console` block has commands after "$ ", each followed by its output (stdout; progress goes to stderr). They run in order in
one empty folder, FOLDER or a temporary one. A `python` block that begins with "# NAME.py" is a file of that name. If a block has
a line "...", as many lines are kept before and after it as there were. Needs what `pip install -e ".[dev]"` installs.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks._results import ROOT

TOUR = ROOT / "docs" / "tour.md"
EXCERPTS = (ROOT / "README.md", ROOT / "docs" / "search.md")  # show some of the tour's commands
PICTURES = {"pictures/photo/body.2-selection.png": ROOT / "docs" / "pictures" / "tour-selection.png"}
CUT = "..."
_CONSOLE = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where the commands run; kept (default: a temporary one)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty: the commands begin with nothing")
        outputs = dict(run(TOUR.read_text(), folder))
        for document in (TOUR, *EXCERPTS):
            document.write_text(filled(document.read_text(), outputs))
            print(f"written: {document}")
        for made, kept in PICTURES.items():
            shutil.copy(folder / made, kept)
            print(f"written: {kept}")
    return 0


def files(text: str) -> dict[str, str]:
    """The files that a document's Python blocks are, by name."""
    return dict(_FILE.findall(text))


def transcript(text: str) -> dict[str, str]:
    """What a document says that its commands print, in their order."""
    parts = [part for block in _CONSOLE.findall(text) for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return {command: output.strip("\n") for command, _, output in (part.partition("\n") for part in parts)}


def run(text: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Run a document's commands in a folder; yields each with what it printed. A command that fails ends it all."""
    for name, content in files(text).items():
        (folder / name).write_text(content)
    for command in transcript(text):
        print(f"$ {command}", file=sys.stderr, flush=True)
        yield command, _printed(command, folder)


def _printed(command: str, folder: Path) -> str:
    """Stdout of a command, `surgeon` and `python` being those of this interpreter and this checkout."""
    ours = f'surgeon() {{ "{sys.executable}" -m surgeon "$@"; }}; python() {{ "{sys.executable}" "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        ["bash", "-c", ours + command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {command}\n{done.stdout}")
    return done.stdout.replace(f"{folder}/", "").strip("\n")


def filled(text: str, outputs: Mapping[str, str]) -> str:
    """The document with every command's output in its place; a command without one is an error that names it."""
    before = transcript(text)
    missing = [command for command in before if command not in outputs]
    if missing:
        raise SystemExit(f"only docs/tour.md says what commands print, and it has no {missing[0]!r}")
    shown = iter(f"$ {command}\n{cut(outputs[command], like)}".rstrip("\n") for command, like in before.items())

    def block(match: re.Match[str]) -> str:
        count = len(re.findall(r"^\$ ", match.group(), re.MULTILINE))
        return "\n\n".join(next(shown) for _ in range(count)) + "\n"

    return _CONSOLE.sub(block, text)


def cut(output: str, like: str) -> str:
    """The output with its middle left out where `like` has a line "...", which says how many lines stay on either side."""
    pattern, lines = like.split("\n"), output.split("\n")
    if CUT not in pattern:
        return output
    first = pattern.index(CUT)
    last = len(pattern) - first - 1
    if first + last >= len(lines):
        return output
    return "\n".join([*lines[:first], CUT, *lines[len(lines) - last :]])


if __name__ == "__main__":
    sys.exit(main())
