"""Head annotations: points (x, y) from .npy, .json and .mat files, next to the images or in a separate folder."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgeon.errors import DataError
from surgeon.util.picture_files import files_below
from surgeon.zoo.tasks.data.files import list_images, named

SUFFIXES = (".npy", ".json", ".mat")
FOLDERS = ("ground_truth", "ground-truth", "annotations", "points", "labels")
_KEYS = ("annPoints", "location", "points", "loc", "image_info")  # UCF, ShanghaiTech, NWPU
_HDF5 = 2  # the major version that scipy reports for MATLAB 7.3 files


def point_files(folder: Path) -> list[tuple[Path, Path]]:
    """(image, file of its points) for a folder; raises `DataError` for images without points and vice versa.

    The points file is named after the image, optionally with `GT_` before or `_ann` after the name.
    """
    pictures = list_images(folder)
    inside = files_below(folder, SUFFIXES)
    left = {path: _plain(path) for path in inside}
    pairs, alone = [], []
    by_name: dict[str, list[Path]] = {}
    for path, name in left.items():
        by_name.setdefault(name, []).append(path)
    for picture in pictures:
        found = [p for p in by_name.get(picture.stem, []) if _belongs(picture, p)]
        if len(found) > 1:
            raise DataError(f"{picture} has {len(found)} files of points: {', '.join(str(p) for p in found)}")
        if found and found[0] not in left:
            raise DataError(f"{found[0]} has two pictures, one of them {picture}: cannot tell which one it annotates")
        if found:
            pairs.append((picture, found[0]))
            del left[found[0]]
        else:
            alone.append(f"{picture} has no points ({picture.stem}{', '.join(SUFFIXES)})")
    alone += [f"{path} has no picture" for path in left]
    if alone:
        raise DataError(named(f"{folder}: pictures and points that do not match", alone))
    return pairs


def _plain(path: Path) -> str:
    return path.stem.removeprefix("GT_").removesuffix("_ann")


def _belongs(picture: Path, points: Path) -> bool:
    """Whether they are in the same folder or in sibling folders."""
    return points.parent == picture.parent or (
        points.parent.parent in (picture.parent, picture.parent.parent) and points.parent.name in FOLDERS
    )


def read_points(path: Path, picture: tuple[int, int] | None = None) -> np.ndarray:
    """(n, 2) of float64; a third column is dropped. Raises `DataError` for anything else.

    That includes a map of the `picture`, which is (height, width): it has a number or a boolean for every pixel.
    """
    try:
        if path.suffix.lower() == ".npy":
            found: Any = np.load(path, allow_pickle=False)
        elif path.suffix.lower() == ".json":
            found = _from_json(json.loads(path.read_text()))
        else:
            found = _from_mat(path)
        found = np.asarray(found)
        if found.dtype == bool or (found.ndim == 2 and found.size and found.shape == picture):
            raise ValueError(f"it contains a map {found.shape} of {found.dtype}, not points (n, 2)")
        points: np.ndarray = found.astype(np.float64)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"cannot read points from {path}: {error}") from error
    if points.size == 0:
        return np.zeros((0, 2))
    if points.ndim != 2 or points.shape[1] not in ((2, 3) if path.suffix.lower() == ".npy" else (2,)):
        raise DataError(f"{path} contains an array of shape {points.shape}, not points (n, 2)")
    if not np.isfinite(points).all():
        raise DataError(f"{path} contains points that are not finite")
    return points[:, :2]


def _from_json(value: Any) -> Any:
    """A list of [x, y] or of {"x":, "y":}, bare or under one of the known keys."""
    if isinstance(value, Mapping):
        key = next((key for key in _KEYS if key in value), None)
        if key is None:
            raise ValueError(f"none of the keys {', '.join(_KEYS)} is in it; it has {', '.join(map(str, value))}")
        return _from_json(value[key])
    if isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
        return [(item["x"], item["y"]) for item in value]
    return value


def _from_mat(path: Path) -> Any:
    """The array under a known key, at any depth of MATLAB's structs; otherwise the only (n, 2) array of the file."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError, matfile_version

    try:
        if matfile_version(path)[0] == _HDF5:
            raise ValueError("it is a MATLAB 7.3 (HDF5) file, which scipy cannot read; save it with -v7")
        content = {key: value for key, value in loadmat(path).items() if not key.startswith("__")}
    except MatReadError as error:
        raise ValueError(error) from error
    for key in _KEYS:
        if key in content:
            content = {key: content[key]}
            break
    arrays = [array for value in content.values() for array in _numeric(value)]
    of_points = [array for array in arrays if array.ndim == 2 and (array.shape[1] == 2 or array.size == 0)]
    if len(of_points) != 1:
        raise ValueError(f"it contains {len(of_points)} arrays of points (n, 2), expected one")
    return of_points[0]


def _numeric(value: Any) -> Iterator[np.ndarray]:
    """All numeric arrays inside nested object and struct arrays; fields known not to be points are skipped."""
    if not isinstance(value, np.ndarray | np.void):
        return
    if value.dtype.names:
        names = [name for name in value.dtype.names if name in _KEYS] or list(value.dtype.names)
        for item in np.atleast_1d(np.asarray(value)).ravel():
            for name in names:
                yield from _numeric(item[name])
    elif value.dtype == object:
        for item in np.asarray(value).ravel():
            yield from _numeric(item)
    elif np.issubdtype(value.dtype, np.number):
        yield np.asarray(value)
