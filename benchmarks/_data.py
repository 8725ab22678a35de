"""Real images for the benchmarks, read from a folder outside the repository.

The folder is `$SURGEON_DATA`, else `../shared/data` next to the repository. Everything is decoded here to float tensors
(C, H, W) with values in [0, 1]; files are sorted by name.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


def data_folder() -> Path:
    """Where the evaluation material lies (or would lie)."""
    return Path(os.environ.get("SURGEON_DATA") or ROOT.parent / "shared" / "data")


def missing(names: tuple[str, ...], folder: Path) -> list[str]:
    """Those of the needed files and folders that are not there."""
    return [name for name in names if not (folder / name).exists()]


def to_tensor(picture: Image.Image) -> Tensor:
    """(C, H, W) in [0, 1]; gray images have one channel."""
    array = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def image(path: Path, mode: str = "RGB") -> Image.Image:
    """One image in a mode ("RGB" or "L")."""
    with Image.open(path) as opened:
        return opened.convert(mode)


def images(folder: Path, mode: str = "RGB") -> Iterator[Image.Image]:
    """All images of a folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".png", ".jpg"):
            yield image(path, mode)


@dataclass(frozen=True)
class Labeled:
    """Images (N, 3, H, W) as uint8 and their classes (N)."""

    x: Tensor
    y: Tensor

    def every(self, limit: int | None) -> "Labeled":
        """At most `limit` images, spread evenly over the set."""
        if limit is None or limit >= len(self.y):
            return self
        chosen = torch.linspace(0, len(self.y) - 1, limit).round().long()
        return Labeled(self.x[chosen], self.y[chosen])


def cifar_jpeg(path: Path) -> Labeled:
    """CIFAR images kept as JPEG bytes in an npz file."""
    with np.load(path) as file:
        blob, offsets, labels = file["blob"], file["offsets"], file["y"]
    frames = [np.asarray(Image.open(io.BytesIO(blob[a:b].tobytes())).convert("RGB")) for a, b in pairwise(offsets)]
    return _labeled(np.stack(frames), labels)


def cifar_exact(path: Path) -> Labeled:
    """CIFAR images kept as uint8 in an npz file."""
    with np.load(path) as file:
        return _labeled(file["x"], file["y"])


def _labeled(x_NHWC: Any, y: Any) -> Labeled:
    return Labeled(torch.from_numpy(x_NHWC.transpose(0, 3, 1, 2).copy()), torch.from_numpy(y.astype(np.int64)))


def imagenet_sample(folder: Path) -> Labeled:
    """The sample images (one for every other class), center crop 224x224; the name's first number is the class."""
    paths = sorted(folder.glob("*.jpg"))
    frames = [np.asarray(center_crop(image(path), 224)) for path in paths]
    return _labeled(np.stack(frames), np.array([int(path.name.split("_")[0]) for path in paths]))


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """size x size pixels; where the rest is odd, the smaller part of it is left and above."""
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def noisy(x: Tensor, sigma: float, seed: int) -> Tensor:
    """The image with Gaussian noise; `sigma` in gray levels of 255. Not clipped."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return x + noise * (sigma / 255)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]; the mean over pixels and channels is taken in float64."""
    return float(-10 * torch.log10((a.double() - b.double()).square().mean()))


def luma(x: Tensor) -> Tensor:
    """Y of BT.601 in studio range (16 to 235 of 255), from RGB (…, 3, H, W) in [0, 1]."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64).view(3, 1, 1) / 255
    return (x.double() * weights).sum(-3, keepdim=True) + 16 / 255


def low_resolution(picture: Image.Image, scale: int) -> tuple[Image.Image, Image.Image]:
    """(large, small): the picture cut to a multiple of `scale`, and its bicubic reduction by PIL."""
    width, height = picture.width // scale, picture.height // scale
    large = picture.crop((0, 0, width * scale, height * scale))
    return large, large.resize((width, height), Image.Resampling.BICUBIC)
