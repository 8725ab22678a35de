"""A search as one self-contained HTML page, and its plots as PNG files for papers."""

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from surgeon.errors import ConfigError
from surgeon.search.gains.gain import GainTable
from surgeon.search.results import figures, report_figures
from surgeon.search.results.comparison import comparison
from surgeon.search.results.summary import UNDONE, mean_and_spread, notes, rank_correlation, relative, status_values
from surgeon.search.study.folder import Finished
from surgeon.search.study.record import Record
from surgeon.util import pages
from surgeon.util.files import filling
from surgeon.util.tables import apart, counted

Other = Finished | None


def write_report(found: Finished, folder: Path, other: Other = None) -> Path:
    """Write `report.html` and the PNGs; returns the page. Raises `ConfigError` if nothing was evaluated yet."""
    if not found.ranked():
        raise ConfigError(f"no trial of {found.folder.path} is complete yet: there is nothing to report")
    pictures = {
        "pareto": figures.pareto(found),
        "placements": figures.placement_map(found),
        "expected": figures.expected_against_measured(found),
        "budgets": figures.budget_figure(found),
        "convergence": figures.convergence(found, other),
    }
    if found.finals is not None:
        pictures["finals"] = figures.finals_figure(found)
    gains = GainTable.read(found.folder.gains) if found.folder.gains.is_file() else None
    if gains is not None:
        pictures["gains"] = figures.gain_bars(gains)
    images = {name: figures.png(figure) for name, figure in pictures.items()}
    with filling(folder, ConfigError) as fresh:
        for name, picture in images.items():
            (fresh / f"{name}.png").write_bytes(picture)
        (fresh / "report.html").write_text(_page(found, gains, other), encoding="utf-8")
    return folder / "report.html"


def _page(found: Finished, gains: GainTable | None, other: Other) -> str:
    values = status_values(found)
    title = f"Search: {values['model']} on {values['task']['name']}"
    first, *further = sentences(found)
    body = [f"<h1>{escape(title)}</h1>", pages.paragraph(first, "lead"), *map(pages.paragraph, further)]
    drawn = [
        report_figures.front(found),
        *([report_figures.finals(found)] if found.finals is not None else []),
        report_figures.convergence(found, other),
        report_figures.expected(found),
        report_figures.budgets(found),
        *([report_figures.gains(gains)] if gains is not None else []),
    ]
    body += [pages.grid(drawn), report_figures.placements(found)]
    if found.finals is not None:
        random = " and a random placement" * any(arm["role"] == "random" for arm in found.finals["arms"])
        seeds = counted(found.finals["seeds"], "seed")
        how = f"The best of the search again, with {seeds} each, against the unmodified model{random}."
        body.append(pages.section("Finals", how, _finals(found)))
    body.append(pages.section("Best trials", "Costs are relative to the unmodified model's.", _best(found)))
    body.append(pages.section("What was asked", "", pages.rows([], _facts(found, values))))
    return pages.page(title, body)


def _facts(found: Finished, values: Mapping[str, Any]) -> list[list[str]]:
    task, rank, start = values["task"], rank_correlation(found), values["start"]
    arrow = "higher" if task["higher_is_better"] else "lower"
    return [
        ["budgets", str(values["budgets"])],
        ["trials", ", ".join(f"{count} {state}" for state, count in values["trials"].items())],
        ["steps per trial", str(found.about["steps"])],
        [f"{task['primary']} before any step", "not recorded" if start is None else f"{start:.5g}"],
        ["sampler, seed", f"{found.about['sampler']}, {found.about['seed']}"],
        ["gains", str(found.about["gains"])],
        ["rank correlation of the gains with the values", "-" if rank is None else str(rank)],
        ["decided by", f"{task['primary']} ({arrow} is better)"],
    ]


# --- in words -----------------------------------------------------------------------------------------------------------


def sentences(found: Finished) -> list[str]:
    """The findings: whether it is better than no conversion, by how much with which error, and what it costs."""
    told = _of_finals(found) or _of_trials(found)
    return told + [f"{note[0].upper()}{note[1:]}." for note in notes(found)]


def _of_finals(found: Finished) -> list[str]:
    end = comparison(found)
    if end is None:
        return []
    word = {"won": "better", "lost": "worse", "undecided": "not settled to be better or worse"}[end.verdict]
    both = apart(*(statistics.fmean(arm["values"]) for arm in (end.best, end.original)))
    lines = [
        f"The best placement ({_layers(end.best['placement'])}) is {word} than the unmodified model trained equally: "
        f"gain {end.gain}, {found.about['task']['primary']} {' against '.join(both)}{_cost(found, end.best['trial'])}."
    ]
    if end.verdict == "undecided":
        lines.append("Settled means beyond two standard errors of the paired differences of at least three seeds.")
    return lines


def _of_trials(found: Finished) -> list[str]:
    primary, original = found.about["task"]["primary"], found.original()
    best = next((one for one in found.ranked() if one.placement), None)
    if best is None:
        return ["No placement with replacements was trained to its end yet."]
    value = found.value(best) or 0.0
    running = " so far" if found.alive else ""
    line = f"The best placement{running} ({_layers(best.placement)}) reached {primary} {value:.5g}"
    if original is not None:
        line += f"; the unmodified model, trained equally, {found.value(original) or 0.0:.5g}"
    hint = " --finals trains the best with seeds." if found.finals is None else ""
    return [
        f"{line}{_cost(found, best.number)}.",
        f"These are single short trainings, the best of many: chance makes some look good.{hint}",
    ]


def _layers(placement: Mapping[str, str]) -> str:
    return f"{len(placement)} layer{'s' if len(placement) != 1 else ''} replaced"


def _cost(found: Finished, trial: int) -> str:
    one = next((one for one in found.records if one.number == trial), None)
    if one is None:
        return ""
    return f"; it costs {relative(found, one, 'flops')} FLOPs and {relative(found, one, 'params')} parameters"


# --- tables ---------------------------------------------------------------------------------------------------------


def _best(found: Finished, count: int = 10) -> str:
    best = found.ranked()[:count]
    original = found.original()
    shown = best if original is None or original in best else [*best, original]
    header = ["trial", "from", found.about["task"]["primary"], "FLOPs", "parameters", "placement"]
    cells, start = [_cells(found, one) for one in shown], found.start()
    if start is not None:
        cells.append(["-", "untrained", f"{start:.5g}", "+0.0%", "+0.0%", report_figures.placed({})])
    return pages.rows(header, cells)


def _cells(found: Finished, one: Record) -> Sequence[str]:
    costs = [relative(found, one, name) for name in ("flops", "params")]
    return [str(one.number), str(one.source), f"{found.value(one):.5g}", *costs, report_figures.placed(one.placement)]


def _finals(found: Finished) -> str:
    assert found.finals is not None
    rows = []
    for arm in found.finals["arms"]:
        mean, spread = mean_and_spread(arm["values"])
        why_not = "" if arm["values"] else arm["why_not"] or UNDONE
        rows.append([arm["role"], str(arm["trial"]), str(len(arm["placement"])), mean, spread, why_not])
    several = any(len(arm["values"]) > 1 for arm in found.finals["arms"])
    header = [
        "arm",
        "trial",
        "replaced",
        found.about["task"]["primary"],
        "sd" if several else "sd (one seed has none)",
        "",
    ]
    return pages.rows(header, rows)
