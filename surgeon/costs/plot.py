"""Plot of a cost: memory during the step by kind, and the layers with the largest shares."""

from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from surgeon.costs.estimate import Cost
from surgeon.costs.memory import KINDS, Timeline
from surgeon.errors import ConfigError
from surgeon.util.files import writing
from surgeon.util.tables import shorten

SCALE = 2  # drawn larger, then downscaled for smooth lines
WIDTH, CHART, BARS = 1000, 360, 14
LEFT, RIGHT, TOP = 80, 20, 70
COLOURS = {
    "weights": "#4c72b0",
    "gradients": "#dd8452",
    "optimizer": "#8172b3",
    "inputs": "#937860",
    "saved activations": "#55a868",
    "transient": "#c44e52",
}
INK, GRID = "#222222", "#dddddd"


def draw(cost: Cost, path: str | Path, *, title: str = "") -> None:
    """Write a PNG. Raises `ConfigError` for another suffix, a missing folder, or a cost without a timeline (an estimated one)."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"a plot must be a .png file, got {path.name!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {path.parent}")
    if cost.timeline is None or cost.estimated:
        raise ConfigError("an estimated cost has no timeline to draw")
    layers = _largest(cost)
    height = TOP + CHART + 70 + 24 * (len(layers) + 1) + 20
    canvas = _Canvas(WIDTH, height)
    step = "inference" if cost.mode == "infer" else f"training step ({cost.optimizer})"
    size = "x".join(map(str, cost.input_size))
    canvas.text(LEFT, 12, f"{title}: {step}, {cost.amp or 'float32'}, batch {cost.batch_size} of {size}", size=17)
    canvas.text(LEFT, 36, f"peak {cost.peak_bytes / 2**20:,.0f} MiB of tensors, {cost.flops / 1e9:.3f} GFLOP an image")
    _areas(canvas, cost.timeline)
    _bars(canvas, layers, TOP + CHART + 70)
    canvas.save(path)


class _Canvas:
    def __init__(self, width: int, height: int) -> None:
        self.size = (width, height)
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, *, size: int = 13, anchor: str = "la", fill: str = INK) -> None:
        font = ImageFont.load_default(size * SCALE)
        self.pen.text((x * SCALE, y * SCALE), text, fill=fill, font=font, anchor=anchor)

    def line(self, points: list[tuple[float, float]], fill: str = INK, width: int = 1) -> None:
        self.pen.line([(x * SCALE, y * SCALE) for x, y in points], fill=fill, width=width * SCALE)

    def area(self, points: list[tuple[float, float]], fill: str) -> None:
        self.pen.polygon([(x * SCALE, y * SCALE) for x, y in points], fill=fill)

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        self.pen.rectangle((x * SCALE, y * SCALE, (x + width) * SCALE, (y + height) * SCALE), fill=fill)

    def save(self, path: Path) -> None:
        with writing(path, ConfigError) as fresh:
            self.image.resize(self.size, Image.Resampling.LANCZOS).save(fresh, format="PNG")


def _areas(canvas: _Canvas, times: Timeline) -> None:
    right, bottom = WIDTH - RIGHT, TOP + CHART
    columns = _columns(times, right - LEFT)
    top = max(times.peak / 2**20, 1e-9)
    unit = _nice(top / 5)
    limit = unit * np.ceil(top / unit)

    def y(mib: float) -> float:
        return float(bottom - CHART * mib / limit)

    for i in range(round(limit / unit) + 1):
        canvas.line([(LEFT, y(i * unit)), (right, y(i * unit))], GRID)
        canvas.text(LEFT - 8, y(i * unit), f"{i * unit:,.4g}", anchor="rm")
    canvas.text(LEFT - 8, TOP - 14, "MiB", anchor="rm")
    xs = np.linspace(LEFT, right, columns.shape[1])
    floor = np.zeros(columns.shape[1])
    for kind, values in zip(KINDS, columns, strict=True):
        ceiling = floor + values / 2**20
        upper = [(float(a), y(b)) for a, b in zip(xs, ceiling, strict=True)]
        lower = [(float(a), y(b)) for a, b in zip(xs, floor, strict=True)]
        canvas.area([*upper, *reversed(lower)], COLOURS[kind])
        floor = ceiling
    n = len(times.levels)
    for phase, first in times.phases:
        x = LEFT + (right - LEFT) * first / n
        canvas.line([(x, TOP), (x, bottom)], "#888888")
        if phase != "loss":
            canvas.text(x + 4, TOP + 4, phase)
    x = float(LEFT)
    for kind in KINDS:
        canvas.box(x, bottom + 14, 12, 12, COLOURS[kind])
        canvas.text(x + 18, bottom + 12, kind)
        x += 48 + 8 * len(kind)


def _columns(times: Timeline, width: int) -> NDArray[np.float64]:
    """Parts (kinds, columns) of each column's highest level."""
    n = len(times.levels)
    edges = np.linspace(0, n, min(width, n) + 1).astype(np.int64)
    at = [a + int(times.levels[a:b].argmax()) for a, b in pairwise(edges)]
    return np.stack([times.parts[kind][at] for kind in KINDS]).astype(np.float64)


def _nice(step: float) -> float:
    power = 10.0 ** np.floor(np.log10(step))
    return float(power * min((f for f in (1, 2, 5, 10) if f * power >= step), default=10))


def _largest(cost: Cost) -> list[tuple[str, float, float]]:
    """Name, share of saved activations (for inference, of FLOPs), share of forward FLOPs."""
    saved = max(sum(layer.saved_bytes for layer in cost.layers), 1)
    flops = max(cost.flops, 1)
    rows = [(layer.name or "(model)", layer.saved_bytes / saved, layer.flops / flops) for layer in cost.layers]
    return sorted(rows, key=lambda row: -max(row[1], row[2]))[:BARS]


def _bars(canvas: _Canvas, rows: list[tuple[str, float, float]], top: int) -> None:
    name_width = 220
    room = WIDTH - RIGHT - LEFT - name_width - 60
    longest = max((max(a, b) for _, a, b in rows), default=1.0) or 1.0
    canvas.text(LEFT, top, "largest layers: share of saved activations (green) and of forward FLOPs (blue)")
    for i, (name, saved, flops) in enumerate(rows):
        y = top + 24 * (i + 1)
        canvas.text(LEFT + name_width - 10, y + 9, shorten(name, 28), anchor="rm")
        for row, (value, color) in enumerate(((saved, COLOURS["saved activations"]), (flops, COLOURS["weights"]))):
            canvas.box(LEFT + name_width, y + 9 * row, room * value / longest, 8, color)
            canvas.text(
                LEFT + name_width + room * value / longest + 5, y + 9 * row + 4, f"{value:.1%}", size=10, anchor="lm"
            )
