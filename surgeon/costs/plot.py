"""Plot of a cost: memory during the step by kind, and the layers with the largest shares."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from surgeon.costs.estimate import Cost
from surgeon.costs.memory import KINDS, Timeline
from surgeon.errors import ConfigError
from surgeon.util.files import writing
from surgeon.util.tables import shorten

COLUMNS, BARS = 1000, 14  # points of the memory curve, layers
COLORS = {
    "weights": "#4c72b0",
    "gradients": "#dd8452",
    "optimizer": "#8172b3",
    "inputs": "#937860",
    "saved activations": "#55a868",
    "transient": "#c44e52",
}


def draw(cost: Cost, path: str | Path, *, title: str = "") -> None:
    """Write a PNG. Raises `ConfigError` for another suffix, or a cost without a timeline (an estimated one)."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"a plot must be a .png file, got {path.name!r}")
    if cost.timeline is None or cost.estimated:
        raise ConfigError("an estimated cost has no timeline to draw")
    layers = _largest(cost)
    height = 5.0 + 0.26 * len(layers)
    figure = Figure(figsize=(10, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    step = "inference" if cost.mode == "infer" else f"training step ({cost.optimizer})"
    size = "x".join(map(str, cost.input_size))
    peak = f"peak {cost.peak_bytes / 2**20:,.0f} MiB of tensors, {cost.flops / 1e9:.3f} GFLOPs per image"
    figure.suptitle(f"{title}: {step}, {cost.amp or 'float32'}, batch {cost.batch_size} of {size}\n{peak}", fontsize=11)
    memory, shares = figure.subplots(2, 1, height_ratios=(3.8, height - 4.2))
    _draw_memory(memory, cost.timeline)
    _draw_shares(shares, layers)
    with writing(path, ConfigError) as fresh:
        figure.savefig(fresh, format="png")


def _draw_memory(axes: Any, times: Timeline) -> None:
    """Stacked memory by kind over the step, with its phases."""
    columns = _columns(times, COLUMNS) / 2**20
    n = len(times.levels)
    axes.stackplot(
        np.linspace(0, n, columns.shape[1]), columns, labels=KINDS, colors=[COLORS[kind] for kind in KINDS], linewidth=0
    )
    for phase, first in times.phases:
        axes.axvline(first, color="#888888", linewidth=0.8)
        if phase != "loss":
            axes.annotate(f" {phase}", (first, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    axes.set(xlim=(0, n), xticks=[], ylabel="MiB")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(KINDS), fontsize=8, frameon=False)


def _draw_shares(axes: Any, rows: list[tuple[str, float, float]]) -> None:
    """A pair of bars for each of the largest layers."""
    places = np.arange(len(rows))
    names, saved, flops = zip(*rows, strict=True) if rows else ((), (), ())
    for offset, values, color, label in (
        (-0.2, saved, COLORS["saved activations"], "saved activations"),
        (0.2, flops, COLORS["weights"], "forward FLOPs"),
    ):
        if not any(values):  # inference saves nothing
            continue
        bars = axes.barh(places + offset, values, 0.4, color=color, label=label)
        axes.bar_label(bars, labels=[f"{value:.1%}" for value in values], fontsize=6, padding=2)
    axes.set_yticks(places, [shorten(name, 40) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.set_title("largest layers: share of the model's total", fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _columns(times: Timeline, width: int) -> NDArray[np.float64]:
    """Parts (kinds, columns) of each column's highest level."""
    n = len(times.levels)
    edges = np.linspace(0, n, min(width, n) + 1).astype(np.int64)
    at = [a + int(times.levels[a:b].argmax()) for a, b in pairwise(edges)]
    return np.stack([times.parts[kind][at] for kind in KINDS]).astype(np.float64)


def _largest(cost: Cost) -> list[tuple[str, float, float]]:
    """Name, share of saved activations, share of forward FLOPs."""
    saved = max(sum(layer.saved_bytes for layer in cost.layers), 1)
    flops = max(cost.flops, 1)
    rows = [(layer.name or "(model)", layer.saved_bytes / saved, layer.flops / flops) for layer in cost.layers]
    return sorted(rows, key=lambda row: -max(row[1], row[2]))[:BARS]
