"""Plots of gains and searches, as matplotlib figures without a window."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from surgeon.errors import ConfigError
from surgeon.search.gains.gain import GainTable
from surgeon.search.results.summary import rank_correlation
from surgeon.search.study.folder import Finished
from surgeon.search.study.record import Record
from surgeon.util.files import write_bytes

KEPT, INK = "#f1f1f1", "#333333"
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c", "#ccb974", "#64b5cd")


def new_figure(width: float, height: float, title: str) -> tuple[Figure, Any]:
    """A figure in inches, with one pair of axes."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "surgeon"})
    return buffer.getvalue()


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure to a file. Raises `ConfigError`."""
    write_bytes(path, png(figure), ConfigError)


def gain_bars(gains: GainTable) -> Figure:
    """A group of bars per layer, one bar per option, with standard errors."""
    layers, options = len(gains.layers), len(gains.options) - 1
    figure, axes = new_figure(
        max(6.0, 0.16 * layers * options + 2), 4.0, f"gain by layer ({gains.estimator}), ± standard error"
    )
    place, wide = np.arange(layers), 0.8 / options
    for j in range(1, options + 1):
        known = (gains.gain[:, j] != 0) | (gains.error[:, j] != 0)
        axes.bar(
            (place + (j - (options + 1) / 2) * wide)[known],
            gains.gain[known, j],
            wide,
            yerr=gains.error[known, j],
            color=COLOURS[(j - 1) % len(COLOURS)],
            label=gains.options[j],
            error_kw={"elinewidth": 0.8, "ecolor": INK},
        )
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_xticks(place, gains.layers, rotation=90, fontsize=7)
    axes.set_ylabel(str(gains.facts.get("unit", "gain")), fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    return figure


# --- of a search --------------------------------------------------------------------------------------------------


def pareto(found: Finished) -> Figure:
    """Value against FLOPs, with the front."""
    figure, axes = new_figure(6, 4, "value against FLOPs; the line is the Pareto front")
    done = [one for one in found.ranked() if "traced" in one.attributes]
    base = found.about["original"]["flops"]
    points = [(one.attributes["traced"]["flops"] / base - 1, _value(found, one)) for one in done]
    sources = list(dict.fromkeys(str(one.source) for one in done))
    for number, source in enumerate(sources):
        own = [point for point, one in zip(points, done, strict=True) if one.source == source]
        axes.scatter(*_columns(own), s=24, color=COLOURS[number % len(COLOURS)], label=source, zorder=3)
    axes.plot(*_columns(front(points, higher=found.higher_is_better)), color=INK, linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.1%}")
    _label(axes, "FLOPs per image, relative to the original", found.about["task"]["primary"], legend=bool(done))
    return figure


def front(points: Sequence[tuple[float, float]], *, higher: bool) -> list[tuple[float, float]]:
    """The points not dominated by another one, sorted by cost."""
    sign = 1.0 if higher else -1.0
    kept: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not kept or sign * value > sign * kept[-1][1]:
            kept.append((cost, value))
    return kept


def placement_map(found: Finished) -> Figure:
    """Layers × trials, best trial first; the color is the option."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    ranked, space = found.ranked(), found.space
    values = np.array([space.placement(one.placement) for one in ranked]).reshape(len(ranked), len(space.layers)).T
    figure, axes = new_figure(
        max(5.0, 0.16 * len(ranked) + 3.5), max(2.5, 0.16 * len(space.layers) + 1.2), "placements, best trial first"
    )
    colors = [KEPT, *(COLOURS[j % len(COLOURS)] for j in range(len(space.labels) - 1))]
    axes.imshow(values, cmap=ListedColormap(colors), vmin=-0.5, vmax=len(colors) - 0.5, aspect="auto")
    axes.set_yticks(range(len(space.layers)), space.layers, fontsize=6)
    axes.set_xticks(range(len(ranked)), [str(one.number) for one in ranked], fontsize=6, rotation=90)
    axes.set_xlabel("trial", fontsize=8)
    handles = [Patch(color=color, label=label) for color, label in zip(colors, space.labels, strict=True)]
    figure.legend(handles=handles, fontsize=6, frameon=False, loc="outside right upper")
    return figure


def expected_against_measured(found: Finished) -> Figure:
    """The gain expected by the table against the measured value."""
    rank = rank_correlation(found)
    told = "" if rank is None else f"\nrank correlation {rank}"
    figure, axes = new_figure(6, 4, f"expected gain ({found.about['gains']}) and measured value{told}")
    done = [one for one in found.ranked() if "gain" in one.attributes]
    points = [(float(one.attributes["gain"]), _value(found, one)) for one in done]
    axes.scatter(*_columns(points), s=24, color=COLOURS[0])
    _label(axes, "expected gain (sum of the table)", found.about["task"]["primary"])
    return figure


