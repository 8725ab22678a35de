"""Images as tensors: reading, patches, and batches of images that differ in size.

Tensors are (C, H, W) or (N, C, H, W) with values in [0, 1].
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from surgeon.errors import InputError
from surgeon.zoo.tasks.base import Batch, Sample
from surgeon.zoo.tasks.data.draws import integer
from surgeon.zoo.tasks.data.files import open_image

CACHE_BYTES = 256 * 2**20  # decoded images kept by one reader (one process)
Box = tuple[int, int, int, int]  # top, left, height, width

_STUDIO = (65.481 / 255, 128.553 / 255, 24.966 / 255)  # BT.601, as MATLAB's rgb2ycbcr


class Reader:
    """Decoded images by path, in one mode ("L" or "RGB"); keeps the first `CACHE_BYTES` of them, which suits random access."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._kept: dict[Path, Image.Image] = {}
        self._room = CACHE_BYTES

    def __call__(self, path: Path) -> Image.Image:
        if path in self._kept:
            return self._kept[path]
        image = as_mode(open_image(path), self.mode)
        size = image.width * image.height * len(image.getbands())
        if size <= self._room:
            self._kept[path] = image
            self._room -= size
        return image

    def __getstate__(self) -> dict[str, Any]:
        """Without the images: other processes read their own."""
        return {"mode": self.mode, "_kept": {}, "_room": CACHE_BYTES}


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image in a mode ("L" or "RGB")."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns without this step
    return image.convert(mode)


def to_tensor(image: Image.Image) -> Tensor:
    """(C, H, W) in [0, 1]; gray images have one channel."""
    array = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def random_box(height: int, width: int, size: int, generator: torch.Generator, step: int = 1) -> Box:
    """A square of side `size` at a random position in an image; its corner is a multiple of `step`."""
    top = step * integer(0, (height - size) // step, generator)
    left = step * integer(0, (width - size) // step, generator)
    return top, left, size, size


def cut(image: Image.Image, box: Box) -> Image.Image:
    """The part of an image in a box."""
    top, left, height, width = box
    return image.crop((left, top, left + width, top + height))


def luma(x: Tensor) -> Tensor:
    """Y of BT.601 in studio range (16 to 235 of 255), (…, 1, H, W), from RGB (…, 3, H, W) in [0, 1]."""
    weights = torch.tensor(_STUDIO, dtype=x.dtype, device=x.device).view(3, 1, 1)
    return (x * weights).sum(-3, keepdim=True) + 16 / 255


def center(x: Tensor, height: int, width: int) -> Tensor:
    """Center crop of the last two dimensions: the region that a network without padding can output."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


# --- batches of images of different sizes -------------------------------------------------------------------------------


def collate_padded(samples: Sequence[Sample], fill: dict[str, float] | None = None) -> Batch:
    """Stack samples; images of different sizes are padded on the right and bottom.

    In that case `key + "_size"` (N, 2) holds their sizes, for every key with images. `fill` sets padding values other than 0.
    """
    batch: Batch = {}
    for key in samples[0]:
        tensors = [sample[key] for sample in samples]
        if all(t.shape == tensors[0].shape for t in tensors):
            batch[key] = torch.stack(tensors)
            continue
        sizes = torch.tensor([t.shape[-2:] for t in tensors])
        height, width = sizes.amax(0).tolist()
        value = (fill or {}).get(key, 0)
        batch[key] = torch.stack(
            [F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=value) for t in tensors]
        )
        batch[f"{key}_size"] = sizes
    return batch


def unpadded(x: Tensor, sizes: Tensor | None) -> list[Tensor]:
    """The images of a batch, each (1, C, H, W), or (1, H, W) for labels, without the padding of `collate_padded`."""
    if sizes is None:
        return list(x.split(1))
    return [one[..., :h, :w] for one, (h, w) in zip(x.split(1), sizes.tolist(), strict=True)]


def by_size(run: Callable[[Tensor], Tensor], x: Tensor, sizes: Tensor | None) -> Tensor:
    """`run` on images of different sizes as if each were alone: images of one size together, without their padding.

    The outputs are padded with zeros to the largest.
    """
    if sizes is None:
        return run(x)
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (h, w) in enumerate(sizes.tolist()):
        groups.setdefault((h, w), []).append(index)
    outputs: dict[int, Tensor] = {}
    for (h, w), members in groups.items():
        outputs.update(zip(members, run(x[members][..., :h, :w]), strict=True))
    height = max(out.shape[-2] for out in outputs.values())
    width = max(out.shape[-1] for out in outputs.values())
    ordered = [outputs[index] for index in range(len(x))]
    return torch.stack([F.pad(o, (0, width - o.shape[-1], 0, height - o.shape[-2])) for o in ordered])


def continued(run: Callable[[Tensor], Tensor], x: Tensor, multiple: int) -> Tensor:
    """`run` on x with its right and bottom edges replicated to a multiple of `multiple`."""
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    return run(F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x)


def in_tiles(run: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, scale: int) -> Tensor:
    """`run` on tiles of x, of which `overlap` pixels at inner edges are seen but discarded; the output is `scale` times as large.

    Every tile starts at a multiple of tile - 2 * overlap. Raises `InputError` if an output is not `scale` times its input.
    """
    height, width = x.shape[-2:]
    if max(height, width) <= tile:
        return run(x)
    whole: Tensor | None = None
    for top, first, last in _spans(height, tile, overlap):
        for left, start, end in _spans(width, tile, overlap):
            piece = x[..., top : top + tile, left : left + tile]
            out = run(piece)
            if out.shape[-2] != piece.shape[-2] * scale or out.shape[-1] != piece.shape[-1] * scale:
                raise InputError(
                    f"tile is for networks whose output is {scale} times as large as their input; this one returns "
                    f"{tuple(out.shape)} for {tuple(piece.shape)}"
                )
            if whole is None:
                whole = out.new_empty((*out.shape[:-2], height * scale, width * scale))
            rows, columns = (
                slice((first - top) * scale, (last - top) * scale),
                slice((start - left) * scale, (end - left) * scale),
            )
            whole[..., first * scale : last * scale, start * scale : end * scale] = out[..., rows, columns]
    assert whole is not None
    return whole


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int, int]]:
    """(start of a tile, first pixel to keep, first pixel to drop) along one direction."""
    starts = [0]
    while starts[-1] + tile < length:
        starts.append(starts[-1] + tile - 2 * overlap)
    return [
        (start, start + overlap if start else 0, length if start == starts[-1] else start + tile - overlap)
        for start in starts
    ]


def on_multiple(run: Callable[[Tensor], Tensor], x: Tensor, multiple: int, scale: int = 1) -> Tensor:
    """Like `continued`, and crops the padded part from the output, which is `scale` times as large."""
    return continued(run, x, multiple)[..., : x.shape[-2] * scale, : x.shape[-1] * scale]
