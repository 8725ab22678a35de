"""Self-contained HTML pages: text, tables and figures to hover, click and read on a phone, light and dark.

A figure is SVG that works without scripts; the script only describes a mark (on hover, tap or focus) and pins it.
"""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from surgeon.util.tables import apart

WIDTH, HEIGHT = 440, 272  # of a figure, in its own coordinates
_RIGHT, _TOP, _BOTTOM = 12, 30, 46
_ABOVE = 14  # of a map, which has no label at its top
_OPTION = re.compile(r"--[a-z][a-z-]*")

_STYLE = """:root{color-scheme:light dark;--bg:#fff;--ink:#1c2024;--soft:#60646c;--line:#d9dce1;--card:#f6f7f9;
--c0:#2f6db5;--c1:#c2571a;--c2:#2f8f4e;--c3:#c23b3b;--c4:#7a5bb0;--c5:#8a6a4f;--c6:#b3508f;--c7:#6b7280}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--ink:#e6e8eb;--soft:#a0a6ae;--line:#363b42;--card:#1e2125;
--c0:#7fb2ee;--c1:#f0995f;--c2:#74cc91;--c3:#ef8080;--c4:#b79df0;--c5:#cdaa8c;--c6:#e79bcb;--c7:#aab1bb}}
*{box-sizing:border-box}body{overflow-wrap:anywhere;font:16px/1.55 system-ui,sans-serif;margin:0;
background:var(--bg);color:var(--ink)}
main{max-width:68rem;margin:0 auto;padding:1.2rem 1rem 3rem}h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0 1rem}
h2{font-size:1.15rem;margin:0 0 .3rem}.option{white-space:nowrap}
p{margin:.3rem 0 .8rem;max-width:46rem}.lead{font-size:1.15rem}.soft{color:var(--soft)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1.2rem;margin:1.4rem 0}
section{margin:1.6rem 0}.grid section{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:1rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}td,th{padding:.25rem .8rem .25rem 0;text-align:left;
overflow-wrap:normal;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
td:last-child:not(.n,:empty){min-width:11rem;overflow-wrap:anywhere}
figure{margin:0;max-width:38rem}svg{display:block;width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}
svg .axis{stroke:var(--line)}svg .zero{stroke:var(--soft);stroke-dasharray:4 3}
svg [data-tip]{cursor:pointer;outline:none}svg [data-tip]:hover,svg [data-tip]:focus,svg .on{stroke:var(--ink);stroke-width:2.5}
.tip{min-height:3.1em;font-size:.88rem;white-space:pre-wrap;
overflow-wrap:anywhere;border-top:1px solid var(--line);padding-top:.4rem;
color:var(--soft)}.key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.85rem}.key i{display:inline-block;width:.75em;
height:.75em;border-radius:2px;margin-right:.35em}code,pre{font-size:.88rem}pre{white-space:pre-wrap;background:var(--card);padding:.7rem;
border:1px solid var(--line);border-radius:6px}
@media(max-width:520px){svg text:not(.row){font-size:16px}main{padding:.8rem .8rem 2rem}
table.told,.told tbody{display:block}.told tr{display:grid;grid-template-columns:repeat(var(--n),1fr);
border-bottom:1px solid var(--line)}
.told td,.told th{border:0;padding-right:.4rem;font-size:.8rem;overflow-wrap:anywhere}.told th{font-size:.7rem}
.told td:last-child,.told th:last-child{grid-column:1/-1}}"""