def budget_figure(found: Finished) -> Figure:
    """The share of each limit used by every trial, and by the original."""
    figure, axes = new_figure(6, 4, "cost of the trials as a fraction of the limit; red: over this budget, not trained")
    limits = {name: limit for name, limit in found.about["limits"].items() if limit}
    for row, (name, limit) in enumerate(limits.items()):
        axes.plot([found.about["original"][name] / limit] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1)
        used = [known / limit for one in found.records if (known := cost(one, name)) is not None]
        colors = [COLOURS[3] if share > 1 else COLOURS[0] for share in used]
        axes.scatter(used, np.full(len(used), row), s=18, color=colors, alpha=0.6)
    axes.axvline(1, color=COLOURS[3], linewidth=0.8)
    axes.set_yticks(range(len(limits)), list(limits), fontsize=8)
    axes.set_ylim(-0.6, max(len(limits), 1) - 0.4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _label(axes, "fraction of the limit; the line is the original", "")
    return figure


def cost(one: Record, name: str) -> int | None:
    """A trial's cost from a whole trace; for memory, the device's total need."""
    traced = one.attributes.get("traced") or {}
    return traced.get("needed" if name == "memory" else name)


def convergence(found: Finished, other: Finished | None = None) -> Figure:
    """Best so far by evaluation; for random placements, those of this search or of another one."""
    figure, axes = new_figure(6, 4, "best so far")
    best = best_so_far(found)
    label = searched(found, alone=other is None)
    axes.step(*_steps(best), where="post", color=COLOURS[0], label=label)
    if other is not None:
        curve = best_so_far(other)
        axes.step(*_steps(curve), where="post", color=COLOURS[1], label=searched(other))
    drawn = [_value(found, one) for one in found.ranked() if one.source == "random"]
    if drawn:
        top = max(drawn) if found.higher_is_better else min(drawn)
        axes.axhline(top, color=COLOURS[7], linewidth=0.8, linestyle="--", label=f"best of {len(drawn)} random")
    original = found.original()
    if original is not None:
        axes.axhline(
            _value(found, original), color=INK, linewidth=0.8, linestyle=":", label="unmodified, trained equally"
        )
    _label(axes, "evaluations", found.about["task"]["primary"], legend=True)
    return figure


def searched(found: Finished, *, alone: bool = False) -> str:
    """A search in a legend: its folder, or if it is `alone` there "this search", and its sampler."""
    return f"{'this search' if alone else found.folder.path.name} (--sampler {found.about['sampler']})"


def _steps(curve: Sequence[float]) -> tuple[list[float], list[float]]:
    """The points of a step plot, continued behind the last evaluation, so that a jump there is inside the picture."""
    places = [float(n) for n in range(1, len(curve) + 1)]
    return [*places, *(n + 0.5 for n in places[-1:])], [*curve, *curve[-1:]]


def best_so_far(found: Finished) -> list[float]:
    """The best value after each evaluation; pruned ones count but change nothing."""
    pick = max if found.higher_is_better else min
    curve: list[float] = []
    for one in found.records:
        if not one.counts:
            continue
        value = found.value(one)
        if value is not None:
            curve.append(value if not curve else pick(curve[-1], value))
        elif curve:
            curve.append(curve[-1])
    return curve


def finals_figure(found: Finished) -> Figure:
    """The arms of the final stage: mean, standard deviation, every seed."""
    figure, axes = new_figure(6, 4, "finals: mean ± standard deviation over seeds, and every seed")
    arms = [arm for arm in (found.finals or {"arms": []})["arms"] if arm["values"]]
    for place, arm in enumerate(arms):
        values = np.array(arm["values"])
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        axes.errorbar(place, values.mean(), yerr=spread, fmt="o", color=COLOURS[place % len(COLOURS)], capsize=4)
        axes.scatter(np.full(len(values), place + 0.15), values, s=10, color=INK, alpha=0.6)
    axes.set_xticks(range(len(arms)), [f"{arm['role']}\ntrial {arm['trial']}" for arm in arms], fontsize=7)
    _label(axes, "", found.about["task"]["primary"])
    return figure


def _value(found: Finished, one: Record) -> float:
    value = found.value(one)
    assert value is not None
    return value


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _label(axes: Any, x: str, y: str, *, legend: bool = False) -> None:
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    if legend:
        axes.legend(fontsize=7, frameon=False)
