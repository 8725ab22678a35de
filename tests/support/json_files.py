"""Writing and changing JSON files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text())
    write_json(path, change(values) or values)
