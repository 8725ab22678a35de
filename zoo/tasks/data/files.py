"""Folders of images: found, split into train and val, and checked before any training."""

import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch

from surgeon.errors import ConfigError, DataError, called
from surgeon.util.near import no_folder
from surgeon.util.picture_files import SUFFIXES, files_below, opened
from surgeon.zoo.tasks.base import Split, TaskConfig
from surgeon.zoo.tasks.data.options import check_types

if TYPE_CHECKING:
    from PIL import Image

MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"})  # 8 bits per channel or less
DECODED = 20_000  # files that a check decodes; in a larger set it only opens the rest
VAL_STREAM = 0x5EED
_DIV2K = {"train": "DIV2K_train_HR", "val": "DIV2K_valid_HR"}
_OTHERS = {  # names of splits
    "train": ("train", "training", "train_data"),
    "val": ("val", "valid", "validation", "val_data", "test", "testing", "test_data"),
}
_DEEPEST, _MOST = 3, 100  # levels and entries of a folder among which its splits are looked for
_REDUCED = re.compile(r"(^|_)LR(_|$)")
NAMED = 5  # maximum number of files named in a message

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FolderConfig(TaskConfig):
    """Options of tasks that read folders.

    `data` or `data/images` contains `train/` and `val/`, or `data` is one folder of which `val_fraction` becomes the validation
    set. `train` and `val` name other folders for a split; `val` alone is enough to evaluate. `val_seed` determines that
    fraction and the noise of validation images: it is not the seed of a run, so runs with different seeds are evaluated on the
    same samples.
    """

    above: ClassVar[Mapping[str, float]] = {"val_fraction": 0}
    below: ClassVar[Mapping[str, float]] = {"val_fraction": 1}

    train: Path | None = None
    val: Path | None = None
    val_fraction: float = 0.1
    val_seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        for name in ("data", "train", "val"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, Path(value))

    def check_square(self) -> None:
        """Raise `ConfigError` unless training samples are square; for tasks that rotate them or crop them to squares."""
        if self.input_size is not None and self.input_size[1] != self.input_size[2]:
            raise ConfigError(f"input_size must be square (C, N, N) for this task, got {self.input_size!r}")

    @property
    def val_stream(self) -> int:
        """Seed of the noise of validation images; far from the small numbers that people use for runs."""
        return self.val_seed + VAL_STREAM


@dataclass(frozen=True)
class Roots:
    """Folders of the splits of a task. The same folder for both means that it is divided by `val_fraction`; None: not given.

    `whole` is the folder in which the one for training is missing.
    """

    task: str
    train: Path | None
    val: Path | None
    whole: Path | None = None

    @property
    def divided(self) -> bool:
        return self.train is not None and self.train == self.val

    def of(self, split: Split) -> Path:
        """Raises `DataError` if that folder is not given: `val` alone is enough to evaluate."""
        folder = self.train if split == "train" else self.val
        if folder is None:
            why = f"only val={self.val} was given" if self.whole is None else f"{self.whole} has val/ but no train/"
            named = called("--task-option train=FOLDER", "train=FOLDER")
            raise DataError(f"task {self.task} has no training images: {why}; name a folder with {named}")
        return folder


def find_roots(task: str, config: FolderConfig) -> Roots:
    """The folders of both splits; raises `DataError` if there are none."""
    for option in ("data", "train", "val"):
        folder = getattr(config, option)
        if folder is not None and not folder.is_dir():
            raise DataError(f"task {task}: {option}: {no_folder(folder)}")
    train, val = config.train, config.val
    if config.data is not None:
        inside = _splits_of(config.data)
        if not inside:
            if train is not None and val is None:
                raise DataError(f"task {task}: {config.data} has no val/; give train alone, or train and val")
            train = train or config.data
        train, val = train or inside.get("train"), val or inside.get("val")
        option = called("--task-option ", "")
        if val is None and train == inside.get("train"):
            other = _split_like(config.data).get("val", "FOLDER")
            raise DataError(
                f"task {task}: {config.data} has train/ but no val/; name one with {option}val={other}, or divide the training set "
                f"with {option}train={train} instead of {called('--data', 'data')}"
            )
        if train == config.data and val is None and (found := _divided_below(config.data)):
            raise DataError(
                f"task {task}: {config.data} has no train/ and val/, but {found['train']} and {found['val']}, which would be "
                f"mixed and divided at random; name them with {option}train={found['train']} val={found['val']}"
            )
    if train is None and val is None:
        raise DataError(
            f"task {task} needs a folder: {called('--data DIR', 'data=DIR')} with train/ and val/, or the options train and val"
        )
    return Roots(task, train, val if val is not None else train, config.data)


def _splits_of(data: Path) -> dict[str, Path]:
    """The folders of the splits in a set, by split: `train` and `val`, also in `images/`, or DIV2K's."""
    for folder in (data, data / "images"):
        if inside := {name: folder / name for name in ("train", "val") if (folder / name).is_dir()}:
            return inside
    return {split: data / name for split, name in _DIV2K.items() if (data / name).is_dir()}


def _split_like(folder: Path) -> dict[str, Path]:
    """The first subfolders that are named like splits, by split."""
    return _by_name(_subfolders(folder))


def _by_name(folders: Iterable[Path]) -> dict[str, Path]:
    named = {folder.name.lower(): folder for folder in folders}
    return {
        split: next(named[name] for name in names if name in named)
        for split, names in _OTHERS.items()
        if not named.keys().isdisjoint(names)
    }


