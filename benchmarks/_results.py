"""Output of the benchmark programs: JSON with the machine and versions, tables, and rows that survive a kill."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks._bench import machine as hardware

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """What `_bench` says of the machine, with memory (bytes), GPU, versions and the commit of this checkout."""
    return hardware() | {
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"torch": torch.__version__} | {name: _version(name) for name in ("torchvision", "timm", "numpy")},
        "commit": _commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write atomically, with the machine; a line for each row of a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(as_lines({"machine": machine()} | content))
    temporary.replace(path)


def as_lines(content: dict[str, Any]) -> str:
    """JSON with a line for each entry, and for each item of an entry that is a list or an object of objects."""

    def entry(value: Any) -> str:
        if isinstance(value, dict) and value and all(isinstance(item, dict | list) for item in value.values()):
            inner, ends = [f"{json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()], "{}"
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            inner, ends = [json.dumps(item) for item in value], "[]"
        else:
            return json.dumps(value)
        return f"{ends[0]}\n  " + ",\n  ".join(inner) + f"\n {ends[1]}"

    plain = json.loads(json.dumps(content))  # a tuple is a list
    return "{\n " + ",\n ".join(f"{json.dumps(key)}: {entry(value)}" for key, value in plain.items()) + "\n}\n"


def only(row: dict[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """What a row has of these fields: what its table says. The rest stays in the file of rows, which is not committed."""
    return {field: row[field] for field in fields if field in row}


class Rows:
    """Rows of a long run, one JSON line each, appended as they come; a second run finds them and goes on.

    Where there are none, the rows of the committed JSON of the same name are gone on from: a clone need not begin again.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        elif not path.is_file() and path.with_suffix(".json").is_file():
            known = json.loads(path.with_suffix(".json").read_text()).get("rows", [])
            self.rows = {row["key"]: row for row in known if "key" in row}
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the run was killed
                    continue
                self.rows[row["key"]] = row
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()))

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row; a later one under the same key wins."""
        self.rows[key] = {"key": key} | row
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[key]) + "\n")

    def values(self) -> list[dict[str, Any]]:
        """All rows, in the order they came."""
        return list(self.rows.values())


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], file: Any = None) -> None:
    """Print a table with columns as wide as they need to be; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    right = [all(isinstance(row[i], int | float) or row[i] is None for row in rows) for i in range(len(headers))]
    for line in [list(headers), ["-" * width for width in widths], *cells]:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        print("  ".join(padded).rstrip(), file=file or sys.stdout)


def markdown(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The same as a Markdown table."""
    lines = [list(headers), ["---"] * len(headers), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
