"""Pictures with a mask of classes: found in pairs, read, looked through."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from surgeon.errors import DataError
from surgeon.zoo.tasks.support.files import image_size, list_images, named, open_image

MASKS = ("masks", "labels", "annotations")
Pair = tuple[Path, Path]


def mask_pairs(task: str, folder: Path) -> list[Pair]:
    """(picture, mask) of `images/` and `masks/` (or `labels/`, `annotations/`); raises `DataError` for those without a partner."""
    images = folder / "images"
    masks = next((folder / name for name in MASKS if (folder / name).is_dir()), None)
    if not images.is_dir() or masks is None:
        raise DataError(f"task {task}: {folder} must hold images/ and {' or '.join(f'{name}/' for name in MASKS)}")
    pictures = {_key(path, images): path for path in list_images(images)}
    found = {_key(path, masks): path for path in list_images(masks)}
    alone = [f"{pictures[key]} has no mask" for key in sorted(pictures.keys() - found.keys())]
    alone += [f"{found[key]} has no image" for key in sorted(found.keys() - pictures.keys())]
    if alone:
        raise DataError(named(f"task {task}: images and masks that do not match", alone))
    return [(pictures[key], found[key]) for key in sorted(pictures)]


def _key(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))


def read_mask(path: Path) -> Tensor:
    """(H, W) of int64, the values as they are stored (palette images: their indices)."""
    image = open_image(path)
    if image.mode not in ("L", "P", "1"):
        raise DataError(f"{path} has mode {image.mode}; a mask has one channel, the number of the class of each pixel")
    return torch.from_numpy(np.asarray(image).astype(np.int64))


def labels_of(path: Path) -> list[int]:
    """The values that a mask holds."""
    values: list[int] = read_mask(path).unique().tolist()
    return values


def bad_pair(pair: Pair, classes: int | None, ignore: int) -> str | None:
    """What is wrong with a mask: unreadable, of another size than its picture, or with labels of no class."""
    try:
        size, mask = image_size(pair[0]), read_mask(pair[1])
    except DataError as error:
        return str(error)
    if size != tuple(mask.shape):
        (h, w), (mask_h, mask_w) = size, mask.shape
        return f"{pair[0]} is {w}x{h}, its mask {pair[1]} is {mask_w}x{mask_h}"
    wrong = [value for value in mask.unique().tolist() if value != ignore and classes is not None and value >= classes]
    if wrong:
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        return f"{pair[1]} has label {shown}, out of 0 to {classes - 1 if classes else 0} (ignore_index={ignore})"
    return None