def _subfolders(folder: Path) -> list[Path]:
    """Its folders; none if it has many entries, as folders of images and of classes have."""
    with os.scandir(folder) as entries:
        first = list(itertools.islice(entries, _MOST + 1))
    return sorted(Path(entry) for entry in first if entry.is_dir()) if len(first) <= _MOST else []


def _divided_below(data: Path) -> dict[str, Path]:
    """Folders that are named like both splits, side by side somewhere in a folder; empty if there are none."""
    level = [data]
    for _ in range(_DEEPEST):
        inside = [_subfolders(folder) for folder in level]
        for folders in inside:
            if len(found := _by_name(folders)) == len(_OTHERS):
                return found
        level = [folder for folders in inside for folder in folders][:_MOST]
    return {}


def refuse_reduced(task: str, folder: Path) -> None:
    """Raise `DataError` if images are stored next to reduced copies of them, as in super-resolution's sets."""
    reduced = [child.name for child in sorted(folder.iterdir()) if child.is_dir() and _REDUCED.search(child.name)]
    if reduced:
        raise DataError(
            f"task {task}: {folder} also contains reduced images ({', '.join(reduced[:NAMED])}), not to be trained on: "
            "name the folders of the large ones with train= and val="
        )


def divide(count: int, split: Split, fraction: float, seed: int, groups: Sequence[int] | None = None) -> list[int]:
    """Indices of one part of a set; "val" gets `fraction` of it, at least one. Every group keeps its share (stratified)."""
    if count < 2:
        raise DataError(
            f"a set of {count} cannot be divided into train and val; name a folder for each with train= and val="
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    if groups is not None:
        order.sort(key=lambda index: groups[index])
    wanted = min(max(math.floor(count * fraction), 1), count - 1)
    val = {order[position] for position in range(count) if _steps(position, wanted, count)}
    return [index for index in range(count) if (index in val) == (split == "val")]


def _steps(position: int, wanted: int, count: int) -> bool:
    """Whether this position is one of `wanted` positions spread evenly over `count`."""
    return (position + 1) * wanted // count != position * wanted // count


def limited(indices: Sequence[int], limit: int | None) -> list[int]:
    """At most `limit` of them, evenly spread."""
    if limit is None or limit >= len(indices):
        return list(indices)
    return [value for position, value in enumerate(indices) if _steps(position, limit, len(indices))]


def chosen(
    samples: Sequence[T], split: Split, config: FolderConfig, divided: bool, groups: Sequence[int] | None = None
) -> list[tuple[int, T]]:
    """(index, sample) of those that a split uses: its part of a divided set (see `divide`), reduced to the limit."""
    indices: Sequence[int] = range(len(samples))
    if divided:
        indices = divide(len(samples), split, config.val_fraction, config.val_seed, groups)
    limit = config.train_limit if split == "train" else config.val_limit
    return [(index, samples[index]) for index in limited(indices, limit)]


def list_images(folder: Path) -> list[Path]:
    """All image files below a folder, by name (see `files_below`). Raises `DataError` if there is none."""
    found = files_below(folder)
    if not found:
        raise DataError(f"{folder} contains no images ({', '.join(sorted(SUFFIXES))})")
    return found


def open_image(path: Path) -> "Image.Image":
    """A decoded image in its stored mode. Raises `DataError` if it is not an image, is truncated, or has more than 8 bits."""
    with opened(path) as image:
        try:
            image.load()
        except Exception as error:  # PIL's decoders raise arbitrary errors on broken files
            raise DataError(f"cannot read the image {path}: {error}") from error
        if image.mode not in MODES:
            raise DataError(f"{path} has mode {image.mode!r}; images must have 8 bits per channel")
        return image.copy()


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header only."""
    with opened(path) as image:
        return image.height, image.width


def named(what: str, problems: Sequence[str]) -> str:
    """One message for many problems: their number, and the first of them."""
    rest = len(problems) - NAMED
    lines = [*problems[:NAMED], *([f"and {rest} more"] if rest > 0 else [])]
    return f"{what} ({len(problems)}):\n" + "\n".join(f"  {line}" for line in lines)


def look_through(what: str, items: Iterable[T], problem: Callable[[T], str | None]) -> None:
    """Call `problem` for every item and raise one `DataError` for all problems found; shows progress after two seconds."""
    from tqdm import tqdm

    found = []
    for item in tqdm(list(items), desc="checking data", unit="file", file=sys.stderr, delay=2, leave=False):
        text = problem(item)
        if text is not None:
            found.append(text)
    if found:
        raise DataError(named(what, found))


_DECODED: set[tuple[Path, int, int]] = set()  # files verified in this process, by time and size


def unreadable(path: Path, decode: bool = True) -> str | None:
    """The problem with an image file, or None. Without `decode`, only its header is read."""
    try:
        stat = path.stat()
        key = (path, stat.st_mtime_ns, stat.st_size)
        if key in _DECODED:
            return None
        if decode:
            open_image(path)
            _DECODED.add(key)
        else:
            image_size(path)
    except (OSError, DataError) as error:
        told = str(error.__cause__ or error)
        return told if told.startswith(str(path)) else f"{path}: {told}; repair or remove it"
    return None


def check_images(task: str, paths: Sequence[Path], also: Callable[[Path], str | None] = lambda path: None) -> None:
    """Raise a `DataError` that names the images which cannot be read or in which `also` finds a problem.

    Up to `DECODED` files are decoded; for the rest of a larger set, only the headers are read.
    """
    decoded = set(limited(range(len(paths)), DECODED))

    def problem(item: tuple[int, Path]) -> str | None:
        return unreadable(item[1], decode=item[0] in decoded) or also(item[1])

    look_through(f"task {task}: images that cannot be used", enumerate(paths), problem)
