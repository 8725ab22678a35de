"""Images with class masks: paired, read, checked."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from surgeon.errors import DataError
from surgeon.util.picture_files import holds_pictures, opened
from surgeon.zoo.tasks.data.files import image_size, list_images, named, open_image

MASKS = ("masks", "labels", "annotations")
Pair = tuple[Path, Path]
_LOSSY = ("JPEG", "MPO")

logger = logging.getLogger(__name__)


def mask_pairs(task: str, folder: Path) -> list[Pair]:
    """(image, mask) from `images/` and the first of `mask_folders`; raises `DataError` for unpaired ones."""
    images, masks = _images(folder), mask_folders(folder)
    if not images.is_dir() or not masks:
        raise DataError(f"task {task}: {folder} must contain images/ and {' or '.join(f'{name}/' for name in MASKS)}")
    pictures, found = _keyed(task, images), _keyed(task, masks[0])
    alone = [f"{pictures[key]} has no mask" for key in sorted(pictures.keys() - found.keys())]
    alone += [f"{found[key]} has no image" for key in sorted(found.keys() - pictures.keys())]
    if alone:
        raise DataError(named(f"task {task}: images and masks that do not match", alone))
    return [(pictures[key], found[key]) for key in sorted(pictures)]


def mask_folders(folder: Path) -> list[Path]:
    """`masks/`, `labels/`, `annotations/` in a folder, or `masks/NAME` next to `images/NAME`: those with pictures, if any."""
    inside, name = (folder.parents[1], folder.name) if _images(folder) == folder else (folder, "")
    found = [path for path in (inside / one / name for one in MASKS) if path.is_dir()]
    return [path for path in found if holds_pictures(path)] or found


def _images(folder: Path) -> Path:
    """`images/` in a folder, or the folder itself if it is `images/NAME`."""
    inside = folder / "images"
    return folder if folder.parent.name == "images" and not inside.is_dir() else inside


def _keyed(task: str, folder: Path) -> dict[str, Path]:
    """The images of a folder, keyed by what they share with their partner."""
    keyed: dict[str, Path] = {}
    for path in list_images(folder):
        key = str(path.relative_to(folder).with_suffix(""))
        if key in keyed:
            raise DataError(f"task {task}: {keyed[key]} and {path} would both belong to one pair")
        keyed[key] = path
    return keyed


def read_mask(path: Path) -> Tensor:
    """(H, W) of int64, the stored values (for palette images, their indices)."""
    with opened(path) as header:
        if header.format in _LOSSY:
            raise DataError(
                f"{path} is a {header.format}: it alters labels at their borders; masks must be lossless (PNG)"
            )
    image = open_image(path)
    if image.mode not in ("L", "P", "1"):
        raise DataError(f"{path} has mode {image.mode}; a mask has one channel, the class number of each pixel")
    return torch.from_numpy(np.asarray(image).astype(np.int64))


def bad_pair(pair: Pair, classes: int | None, ignore: int, labels: dict[int, Path]) -> str | None:
    """The problem with a mask: unreadable, a different size than its image, or labels that are not classes.

    The labels of a valid mask are added to `labels`, with the mask if they are new.
    """
    try:
        size, mask = image_size(pair[0]), read_mask(pair[1])
    except DataError as error:
        return str(error)
    if size != tuple(mask.shape):
        (h, w), (mask_h, mask_w) = size, mask.shape
        return f"{pair[0]} is {w}x{h}, its mask {pair[1]} is {mask_w}x{mask_h}"
    held = set(mask.unique().tolist()) - {ignore}
    wrong = sorted(value for value in held if classes is not None and value >= classes)
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        return f"{pair[1]} has label {shown}, outside 0 to {classes - 1 if classes else 0} (ignore_index={ignore})"
    for value in held:
        labels.setdefault(value, pair[1])
    return None


def check_labels(task: str, labels: Mapping[str, Mapping[int, Path]], classes: int | None, ignore: int) -> int:
    """The number of classes, from the labels of every split, each with one of its masks, and the options.

    Raises `DataError` if the masks cannot be used for training or evaluation; warns about labels that do not occur.
    """
    void = [split for split, held in labels.items() if not held]
    if void:
        raise DataError(
            f"task {task}: the masks of {' and '.join(void)} contain only ignore_index={ignore}; at least two classes are needed"
        )
    held: dict[int, Path] = {}
    for one in labels.values():
        held = {**one, **held}
    if len(held) < 2:
        raise DataError(
            f"task {task}: the masks contain only {sorted(held)} besides ignore_index={ignore}; at least two classes are needed. "
            f"If {ignore} is a class, give another ignore_index, and masks with the numbers 0, 1, ..."
        )
    count = classes or max(held) + 1
    absent = sorted(set(range(count)) - set(held))
    if absent:
        last = max(held)
        told = f"no mask has label{'s' * (len(absent) > 1)} {_ranges(absent)}: {len(absent)} of {count} classes do not occur"
        if classes is None:
            told += (
                f"; the largest label, {last}, is in {held[last]} (ignore_index={last} leaves it out; with classes=N labels from N "
                "on are an error)"
            )
        logger.warning("task %s: %s", task, told)
    return count


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs as `3 to 7`; the first few."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs[:5]]
    return ", ".join(shown) + (", ..." if len(runs) > 5 else "")
