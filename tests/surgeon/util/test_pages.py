"""Figures of pages: what stands on their axes, and what of strangers' words reaches the page."""

import re

import pytest

from surgeon.util import pages
from surgeon.util.tables import duration


def words(figure: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", figure)


def test_whole_numbers_have_no_halves_between_them() -> None:
    marks = [pages.Mark(x=float(layer), y=20.0 + layer, told=f"layer {layer}") for layer in range(3)]
    shown = words(pages.chart(marks, across="layer", up="gain"))
    assert [word for word in shown if word in ("0", "1", "2", "0.5", "1.5")] == ["0", "1", "2"]
    halves = [pages.Mark(x=0.5 * i, y=20.0 + i, told="") for i in range(3)]
    assert "0.2" in words(pages.chart(halves, across="x", up="y")), "halves are no whole numbers"


def test_names_stand_below_their_places_with_room_beside_the_outer_ones() -> None:
    marks = [pages.Mark(x=0, y=1.0, told="a"), pages.Mark(x=-0.15, y=2.0, told="b")]
    figure = pages.chart(marks, across="budget", up="used", names=["flops"])
    (place,) = re.findall(r'<text x="([\d.]+)"[^>]*>flops</text>', figure)
    assert 150 < float(place) < 350, "in the middle of the axis"
    assert len(re.findall("<circle", figure)) == 2


def test_numbers_at_an_axis_differ() -> None:
    marks = [pages.Mark(x=x, y=28.3190 + 1e-5 * x, told="") for x in range(4)]
    shown = [word for word in words(pages.chart(marks, across="trial", up="psnr")) if word.startswith("28.")]
    assert len(shown) == len(set(shown)) >= 3


def test_an_option_does_not_break_at_its_hyphens() -> None:
    assert pages.paragraph("give <more>: --max-time 7m") == (
        '<p>give &lt;more&gt;: <span class="option">--max-time</span> 7m</p>'
    )


def test_what_is_no_number_is_left_out_and_words_are_escaped() -> None:
    marks = [pages.Mark(x=0, y=float("nan"), told="x"), pages.Mark(x=1, y=1.0, told='<script>"')]
    figure = pages.chart(marks, across="<b>", up="y", groups=["<i>"])
    assert figure.count("<circle") == 1
    assert "<script>" not in figure
    assert "<b>" not in figure
    assert "<i>" not in figure.replace('<i style="background:var(--c0)"></i>', "")
    pages.chart([], across="nothing", up="nothing")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.0123, "12.3 ms"),
        (0.9994, "999 ms"),
        (1.28, "1.28 s"),
        (640.4, "640 s"),
        (4000.0, "4,000 s"),
        (float("nan"), "-"),
    ],
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_a_log_axis_has_round_numbers() -> None:
    marks = [pages.Mark(x=x, y=1.0, told="") for x in (0.0003, 0.001, 0.003)]
    assert [word for word in words(pages.chart(marks, across="rate", up="y", log=True)) if word.startswith("0.00")] == [
        "0.0005",
        "0.001",
        "0.002",
    ]
    wide = [pages.Mark(x=10.0**n, y=1.0, told="") for n in range(-6, 1)]
    assert {"1e-06", "0.001", "1"} <= set(words(pages.chart(wide, across="rate", up="y", log=True)))


@pytest.mark.parametrize("text", ["1.27M", "100 ms", "9.7e-05", "+154.3%", "x1.08", "-", "± 0.3", "4.9G", "0"])
def test_numbers_with_units_are_numbers(text: str) -> None:
    assert 'class="n"' in pages.rows(["what"], [[text]])
    assert 'class="n"' not in pages.rows(["what"], [[text], ["layer4.0"]])
