"""Tiny data and models for every task, for the tests that run over all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn


def picture(path: Path, seed: int = 0, side: int = 20, mode: str = "RGB") -> Path:
    """Noise as a picture; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def photo(path: Path, width: int, height: int, seed: int = 0, mode: str = "RGB") -> Path:
    """A picture with structure and noise, saved under this name."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 80 * np.sin(x / (3 + c + seed % 3) + seed) * np.cos(y / (4 + c)) for c in range(3)]
    array = np.clip(np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).convert(mode).save(path)
    return path


def save_mask(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def image_folders(root: Path) -> dict[str, Any]:
    """train/ with 4 pictures and val/ with 3, of different sizes."""
    for index in range(4):
        photo(root / f"train/{index}.png", 40 + 4 * index, 48, index)
    for index, (width, height) in enumerate([(37, 42), (44, 36), (37, 42)]):
        photo(root / f"val/{index}.png", width, height, 10 + index)
    return {"data": root}


def noisy_pairs(root: Path) -> dict[str, Any]:
    for split, count in (("train", 4), ("val", 3)):
        for index in range(count):
            photo(root / split / f"clean/{index}.png", 40 + index, 44, index)
            photo(root / split / f"noisy/{index}.png", 40 + index, 44, index + 50)
    return {"data": root}


def class_folders(root: Path) -> dict[str, Any]:
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("ant", "bee", "cow")):
            for index in range(count):
                photo(root / split / name / f"{index}.png", 36 + index, 40, 10 * number + index)
    return {"data": root, "input_size": (3, 32, 32)}


def crowds(root: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for index in range(count):
            width, height = 72 + index, 70
            photo(root / split / f"{index}.jpg", width, height, index)
            np.save(root / split / f"{index}.npy", rng.uniform((0, 0), (width - 1, height - 1), (5 + index, 2)))
    return {"data": root, "patch": 64}


def masks(root: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for index in range(count):
            photo(root / split / f"images/{index}.png", 40 + index, 36, index)
            mask = rng.integers(0, 3, (36, 40 + index))
            mask[:4] = 255
            save_mask(root / split / f"masks/{index}.png", mask)
    return {"data": root, "input_size": (3, 32, 32)}


def no_data(root: Path) -> dict[str, Any]:
    return {}


def _conv(c_in: int, c_out: int, **options: Any) -> nn.Module:
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


def _classifier() -> nn.Module:
    return nn.Sequential(_conv(3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@dataclass(frozen=True)
class Case:
    """One task with options, its data, and a model that fits."""

    task: str
    data: Callable[[Path], dict[str, Any]]
    model: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    random_training: bool = True  # draws of the same sample differ

    @property
    def id(self) -> str:
        return "-".join([self.task, *(str(value) for value in self.options.values())])


CASES = [
    Case("classification", class_folders, _classifier),
    Case(
        "classification",
        class_folders,
        _classifier,
        {"input_size": (3, 80, 80), "auto_augment": "rand-m5", "erase": 0.5},
    ),
    Case("denoising", image_folders, lambda: _conv(3, 3), {"patch": 16}),
    Case("denoising", image_folders, lambda: _conv(1, 1), {"patch": 16, "sigma": "0-55", "predicts": "noise"}),
    Case("real-denoising", noisy_pairs, lambda: _conv(3, 3), {"patch": 16}),
    Case(
        "super-resolution",
        image_folders,
        lambda: nn.Sequential(_conv(3, 12), nn.PixelShuffle(2)),
        {"patch": 16, "scale": 2, "loss": "charbonnier"},
    ),
    Case("super-resolution", image_folders, lambda: _conv(1, 1), {"patch": 18, "scale": 3, "input": "bicubic"}),
    Case("demosaicking", image_folders, lambda: nn.Conv2d(3, 3, 3), {"patch": 16}),
    Case(
        "demosaicking",
        image_folders,
        lambda: nn.Sequential(_conv(4, 12), nn.PixelShuffle(2)),
        {"patch": 16, "input": "packed4", "shot": "1e-4-1e-2", "read": 0.01, "loss": "mse"},
    ),
    Case("crowd-counting", crowds, lambda: _conv(3, 1, stride=4)),
    Case("segmentation", masks, lambda: _conv(3, 3, stride=2)),
    Case("sad", no_data, lambda: _conv(3, 3), {"images": 6, "val_images": 4}, random_training=False),
    Case("pattern-detection", no_data, lambda: _conv(1, 1), {"images": 4, "repeats": 2}, random_training=False),
]


def scramble_global_state(seed: int) -> None:
    """Put every global generator elsewhere."""
    import random

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