_SCRIPT = """for(const f of document.querySelectorAll('figure')){
const t=f.querySelector('.tip'),m=[...f.querySelectorAll('[data-tip]')];
let pin=null;const show=e=>{t.textContent=e?e.dataset.tip:t.dataset.rest};for(const e of m){e.tabIndex=0;
e.addEventListener('mouseenter',()=>show(e));e.addEventListener('mouseleave',()=>show(pin));e.addEventListener('focus',()=>show(e));
e.addEventListener('blur',()=>show(pin));e.addEventListener('keydown',k=>{if(k.key==='Enter')set(e)})}
const set=e=>{if(pin)pin.classList.remove('on');pin=pin===e?null:e;if(pin)pin.classList.add('on');show(pin||e)};
const away=(e,c)=>{const r=e.getBoundingClientRect();return Math.hypot(c.clientX-r.x-r.width/2,c.clientY-r.y-r.height/2)};
f.querySelector('svg').addEventListener('click',c=>{let e=c.target.closest('[data-tip]');if(!e&&m.length){
e=m.reduce((a,b)=>away(a,c)<=away(b,c)?a:b);if(away(e,c)>24)return}if(e)set(e)})}"""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point at (x, y) in data units; `low` and `high` are the ends of its error bar, `told` is its tooltip."""

    x: float
    y: float
    told: str
    group: int = 0
    low: float | None = None
    high: float | None = None


_SNIPPET = """.surgeon-report{font:14px/1.45 system-ui,sans-serif;max-width:100%}
.surgeon-report .scroll{overflow:auto;max-height:26rem}
.surgeon-report table{border-collapse:collapse;font-size:13px;margin:.4rem 0}
.surgeon-report td,.surgeon-report th{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid rgba(128,128,128,.35);
background:none;white-space:nowrap}
.surgeon-report .n{text-align:right;font-variant-numeric:tabular-nums}
.surgeon-report pre{white-space:pre-wrap;margin:.3rem 0;font-size:12px;background:none;color:inherit}
.surgeon-report summary{cursor:pointer}"""


def snippet(title: str, table: str, totals: str, more: Sequence[tuple[str, str]] = ()) -> str:
    """A fragment for another page, such as a notebook: a heading, a table of `rows`, totals, and collapsed texts.

    It takes on the surrounding colors, light or dark, and has no script.
    """
    folded = "".join(
        f"<details><summary>{html.escape(heading)}</summary><pre>{html.escape(text)}</pre></details>"
        for heading, text in more
    )
    head = f"<style>{_SNIPPET}</style><b>{html.escape(title)}</b>"
    return f'<div class="surgeon-report">{head}{table}<pre>{html.escape(totals)}</pre>{folded}</div>'


def page(title: str, body: Sequence[str]) -> str:
    """A whole page; the parts of the body are HTML."""
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>'
    )
    return f"{head}<body><main>{''.join(body)}</main><script>{_SCRIPT}</script></body></html>\n"


def paragraph(text: str, kind: str = "") -> str:
    """Text as a paragraph, in which no option breaks at its hyphens; `kind` is lead or soft."""
    shown = _OPTION.sub(r'<span class="option">\g<0></span>', html.escape(text))
    return f'<p class="{kind}">{shown}</p>' if kind else f"<p>{shown}</p>"


def section(heading: str, how: str, content: str) -> str:
    """A heading, a sentence on how to read the content, and the content."""
    return f"<section><h2>{html.escape(heading)}</h2>{paragraph(how, 'soft') if how else ''}{content}</section>"


def grid(sections: Sequence[str]) -> str:
    """Sections side by side if there is room."""
    return f'<div class="grid">{"".join(sections)}</div>'


def rows(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; columns of numbers are right-aligned. On a phone, text in the last of several columns goes below the others."""
    numeric = [bool(lines) and all(_is_number(line[i]) for line in lines) for i in range(len(lines[0]) if lines else 0)]
    kinds = [' class="n"' if number else "" for number in numeric]
    head = "".join(f"<th{kind}>{html.escape(cell)}</th>" for cell, kind in zip(header, kinds, strict=False))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{html.escape(c)}</td>" for c, k in zip(line, kinds, strict=True)) + "</tr>"
        for line in lines
    )
    told = f' class="told" style="--n:{len(numeric) - 1}"' if header and numeric[2:] and not numeric[-1] else ""
    return f'<div class="scroll"><table{told}>{f"<tr>{head}</tr>" if header else ""}{body}</table></div>'


