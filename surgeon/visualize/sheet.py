"""A figure: a title, and panels in rows, each with its own title and color bar."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

SIDE, DPI = 2.6, 100  # inches per panel, dots per inch
MAGNITUDE, SIGNED = "magma", "RdBu_r"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One map (H, W), or an image (H, W, 3) in [0, 1] if `colors` is None.

    `limits` are those of the color bar, by default from the values. `marks` are points (x, y, text) in pixels.
    """

    title: str
    values: NDArray[Any]
    colors: Any = MAGNITUDE
    limits: tuple[float, float] | None = None
    bar: bool = True
    marks: Sequence[tuple[float, float, str]] = ()


def sheet(title: str, rows: Sequence[Sequence[Panel | None]], *, note: str = "") -> Figure:
    """Panels in rows of equal length; None leaves a cell empty."""
    height, width = len(rows), max(len(row) for row in rows)
    first = next(panel.values for panel in rows[0] if panel is not None)
    figure = figure_of(width * (SIDE + 0.5), height * (side_of(first) + 0.3) + (0.55 if note else 0.35), title, note)
    axes = figure.subplots(height, width, squeeze=False)
    for axes_row, row in zip(axes, rows, strict=True):
        for i, place in enumerate(axes_row):
            panel = row[i] if i < len(row) else None
            if panel is None:
                place.set_axis_off()
            else:
                draw(figure, place, panel)
    return figure


def side_of(values: NDArray[Any]) -> float:
    """Height in inches of a map that is `SIDE` wide."""
    return float(SIDE * min(max(values.shape[0] / values.shape[1], 0.4), 2.0))


def figure_of(width: float, height: float, title: str, note: str = "") -> Figure:
    """An empty figure (inches) with a title and a line below."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    if note:
        figure.supxlabel(note, fontsize=8.5, color="#444444")
    return figure


def draw(figure: Figure, place: Any, panel: Panel) -> None:
    """Draw one panel into its axes."""
    place.set_title(panel.title, fontsize=9)
    place.set_xticks([])
    place.set_yticks([])
    for spine in place.spines.values():
        spine.set_visible(False)
    if panel.colors is None:
        place.imshow(panel.values.clip(0, 1), interpolation="nearest")
    else:
        low, high = panel.limits or limits(panel.values)
        shown = place.imshow(panel.values, cmap=panel.colors, vmin=low, vmax=high, interpolation="nearest")
        if panel.bar:
            bar = figure.colorbar(shown, cax=place.inset_axes((1.03, 0, 0.045, 1)))
            bar.ax.tick_params(labelsize=7, length=2)
            bar.outline.set_visible(False)
            bar.ax.locator_params(nbins=5)
    for x, y, text in panel.marks:
        box = {"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "black", "lw": 0.6}
        place.text(x, y, text, fontsize=7, ha="center", va="center", bbox=box)


def limits(values: NDArray[Any]) -> tuple[float, float]:
    """From minimum to maximum, or from zero if they hardly differ: a constant map must look constant."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if high - low > 1e-3 * max(abs(low), abs(high)):
        return low, high
    return (0.0, high) if high > 0 else (low, 1.0 if low == 0 else 0.0)


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure as (H, W, 3)."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]
