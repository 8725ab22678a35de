"""A search as one HTML page that needs nothing beside it, and its pictures as PNGs."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from surgeon.errors import ConfigError
from surgeon.files import filling
from surgeon.search import figures
from surgeon.search.folder import Finished
from surgeon.search.gain import GainTable
from surgeon.search.study import Record
from surgeon.search.summary import mean_and_spread, relative, status_values

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:13px}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%;height:auto}h2{font-size:1.1rem;margin-top:2rem}"""


def write_report(found: Finished, folder: Path, other: Finished | None = None) -> Path:
    """Write `report.html` and the PNGs; returns the page. Raises `ConfigError` where nothing was evaluated yet."""
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
    if found.folder.gains.is_file():
        pictures["gains"] = figures.gain_bars(GainTable.read(found.folder.gains))
    images = {name: figures.png(figure) for name, figure in pictures.items()}
    with filling(folder, ConfigError) as fresh:
        for name, picture in images.items():
            (fresh / f"{name}.png").write_bytes(picture)
        encoded = {name: base64.b64encode(picture).decode() for name, picture in images.items()}
        (fresh / "report.html").write_text(_page(found, encoded), encoding="utf-8")
    return folder / "report.html"


def _page(found: Finished, images: dict[str, str]) -> str:
    values = status_values(found)
    task, rank = values["task"], values["rank_correlation"]
    title = f"Search: {values['model']} on {task['name']}"
    arrow = "higher" if task["higher_is_better"] else "lower"
    facts = [
        ("budgets", values["budgets"]),
        ("trials", ", ".join(f"{count} {state}" for state, count in values["trials"].items())),
        ("steps a trial", str(found.about["steps"])),
        ("sampler, seed", f"{found.about['sampler']}, {found.about['seed']}"),
        ("gains", str(found.about["gains"])),
        ("rank correlation of the gains with the values", "-" if rank is None else f"{rank:.2f}"),
        ("decided by", f"{task['primary']} ({arrow} is better)"),
    ]
    parts = [f"<h1>{html.escape(title)}</h1>", _table([], facts), "<h2>Best trials</h2>", _best(found)]
    if found.finals is not None:
        parts += ["<h2>Finals</h2>", _finals(found)]
    for name, picture in images.items():
        parts.append(f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{picture}">')
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def _best(found: Finished, count: int = 10) -> str:
    best = found.ranked()[:count]
    original = found.original()
    shown = best if original is None or original in best else [*best, original]
    header = ["trial", "from", found.about["task"]["primary"], "FLOPs", "parameters", "placement"]
    return _table(header, [_cells(found, one) for one in shown])


def _cells(found: Finished, one: Record) -> list[str]:
    placement = ", ".join(f"{layer} → {label}" for layer, label in one.placement.items()) or "the unmodified model"
    costs = [relative(found, one, name) for name in ("flops", "params")]
    return [str(one.number), str(one.source), f"{found.value(one):.5g}", *costs, placement]


def _finals(found: Finished) -> str:
    assert found.finals is not None
    rows = []
    for arm in found.finals["arms"]:
        mean, spread = mean_and_spread(arm["values"])
        rows.append([arm["role"], str(arm["trial"]), str(len(arm["placement"])), mean, spread, arm["why_not"] or ""])
    return _table(["arm", "trial", "replaced", found.about["task"]["primary"], "sd", ""], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if header else ''}{body}</table>"


def _cell(text: str) -> str:
    number = bool(text) and text.lstrip("+-").replace(".", "", 1).rstrip("%").isdigit()
    return f'<td class="n">{html.escape(text)}</td>' if number else f"<td>{html.escape(text)}</td>"
