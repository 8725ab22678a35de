"""Pages of reports in a browser; that of a search is looked at beside its command, in test_search.py, where there is one."""

import re
from collections.abc import Iterator
from html import escape, unescape
from pathlib import Path

import pytest

import surgeon
from surgeon.util import pages
from surgeon.zoo.trial.report import write_report
from tests.support.answers import make_answer
from tests.support.browser import Browser, chromium, needs_chromium
from tests.support.page_looks import LOOK, PHONE, check, tips
from tests.support.tiny_runs import tiny

pytestmark = needs_chromium


@pytest.fixture
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def test_the_page_of_a_trial(tmp_path: Path, browser: Browser) -> None:
    layers = [{"name": f"layer{i}.conv2", "type": "acda", "distance": 0.02 + 0.05 * i} for i in range(1, 9)]
    swept = {
        "original": {"0.0003": 0.48, "0.001": 0.5, "0.003": 0.49},
        "converted": {"0.0003": 0.47, "0.001": 0.5, "0.003": 0.51},
    }
    answer = make_answer([0.5, 0.51, 0.52], [0.504, 0.5145, 0.525], layers=layers, swept=swept, notes=["a note"])
    page = write_report(
        answer, tmp_path / "report", "surgeon evaluate runs/" + 4 * "a-long-name-" + " --task x", "surgeon try --resume"
    )
    check(browser, page)
    (both,) = {tip for told in tips(browser) for tip in told if tip.startswith("original, rate 0.001")}
    assert "converted, rate 0.001: top1 0.5" in both, "of two marks at one place, each tells of both"


def test_a_page_of_large_and_long_things(tmp_path: Path, browser: Browser) -> None:
    long = "backbone.features.transition3.denselayer24.conv2"
    down = [f"{long}.{row}" for row in range(24)]
    told = [f"trial {column}\n{', '.join(down)}" for column in range(30)]
    cells = [[(row * column) % 4 for column in range(30)] for row in range(24)]
    labels = ["kept", *(f"acda(atoms={n}, scales=3, generator=separable)" for n in range(3))]
    table = pages.rows(["layer", "gain", "placement"], [[long, f"{n}e-05", ", ".join(down)] for n in range(3)])
    figures = [
        pages.map_of(cells, down, [f"trial {column}" for column in range(30)], labels, told),
        *(
            pages.chart(
                [pages.Mark(x=1e-5 * 10**n, y=y * (n - 2), told=long) for n in range(6)],
                across="x",
                up=long[:40],
                log=log,
            )
            for y, log in ((1e-7, True), (12345.678, False))
        ),
    ]
    body = [f"<h1>{escape(long)}</h1>", *(pages.section(long, long, figure) for figure in figures), table]
    page = tmp_path / "page.html"
    page.write_text(pages.page(long, body))
    check(browser, page)
    assert unescape(re.findall('data-tip="([^"]*)"', figures[0])[0]).startswith(f"{down[0]}: kept\ntrial 0")


def test_the_test_sees_what_is_wrong(tmp_path: Path, browser: Browser) -> None:
    """Each kind of finding is found on a page that has it."""
    page = tmp_path / "bad.html"
    bad = (
        '<p style="color:#999;background:#fff">pale</p><p style="font-size:6px">tiny</p><svg viewBox="0 0 440 20" '
        'width="440" height="20"><text x="5" y="15">lower</text><text x="9" y="15">upper</text><text x="430" y="15">cut off'
        '</text></svg><p style="width:900px">wide</p><script>console.warn("hm");missing()</script>'
    )
    page.write_text(pages.page("bad", [bad]))
    browser.open(page, width=PHONE, phone=True)
    assert browser.value("document.documentElement.scrollWidth") > PHONE
    found = "\n".join(browser.value(LOOK))
    for kind in ("contrast 2.85: pale", "small: tiny", "one on the other: lower and upper", "outside: cut off"):
        assert kind in found
    said = "\n".join(browser.complaints())
    assert "hm" in said
    assert "missing is not defined" in said


@pytest.mark.parametrize(("ink", "paper"), [("#000", "#fff"), ("#d4d4d4", "#111")])
def test_a_table_in_a_notebook(tmp_path: Path, browser: Browser, ink: str, paper: str) -> None:
    """In the colors of Jupyter's two themes, in a narrow window."""
    model, report = surgeon.convert(tiny(), layers="layer4.0.conv2", type="acda", input_size=64)
    report.notes.append("a note")
    shown = [surgeon.inspect(model, input_size=64)._repr_html_(), report._repr_html_()]
    style = f"body{{color:{ink};background:{paper};font:14px sans-serif}}td,th{{color:{ink}}}"
    page = tmp_path / "cell.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><style>{style}</style>{''.join(shown)}")
    browser.open(page, width=600)
    assert browser.value("document.documentElement.scrollWidth") <= 600
    assert browser.value(LOOK) == []
    for name in ("b", "td", "summary"):
        colors = browser.value(
            f"[...new Set([...document.querySelectorAll('{name}')].map(e=>getComputedStyle(e).color))]"
        )
        assert len(colors) == 1, "the notebook's own"
    browser.value("document.querySelectorAll('details').forEach(e=>e.open=true)")
    assert browser.value(LOOK) == []
    assert browser.complaints() == []
    browser.picture(tmp_path / "cell.png")
