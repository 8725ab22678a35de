"""Images with a class: CIFAR in torchvision's layout, and folders with one subfolder per class."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.errors import DataError
from surgeon.util.picture_files import files_below, is_left_out
from surgeon.zoo.tasks.base import Split
from surgeon.zoo.tasks.data.files import FolderConfig, find_roots

_CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
DATASETS = (*_CIFAR, "folder")


@dataclass(frozen=True)
class Labeled:
    """Images (paths, or arrays (H, W, 3) of uint8), their classes, and the class names.

    `divided`: both splits are parts of this one set.
    """

    items: Sequence[Any]
    labels: list[int]
    classes: list[str]
    divided: bool = False


def find_dataset(task: str, config: FolderConfig, wanted: str) -> str:
    """The kind of the data, one of `DATASETS`."""
    if wanted != "auto":
        return wanted
    if config.data is not None:
        for name, folder in _CIFAR.items():
            if config.data.name == folder or (config.data / folder).is_dir():
                return name
    return "folder"


def read_split(task: str, config: FolderConfig, split: Split, wanted: str, download: bool) -> Labeled:
    """The set from which a split is taken; raises `DataError`."""
    kind = find_dataset(task, config, wanted)
    if kind in _CIFAR:
        return _cifar(task, config, kind, split, download)
    roots = find_roots(task, config)
    root = roots.of(split)
    return _folder(task, root, roots.divided)


def has_train(task: str, config: FolderConfig, wanted: str) -> bool:
    """Whether there are training images, too; raises `DataError`."""
    return find_dataset(task, config, wanted) in _CIFAR or find_roots(task, config).train is not None


def _cifar(task: str, config: FolderConfig, kind: str, split: Split, download: bool) -> Labeled:
    from torchvision import datasets

    if config.data is None:
        raise DataError(f"task {task} needs data=FOLDER, the folder that contains {_CIFAR[kind]}/")
    root = config.data.parent if config.data.name == _CIFAR[kind] else config.data
    cls = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    try:
        read = cls(root, train=split == "train", download=download)
    except (OSError, RuntimeError) as error:
        hint = "" if download else " Or download it with download=true."
        raise DataError(
            f"task {task}: {root / _CIFAR[kind]} is missing or differs from torchvision's download: {error}.{hint}"
        ) from error
    return Labeled(read.data, [int(label) for label in read.targets], list(read.classes))


def _folder(task: str, root: Path, divided: bool) -> Labeled:
    classes = sorted(child.name for child in root.iterdir() if child.is_dir() and not is_left_out(child.name))
    if not classes:
        raise DataError(f"task {task}: {root} has no folders; expected one per class, with its images")
    inside: dict[str, list[Path]] = {name: [] for name in classes}
    for path in files_below(root):
        if (name := path.relative_to(root).parts[0]) in inside:
            inside[name].append(path)
    items = [path for found in inside.values() for path in found]
    labels = [number for number, found in enumerate(inside.values()) for _ in found]
    empty = [name for name, found in inside.items() if not found]
    if empty:
        shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise DataError(f"task {task}: classes without an image in {root}: {shown}")
    return Labeled(items, labels, classes, divided)
