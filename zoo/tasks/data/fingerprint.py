"""Compact fingerprints of data, so that a resumed run or search can tell whether its data have changed."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgeon.errors import DataError
from surgeon.zoo.tasks.base import Split, Task
from surgeon.zoo.tasks.data.datasets import ItemDataset

_WHOLE = 64 << 20  # total bytes up to which all files are read in full
_SAMPLES = 64  # number of files read in a larger set, at most this much of each:
_PART = 1 << 20


def fingerprint(task: Task) -> dict[str, Any]:
    """JSON values describing the samples of both splits: number, names, sizes, classes, and contents as far as they are read.

    Names are relative to the folder that contains all files of a split, so the data may be moved. All files are read if their total
    is at most 64 MiB, otherwise 64 of them. Raises `DataError`.
    """
    found: dict[str, Any] = {split: _split(task, split) for split in ("train", "val")}
    classes = getattr(task, "data_classes", None)
    return found if classes is None else found | {"classes": list(classes)}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences between two fingerprints, in words; empty if the data are the same."""
    lines = []
    before, now = old.get("classes") or [], new.get("classes") or []
    for told, names in (("gone", set(before) - set(now)), ("new", set(now) - set(before))):
        if names:
            shown = sorted(map(str, names))
            lines.append(f"classes {told}: {', '.join(shown[:5])}{', ...' if len(shown) > 5 else ''}")
    if before != now and not lines:
        lines.append("the order of the classes changed")
    counts = {"samples": "samples", "files": "files", "bytes": "bytes of files"}
    hashes = {"names": "names or order of the files", "sizes": "sizes of files", "contents": "contents of files"}
    for split in ("train", "val"):
        a, b = old.get(split) or {}, new.get(split) or {}
        numbers = [
            f"{a.get(key)} {word} and are {b.get(key)}" for key, word in counts.items() if a.get(key) != b.get(key)
        ]
        if numbers:
            lines.append(f"{split} had {', '.join(numbers)}")
            continue
        lines += [f"{split}: {word} are others" for key, word in hashes.items() if a.get(key) != b.get(key)]
    return lines


def _split(task: Task, split: Split) -> dict[str, Any]:
    dataset = task.dataset(split)
    values: dict[str, Any] = {"samples": len(dataset)}
    if not isinstance(dataset, ItemDataset):
        return values
    items = [item for _, item in dataset.items]
    files = [part for item in items for part in _parts(item) if isinstance(part, Path)]
    if not files:
        return values | {"contents": _digest(_bytes(part) for item in items for part in _parts(item))}
    try:
        sizes = [path.stat().st_size for path in files]
        root = os.path.commonpath([path.parent for path in files])
        names = (
            os.path.relpath(part, root) if isinstance(part, Path) else str(part) for i in items for part in _parts(i)
        )
        return values | {
            "files": len(files),
            "bytes": sum(sizes),
            "names": _digest(name.encode(errors="surrogateescape") for name in names),
            "sizes": _digest(str(size).encode() for size in sizes),
            "contents": _digest(_read(path, limit) for path, limit in _sampled(files, sum(sizes))),
        }
    except OSError as error:
        raise DataError(f"task {task.name}: cannot read {error.filename}: {error.strerror or error}") from error


def _parts(item: Any) -> Sequence[Any]:
    return item if isinstance(item, tuple | list) else (item,)


def _sampled(files: Sequence[Path], total: int) -> Iterator[tuple[Path, int]]:
    """Evenly spread files, each with the number of bytes to read."""
    if total <= _WHOLE:
        yield from ((path, _WHOLE) for path in files)
        return
    count = min(_SAMPLES, len(files))
    yield from ((files[i * len(files) // count], _PART) for i in range(count))


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit)


def _bytes(part: Any) -> bytes:
    if isinstance(part, np.ndarray | torch.Tensor):
        return np.ascontiguousarray(part).tobytes()
    return (str(part) if isinstance(part, str | int | float) else type(part).__name__).encode()


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} ".encode() + part)
    return digest.hexdigest()[:32]
