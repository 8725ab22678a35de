"""Training and evaluation folders of a paper's table: at small scale part of the evaluation material, otherwise the paper's.

A set contains a task's options for training and, by name, those for each evaluation. Paths are below the given folder.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Options = dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """`train` and `judge` are options of the task; of these, folders are given as texts and completed by `located`."""

    train: Options
    judge: Mapping[str, Options] = field(default_factory=dict)
    note: str = ""  # what it stands for

    def located(self, root: Path) -> "DataSet":
        """With whole paths."""
        return DataSet(
            _located(self.train, root), {name: _located(o, root) for name, o in self.judge.items()}, self.note
        )

    def missing(self) -> list[str]:
        """Those of its folders that are not there."""
        every = (self.train, *self.judge.values())
        paths = {str(o[key]) for o in every for key in ("data", "train", "val") if isinstance(o.get(key), Path)}
        return sorted(path for path in paths if not Path(path).is_dir())


def _located(options: Options, root: Path) -> Options:
    return {key: root / value if key in ("data", "train", "val") else value for key, value in options.items()}


def _folders(train: str, *judge: str, **named: str) -> DataSet:
    sets = {Path(folder).name: folder for folder in judge} | named
    first = next(iter(sets.values()))
    return DataSet({"train": train, "val": first}, {name: {"val": folder} for name, folder in sets.items()})


CIFAR_FOLDERS = "cifar10-folders"  # made by `unpack_cifar`
_POLYU: Options = {"data": "denoise/PolyU_real", "noisy": "*_real", "clean": "*_mean", "val_fraction": 0.2}
_UCF: Options = {"data": "crowd/UCF_CC_50", "val_fraction": 0.25}
_CAMVID: Options = {"data": "seg_camvid", "ignore_index": 11}
_BSD = "denoise/BSDS500train_color"

SMALL: dict[str, DataSet] = {
    "cifar10": DataSet({"data": CIFAR_FOLDERS}, {"test": {"data": CIFAR_FOLDERS}}, "CIFAR-10 kept as JPEG"),
    "crowd-a": DataSet(_UCF, {"UCF_CC_50": _UCF}, "UCF_CC_50 in place of ShanghaiTech A"),
    "realsr-x3": DataSet(
        {"train": "sr/T91", "val": "sr/Set5"},
        {name: {"val": f"sr/{name}"} for name in ("Set5", "Set14")},
        "T91 for training, bicubic reduction in place of RealSR's cameras",
    ),
    "sidd": DataSet(_POLYU, {"PolyU": _POLYU}, "PolyU in place of SIDD"),
    "demosaic": _folders(_BSD, "denoise/Kodak24", "denoise/McMaster"),
    "sr": _folders("sr/T91", "sr/Set5", "sr/Set14"),
    "segmentation": DataSet(_CAMVID, {"CamVid": _CAMVID}, "CamVid in place of ADE20K"),
    "denoise": _folders(_BSD, "denoise/Kodak24", "denoise/McMaster", BSD68="denoise/CBSD68"),
}


def _pairs(folder: str, scale: int) -> DataSet:
    options: Options = {"data": folder, "noisy": f"*_LR{scale}", "clean": "*_HR"}
    return DataSet(options, {"RealSR": options})


FULL: dict[str, DataSet] = {
    "cifar10": DataSet({"data": "cifar10"}, {"test": {"data": "cifar10"}}),
    "cifar100": DataSet({"data": "cifar100"}, {"test": {"data": "cifar100"}}),
    "imagenet": DataSet({"data": "imagenet"}, {"val": {"data": "imagenet"}}),
    "crowd-a": DataSet({"data": "shanghaitech-a"}, {"SHTech-A": {"data": "shanghaitech-a"}}),
    "crowd-qnrf": DataSet({"data": "ucf-qnrf"}, {"UCF-QNRF": {"data": "ucf-qnrf"}}),
    **{f"realsr-x{scale}": _pairs("realsr", scale) for scale in (2, 3, 4)},
    "sidd": DataSet({"data": "sidd"}, {"SIDD": {"data": "sidd"}}),
    "demosaic": DataSet({"data": "msr"}, {"MSR": {"data": "msr"}}),
    "sr": _folders("div2k/train", "Set5", "Set14", "B100", "Urban100"),
    "segmentation": DataSet({"data": "ade20k"}, {"ADE20K": {"data": "ade20k"}}),
    "denoise": _folders("div2k/train", "Kodak24", "McMaster", "BSD68"),
}


def unpack_cifar(root: Path, work: Path, per_class: tuple[int, int] = (500, 100)) -> Path:
    """CIFAR's JPEG bytes as one folder a class below `work`, so many of each in training and validation; once."""
    folder = work / CIFAR_FOLDERS
    if folder.is_dir():
        return folder
    fresh = folder.with_name(f".{folder.name}.partial")
    for split, name, count in zip(("train", "val"), ("train_jpeg_20k", "test_jpeg_5k"), per_class, strict=True):
        with np.load(root / "cifar10" / f"{name}.npz") as file:
            blob, offsets, labels, classes = file["blob"], file["offsets"], file["y"], file["classes"]
        for label, title in enumerate(classes):
            place = fresh / split / str(title)
            place.mkdir(parents=True, exist_ok=True)
            for index in np.flatnonzero(labels == label)[:count]:
                content = io.BytesIO(blob[offsets[index] : offsets[index + 1]].tobytes())
                (place / f"{index}.jpg").write_bytes(content.getvalue())
    fresh.rename(folder)
    return folder
