"""Folders of converted models as files: written next to their place, complete before they take it, and checked when read."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from surgeon.errors import CheckpointError, RecipeError, SurgeonError
from surgeon.util.files import check_fields, sync
from surgeon.util.outputs import RECIPE, check_output
from surgeon.util.unfinished import unfinished


@contextlib.contextmanager
def fresh_folder(path: Path, force: bool) -> Iterator[Path]:
    """A temporary folder next to `path` that replaces it if the block succeeds and is removed otherwise."""
    try:
        with unfinished(path) as folder:
            yield folder
            for file in folder.rglob("*"):
                sync(file)
            sync(folder)
            _take_place(folder, path, force)
            sync(path.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, SurgeonError):
            raise
        raise CheckpointError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def _take_place(folder: Path, path: Path, force: bool) -> None:
    if not path.exists():
        folder.rename(path)
        return
    check_output(path, force=force)
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    try:
        folder.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write(file: Path, text: str) -> None:
    """Write a text file of the folder."""
    file.write_text(text, encoding="utf-8")


def file_sha256(file: Path) -> str:
    """SHA-256 of the content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_file(file: Path, artefact: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless the file is the one that was saved."""
    try:
        expected = artefact["files"][file.name]
        check_fields(expected, {"bytes": int, "sha256": str}, "files", RecipeError)
        size, digest = expected["bytes"], expected["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the artefact section of {file.parent / RECIPE} does not describe {file.name}"
        ) from error
    if not file.is_file():
        raise CheckpointError(f"{file.parent} is incomplete: {file.name} is missing")
    if file.stat().st_size != size:
        raise CheckpointError(f"{file} is damaged: {file.stat().st_size} bytes, expected {size}")
    found = file_sha256(file)
    if found != digest:
        raise CheckpointError(f"{file} is damaged or was changed: SHA-256 {found}, expected {digest}")
