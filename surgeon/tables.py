"""Plain-text tables that read well at 80 columns and in a pipe: ASCII only, no colours, nothing cut without a mark."""

import textwrap
from collections.abc import Sequence

GAP = "  "


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, width: int = 80, left: int = 1, flexible: int = 0
) -> str:
    """Columns, the first `left` of them flush left, the others flush right.

    Where the lines would be longer than `width` the column `flexible` is shortened in its middle; all others stay whole.
    """
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
    if excess > 0:
        widths[flexible] = max(widths[flexible] - excess, min(12, widths[flexible]))
    lines = [_line(header, widths, left, flexible), GAP.join("-" * n for n in widths)]
    lines += [_line(row, widths, left, flexible) for row in rows]
    return "\n".join(lines)


def _line(row: Sequence[str], widths: Sequence[int], left: int, flexible: int) -> str:
    cells = []
    for i, (cell, n) in enumerate(zip(row, widths, strict=True)):
        text = shorten(cell, n) if i == flexible else cell
        cells.append(text.ljust(n) if i < left else text.rjust(n))
    return GAP.join(cells).rstrip()


def shorten(text: str, width: int) -> str:
    """At most `width` characters of the text, its middle left out: names of layers differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 2) // 2
    return f"{text[:head]}..{text[len(text) - (width - 2 - head) :]}"


def paragraph(text: str, *, width: int = 80, indent: str = "", hang: str | None = None) -> str:
    """The text wrapped at `width`; `hang` indents what follows the first line (default: as `indent`)."""
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


def error(value: float | None) -> str:
    """An error in two digits, 3.1e-07; "-" for None."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"
