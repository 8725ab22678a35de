"""Files: JSON read within limits, atomic writes, and names in a file confined to its folder."""

import atexit
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from surgeon.errors import CheckpointError, SurgeonError
from surgeon.util.unfinished import unfinished

MOST_BYTES = 64 << 20  # of a JSON file
_DEPTH = 64  # nesting of lists and objects
_WHOLE = 2**64  # integers are smaller
_NAME = 255  # bytes of a file name


# --- reading --------------------------------------------------------------------------------------------------------


def read_json(path: str | Path, error: type[SurgeonError] = CheckpointError, what: str = "") -> Any:
    """The JSON values of a file; raises `error`, which says `what` was expected."""
    return parse_json(read_text(path, error, what), f"{what} {path}".strip(), error)


def read_object(path: str | Path, error: type[SurgeonError] = CheckpointError) -> dict[str, Any]:
    """The JSON object of a file; raises `error`."""
    values = read_json(path, error)
    if not isinstance(values, dict):
        raise error(f"cannot read {path}: it is not a JSON object")
    return values


def read_text(path: str | Path, error: type[SurgeonError] = CheckpointError, what: str = "") -> str:
    """The text of a file of ordinary size; raises `error`, which says `what` was expected."""
    shown = f"{what} {shortened(path)}".strip()
    try:
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise error(f"cannot read {shown}: it is larger than {MOST_BYTES >> 20} MiB")
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"cannot read {shown}: it is not UTF-8 text") from problem
    except OSError as problem:
        if isinstance(problem, SurgeonError):
            raise
        raise error(f"cannot read {shown}: {problem.strerror or problem}") from problem


def parse_json(text: str | bytes, where: str, error: type[SurgeonError] = CheckpointError) -> Any:
    """JSON values of a string. Raises `error` for a syntax error, with its line, and for values outside our limits:

    numbers that are not finite or do not fit in 64 bits, and excessive nesting.
    """
    try:
        values = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
        _check_depth(values)
    except RecursionError as problem:
        raise error(f"{where} is not valid JSON: it is nested too deep") from problem
    except ValueError as problem:
        raise error(f"{where} is not valid JSON: {problem}") from problem
    return values


