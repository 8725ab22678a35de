"""Plain-text tables for 80 columns and pipes: ASCII only, no colors, nothing truncated without a mark."""

import math
import textwrap
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal

GAPS = ("  ", " ")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, width: int = 80, left: int = 1) -> str:
    """Columns, the first `left` of them left-aligned, the others right-aligned.

    If the lines are longer than `width`, the columns move together, then the first column gets narrower: text that does not
    fit in it goes on a separate line above the rest of its row. A last column that is left-aligned, such as of paths, runs over.
    """
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    room = width - sum(widths)
    gap = next((gap for gap in GAPS if len(gap) * (len(widths) - 1) <= room), GAPS[-1])
    excess = len(gap) * (len(widths) - 1) - room
    if excess > 0 and left >= len(widths):
        widths[-1] = max(widths[-1] - excess, len(header[-1]))
    elif excess > 0:
        widths[0] = max(widths[0] - excess, min(12, widths[0]))
    lines = []
    for row in (header, ["-" * n for n in widths], *rows):
        if len(row[0]) > widths[0]:
            lines.append(row[0])
            row = ["", *row[1:]]
        cells = [c.ljust(n) if i < left else c.rjust(n) for i, (c, n) in enumerate(zip(row, widths, strict=True))]
        lines.append(gap.join(cells).rstrip())
    return "\n".join(lines)


def shorten(text: str, width: int) -> str:
    """At most `width` characters of the text, with the middle left out: layer names differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 2) // 2
    return f"{text[:head]}..{text[len(text) - (width - 2 - head) :]}"


def apart(*values: float, digits: int = 5) -> tuple[str, ...]:
    """Numbers with this many digits, or as many as it takes to tell different ones apart."""
    texts = ([f"{value:.{n}g}" for value in values] for n in range(digits, 18))
    return tuple(
        next((told for told in texts if len(set(told)) == len(set(values))), [repr(value) for value in values])
    )


def paragraph(text: str, *, width: int = 80, indent: str = "", hang: str | None = None) -> str:
    """The text wrapped at `width`; `hang` indents all lines after the first (default: `indent`)."""
    return textwrap.fill(
        text,
        width=width,
        initial_indent=indent,
        subsequent_indent=indent if hang is None else hang,
        break_long_words=False,
        break_on_hyphens=False,
    )


def count(n: int | None, unit: str = "") -> str:
    """A number in three digits and a factor: 4.1M, 25.6k, 950; "-" for None."""
    if n is None:
        return "-"
    value = float(n)
    for factor in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or factor == "T":
            if not factor:
                return f"{n}{unit}"
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f}{factor}{unit}"
        value /= 1000
    raise AssertionError("unreachable")


def counted(n: int, noun: str) -> str:
    """A number with its noun: "1 sample", "2 samples"."""
    return f"{n} {noun}{'s' * (n != 1)}"


def duration(seconds: float) -> str:
    """Seconds in three digits: 12.3 ms, 1.28 s, 640 s; "-" for NaN."""
    if math.isnan(seconds):
        return "-"
    return (
        f"{1000 * seconds:.3g} ms"
        if seconds < 0.9995
        else f"{seconds:.3g} s"
        if seconds < 999.5
        else f"{seconds:,.0f} s"
    )


def rounded_up(value: float) -> str:
    """A number above 0 in two digits that is not less than it, for a limit that is proposed: 0.01437 -> 0.015."""
    exact = Decimal(value)
    return f"{float(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 1), ROUND_CEILING)):g}"


def error(value: float | None) -> str:
    """An error in two digits, 3.1e-07; "-" for None and NaN."""
    if value is None or math.isnan(value):
        return "-"
    return "0" if value == 0 else f"{value:.1e}"