_NUMBER = re.compile(r"-|[+x±-]? ?\d[\d.,]*(e[+-]?\d+)? ?(%|[kMGT]?B?|ms|s)")


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


# --- figures ----------------------------------------------------------------------------------------------------------


def chart(
    marks: Sequence[Mark],
    *,
    across: str,
    up: str,
    groups: Sequence[str] = (),
    lines: Sequence[tuple[Sequence[tuple[float, float]], int]] = (),
    level: float | None = None,
    names: Sequence[str] | None = None,
    log: bool = False,
    percent: bool = False,
) -> str:
    """Marks with error bars, and lines of (points, group). Axes are labeled `across` and `up`.

    `level` is a dashed horizontal line; `names` label 0, 1, ... instead of numbers; `log` makes x logarithmic;
    `percent` formats x as percentages. Marks with non-finite values are left out.
    """
    marks = [mark for mark in marks if math.isfinite(mark.x) and math.isfinite(mark.y)]
    xs = [mark.x for mark in marks] + [x for points, _ in lines for x, _ in points] or [1.0]
    whole = all(x == int(x) for x in xs)  # counts have no halves
    xs += [-0.4, len(names) - 0.6] if names else []  # every name has its position, and marks may be next to it
    ys = [v for m in marks for v in (m.y, m.low, m.high) if v is not None] + [
        y for points, _ in lines for _, y in points
    ]
    ys = ys + ([] if level is None else [level]) or [0.0]
    scale_y = _Scale(ys, HEIGHT - _BOTTOM, _TOP)
    left = 12 + 9 * max(map(len, apart(*scale_y.ticks(), digits=4)))
    scale_x = _Scale(xs, left, WIDTH - _RIGHT, log=log)
    parts = [_axes(scale_x, scale_y, across, up, names, percent, whole)]
    if level is not None:
        parts.append(_line(left, scale_y(level), WIDTH - _RIGHT, scale_y(level), "zero"))
    for points, group in lines:
        path = " ".join(f"{scale_x(x):.1f},{scale_y(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="var(--c{group % 8})" stroke-width="1.5"/>')
    told: dict[tuple[float, float], list[str]] = {}
    for mark in marks:
        told.setdefault((mark.x, mark.y), []).append(mark.told)
    for mark in marks:
        x, y, color = scale_x(mark.x), scale_y(mark.y), f"var(--c{mark.group % 8})"
        if mark.low is not None and mark.high is not None:
            ends = (scale_y(mark.low), scale_y(mark.high))
            parts.append(f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{color}" stroke-width="2"/>')
        hidden = [other for other in told[mark.x, mark.y] if other != mark.told]
        tip = html.escape("\n".join([mark.told, *hidden]), quote=True)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{color}" data-tip="{tip}"/>')
    return _figure(parts, groups, HEIGHT, f"{up} against {across}")


def map_of(
    cells: Sequence[Sequence[int]],
    down: Sequence[str],
    across: Sequence[str],
    labels: Sequence[str],
    told: Sequence[str],
) -> str:
    """A grid of colors: `cells[row][column]` is the number of a label, 0 the empty one; `told` returns a column's tooltip."""
    left = min(max((len(name) for name in down), default=1), 22) * 7 + 8
    wide = (WIDTH - left - 4) / max(len(across), 1)
    tall = 17
    parts = []
    for row, name in enumerate(down):
        y = _ABOVE + row * tall
        shown = name if len(name) <= 22 else f"…{name[-21:]}"
        parts.append(f'<text class="row" x="{left - 5:.1f}" y="{y + 12}" text-anchor="end">{html.escape(shown)}</text>')
        for column, tip in enumerate(told):
            label = cells[row][column]
            color = "var(--line)" if label == 0 else f"var(--c{(label - 1) % 8})"
            opacity = ' fill-opacity=".45"' if label == 0 else ""
            text = html.escape(f"{name}: {labels[label]}\n{tip}", quote=True)
            place = f'x="{left + column * wide:.1f}" y="{y}" width="{max(wide - 1, 1):.1f}" height="{tall - 1}"'
            parts.append(f'<rect {place} fill="{color}"{opacity} data-tip="{text}"/>')
    height = _ABOVE + len(down) * tall + 24
    if across:
        ends = (across[0], across[-1]) if len(across) > 1 else (across[0], "")
        parts.append(f'<text x="{left:.1f}" y="{height - 8}">{html.escape(ends[0])}</text>')
        parts.append(f'<text x="{WIDTH - 4}" y="{height - 8}" text-anchor="end">{html.escape(ends[1])}</text>')
    return _figure(parts, labels[1:], height, "what each layer became in each trial")


def _figure(parts: Sequence[str], groups: Sequence[str], height: float, label: str) -> str:
    rest = "Point at a mark, or tap it, to see what it is; a click keeps it."
    keys = "".join(
        f'<span><i style="background:var(--c{number % 8})"></i>{html.escape(name)}</span>'
        for number, name in enumerate(groups)
    )
    key = f'<div class="key">{keys}</div>' if groups else ""
    named = html.escape(label, quote=True)
    drawn = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{named}">{"".join(parts)}</svg>'
    return f'<figure>{drawn}{key}<div class="tip" data-rest="{rest}">{rest}</div></figure>'


class _Scale:
    """Maps values to positions between two ends, with a small margin."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool = False) -> None:
        self.log = log and min(values) > 0
        placed = [self._placed(value) for value in values]
        low, high = min(placed), max(placed)
        room = 0.08 * (high - low) or max(abs(high) * 0.05, 0.5 if not self.log else 0.1)
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def _placed(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def __call__(self, value: float) -> float:
        return self.start + (self._placed(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, *, whole: bool = False) -> list[float]:
        """About four round values, integers for integer data; 1, 2 and 5 of each decade of a log scale."""
        if self.log:
            decades = range(math.floor(self.low), math.floor(self.high) + 1)
            parts = (1,) if self.high - self.low > 2 else (1, 2, 5)
            places = [decade + math.log10(part) for decade in decades for part in parts]
            return [10**place for place in places if self.low <= place <= self.high]
        raw = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda value: abs(value - raw))
        step = max(step, 1.0) if whole else step
        return [index * step for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def _axes(x: _Scale, y: _Scale, across: str, up: str, names: Sequence[str] | None, percent: bool, whole: bool) -> str:
    bottom, left = HEIGHT - _BOTTOM, x.start
    parts = [_line(left, bottom, WIDTH - _RIGHT, bottom, "axis"), _line(left, _TOP, left, bottom, "axis")]
    for value, name in zip(y.ticks(), apart(*y.ticks(), digits=4), strict=True):
        parts.append(_line(left, y(value), WIDTH - _RIGHT, y(value), "axis"))
        parts.append(f'<text x="{left - 6:.0f}" y="{y(value) + 4:.1f}" text-anchor="end">{name}</text>')
    told = [(float(i), name) for i, name in enumerate(names)] if names is not None else []
    ticks = x.ticks(whole=whole)
    shown = [f"{value:+.3g}%" for value in ticks] if percent else apart(*ticks, digits=3)
    told = told or list(zip(ticks, shown, strict=True))
    for place, name in told:
        parts.append(f'<text x="{x(place):.1f}" y="{bottom + 16}" text-anchor="middle">{html.escape(name)}</text>')
    parts.append(
        f'<text x="{(left + WIDTH) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(across)}</text>'
    )
    parts.append(f'<text x="4" y="16">{html.escape(up)}</text>')  # upright: a long one would not fit beside the axis
    return "".join(parts)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'