def _whole(text: str) -> int:
    if len(text) > 20 or not -_WHOLE < (value := int(text)) < _WHOLE:
        raise ValueError(f"a number of {len(text.lstrip('-'))} digits does not fit into 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _check_depth(values: Any) -> None:
    level, depth = [values], 0
    while level := [item for one in level if isinstance(one, dict | list) for item in _items(one)]:
        depth += 1
        if depth > _DEPTH:
            raise RecursionError


def _items(values: dict[str, Any] | list[Any]) -> Any:
    return values.values() if isinstance(values, dict) else values


def check_fields(values: Any, fields: Any, where: str, error: type[SurgeonError] = CheckpointError) -> None:
    """Raise `error`, with `where`, unless the values have the types described by `fields`.

    A type, or a tuple of types; a list with one item type; a dictionary of required keys, or of "*" for any keys.
    """
    if isinstance(fields, type | tuple):
        kinds = fields if isinstance(fields, tuple) else (fields,)
        if not isinstance(values, kinds) or (isinstance(values, bool) and bool not in kinds):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise error(f"{where} must be of type {names}, got {told(values)}")
        return
    if not isinstance(values, type(fields)):
        raise error(f"{where} must be a JSON {'list' if isinstance(fields, list) else 'object'}, got {told(values)}")
    if isinstance(fields, list):
        for i, item in enumerate(values):
            check_fields(item, fields[0], f"{where}: item {i}", error)
        return
    for key in values if "*" in fields else fields:
        check_fields(values.get(key), fields.get(key, fields.get("*")), f"{where}: {key}", error)


def told(value: Any) -> str:
    """A value for a message: "nothing" for None, on one line, shortened if long."""
    text = "nothing" if value is None else " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def inside(folder: Path, name: Any, error: type[SurgeonError] = CheckpointError) -> Path:
    """The entry of a folder named by a file. Raises `error` unless it is a plain name, and not a link.

    The file may be untrusted: `../../secret`, `/etc/passwd` and links must not lead out of the folder. The
    Hub's cache consists of links to its own `blobs`, which count as files of that folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or not name.isprintable():
        raise error(f"{folder}: {told(name)} is not the name of an entry of this folder")
    path = folder / name
    if folder.is_symlink() or (path.is_symlink() and not _in_hub_cache(path)):
        raise error(f"{path} is a link, or in one: links are not followed")
    return path


def _in_hub_cache(path: Path) -> bool:
    """Whether a link is HOME/snapshots/COMMIT/NAME and points to a file in HOME/blobs that is not itself a link."""
    snapshots = path.absolute().parent.parent
    return snapshots.name == "snapshots" and path.resolve().parent == snapshots.parent.resolve() / "blobs"


def check_plain(folder: Path, error: type[SurgeonError] = CheckpointError) -> None:
    """Raise `error` unless everything below the folder is a file or a folder: no links, no devices."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise error(f"{path} is a link or a device: it is not copied")


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: str | Path, error: type[SurgeonError] = CheckpointError) -> Iterator[Path]:
    """A temporary path that is renamed to `path` if the block succeeds; otherwise nothing is left.

    Raises `error` if it cannot be written, including when the disk is full.
    """
    path = Path(path)
    try:
        with unfinished(path) as folder:
            fresh = folder / path.name
            yield fresh
            sync(fresh)
            fresh.replace(path)
            sync(path.parent)
    except OSError as problem:
        if isinstance(problem, SurgeonError):
            raise
        raise error(f"cannot write {shortened(path)}: {problem.strerror or problem}") from problem


@contextmanager
def filling(path: str | Path, error: type[SurgeonError] = CheckpointError) -> Iterator[Path]:
    """A new folder whose files move into the folder `path`, which may contain others, if the block succeeds.

    Raises `error` if they cannot be written; then nothing is left.
    """
    path = Path(path)
    try:
        with unfinished(path) as fresh:
            yield fresh
            for file in sorted(file for file in fresh.rglob("*") if file.is_file()):
                place = path / file.relative_to(fresh)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
    except OSError as problem:
        if isinstance(problem, SurgeonError):
            raise
        raise error(f"cannot write {shortened(path)}: {problem.strerror or problem}") from problem


def write_text(path: str | Path, text: str, error: type[SurgeonError] = CheckpointError) -> None:
    """Write a text file atomically; raises `error`."""
    with writing(path, error) as fresh:
        fresh.write_text(text, encoding="utf-8")


def write_bytes(path: str | Path, content: bytes, error: type[SurgeonError] = CheckpointError) -> None:
    """Write a file atomically; raises `error`."""
    with writing(path, error) as fresh:
        fresh.write_bytes(content)


def sync(path: Path) -> None:
    """Flush a file, or a folder's directory entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def here(path: str | Path) -> str:
    """A path for a message: relative if it is below the working directory."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else str(path)


def shortened(path: str | Path) -> str:
    """A path for a message, shortened: invalid names may be pages long."""
    text = str(path)
    return text if len(text) <= _NAME else f"{text[:60]}... ({len(text)} characters)"


# --- the cache ------------------------------------------------------------------------------------------------------


@cache
def _temporary_cache() -> Path:
    folder = tempfile.mkdtemp(prefix="surgeon-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logging.getLogger(__name__).warning("no home folder: tables are stored in %s (or set SURGEON_CACHE)", folder)
    return Path(folder)


def cache_folder() -> Path:
    """Folder for cached tables: `SURGEON_CACHE`, else ~/.cache/surgeon; a temporary folder for users without a home."""
    given = os.environ.get("SURGEON_CACHE")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "surgeon"
    except RuntimeError:  # HOME is unset, and the user is not in the password file
        return _temporary_cache()
