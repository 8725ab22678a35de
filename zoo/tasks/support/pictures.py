"""Contact sheets: rows of small images with a caption above each column or below each image."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 192  # pixels of the longer side of a cell
_GAP, _LINE = 4, 14
_INK, _PAPER = (32, 32, 32), (255, 255, 255)


def to_image(x: Tensor) -> Image.Image:
    """RGB image of (C, H, W) with values in [0, 1]; channel counts other than 1 and 3 show the mean over the channels."""
    x = x.detach().float().cpu().nan_to_num(0).clamp(0, 1)
    if x.shape[0] not in (1, 3):
        x = x.mean(0, keepdim=True)
    array = (x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array.repeat(3, 2) if array.shape[2] == 1 else array)


def heat(x: Tensor, top: float | None = None) -> Image.Image:
    """A map (H, W) from 0 (black) through red and yellow to `top` (white), by default its own maximum."""
    x = x.detach().float().cpu().nan_to_num(0)
    x = (x / max(top if top is not None else float(x.max()), 1e-12)).clamp(0, 1) * 3
    return to_image(torch.stack([x, x - 1, x - 2]))


def labels_image(labels: Tensor, ignore: int | None = None) -> Image.Image:
    """Classes (H, W) in colors that differ between consecutive numbers; the ignored one is white."""
    table = np.array([_color(index) for index in range(256)], dtype=np.uint8)
    array = labels.detach().cpu().clamp(0, 255).numpy().astype(np.uint8)
    colors = table[array]
    if ignore is not None:
        colors[labels.cpu().numpy() == ignore] = 255
    return Image.fromarray(colors)


def _color(index: int) -> tuple[int, int, int]:
    """Bits of the number distributed over the three colors, high bits first, as in the PASCAL VOC palette."""
    rgb = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            rgb[channel] |= (index >> channel & 1) << (7 - bit)
        index >>= 3
    return rgb[0], rgb[1], rgb[2]


def sheet(
    rows: Sequence[Sequence[Image.Image]],
    header: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    side: int = SIDE,
) -> Image.Image:
    """One image from rows of images, each resized to `side`; `header` above columns, `captions` below cells."""
    cells = [[_fitted(image, side) for image in row] for row in rows]
    columns = max(len(row) for row in cells)
    head = _LINE if header else 0
    foot = _LINE if captions else 0
    width = columns * (side + _GAP) + _GAP
    heights = [max(image.height for image in row) + foot + _GAP for row in cells]
    out = Image.new("RGB", (width, sum(heights) + head + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(out), ImageFont.load_default()
    for column, text in enumerate(header):
        draw.text((_GAP + column * (side + _GAP), 2), text, fill=_INK, font=font)
    y = head + _GAP
    for number, row in enumerate(cells):
        for column, image in enumerate(row):
            x = _GAP + column * (side + _GAP)
            out.paste(image, (x, y))
            if captions:
                draw.text((x, y + image.height), captions[number][column], fill=_INK, font=font)
        y += heights[number]
    return out


def _fitted(image: Image.Image, side: int) -> Image.Image:
    factor = side / max(image.size)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    if factor > 1:
        return image.resize(size, Image.Resampling.NEAREST)
    return image.resize(size, Image.Resampling.LANCZOS)
