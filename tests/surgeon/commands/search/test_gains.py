"""`surgeon gains` as people call it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from surgeon.cli import main
from surgeon.commands.search.gains import lines
from surgeon.costs.table import Option
from surgeon.search.gains.gain import GainTable
from surgeon.search.gains.names import DECREASE
from surgeon.search.results import report_figures
from surgeon.search.space import Space
from surgeon.search.study.folder import read_search
from tests.support.search.tasks import FACTORY, SPACE, document

pytestmark = pytest.mark.usefixtures("tiny_tasks")

Capture = pytest.CaptureFixture[str]


def test_gains_round_trip(capsys: Capture) -> None:
    arguments = [FACTORY, "--task", "tiny-regression", *SPACE, "--batch-size", "4", "--device", "cpu"]
    assert main(["gains", *arguments, "--method", "probe", "--steps", "2", "-o", "g.json"]) == 0
    out = capsys.readouterr().out
    assert "first" in out
    assert " ± " in out
    assert "written to  g.png" in out
    assert Path("g.png").read_bytes().startswith(b"\x89PNG")
    assert main(["gains", *arguments, "-o", "g.json"]) == 2
    assert "g.json exists already; --force replaces it" in capsys.readouterr().err
    table = GainTable.read("g.json")
    assert main(["gains", *arguments, "--method", "probe", "--steps", "2", "--json"]) == 0
    assert document(capsys)["gains"] == table.to_dict()["gains"]
    short = ["--steps", "2", "--batch-size", "4", "--device", "cpu", "--gains", "g.json", "--trials", "1", "--quiet"]
    assert main(["search", FACTORY, "--task", "tiny-regression", *SPACE, *short, "-o", "s"]) == 0
    assert read_search("s").about["gains"] == "g.json"
    assert (
        main(["place", FACTORY, "--input-size", "8", *SPACE, "--gains", "g.json", "--max-layers", "1", "--json"]) == 0
    )
    capsys.readouterr()
    assert main(["gains", *arguments, "--method", "probe", "--steps", "2"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "gain = decrease of the loss, higher is better" in told
    assert "note: estimated earlier for the same model, data and options; --fresh estimates anew" in told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--method", "prob"], "there is no gain method 'prob'; there are gradient, fisher, .*Did you mean 'probe'?"),
        (["--method", "probe", "--seeds", "1"], "--seeds must be at least 2, got 1: the standard error is over seeds"),
    ],
)
def test_methods_and_seeds_are_checked_first(
    more: list[str], told: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgeon.commands.search.gains.run", lambda *_: pytest.fail("the command began"))
    assert main(["gains", FACTORY, "--task", "tiny-regression", *more]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_table_says_what_is_impossible_and_what_gains_nothing() -> None:
    space = Space(
        layers=("a", "b"),
        stages=(None, None),
        options=(Option("acda", {}), Option("sekg", {})),
        allowed=np.array([[True, True, False], [True, True, True]]),
    )
    none = np.zeros((2, 3))
    table = GainTable(layers=("a", "b"), options=space.labels, gain=none, error=none, estimator="halving")
    told = " ".join("\n".join(lines(table, space)).split())
    assert "a 0 ± 0 - b 0 ± 0 0 ± 0" in told
    assert "-: the layer cannot become this" in told
    assert "note: no replacement changed the metric" in told


def test_a_table_has_short_names_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    layers = tuple(f"layer{n}.0.conv1" for n in range(1, 5))
    options = tuple(
        [Option("acda", {"atoms": m, "scales": s}) for m, s in ((6, 3), (4, 1), (6, 1))]
        + [Option("pafu", {"group_size": 4, "supports": [n]}) for n in (3, 5)]
    )
    space = Space(layers=layers, stages=(None,) * 4, options=options, allowed=np.ones((4, 6), dtype=np.bool_))
    gain = np.full((4, 6), 0.00251)
    gain[:, 0] = 0
    facts = {"unit": DECREASE, "loss": 0.002, "batches": 16}
    table = GainTable(layers=layers, options=space.labels, gain=gain, error=gain / 7, estimator="nqm", facts=facts)
    shown = "\n".join(lines(table, space))
    assert max(map(len, shown.splitlines())) <= 80
    headings = [line.split("  ") for line in shown.splitlines() if line.startswith("layer ")]
    names = [cell.strip() for line in headings for cell in line if cell.strip() not in ("", "layer")]
    assert names == ["acda m6 S3", "acda m4 S1", "acda m6 S1", *space.labels[4:]], "in full where short ones are alike"
    told = " ".join(shown.split())
    assert "m: atoms, S: scales, n: group_size" in told
    assert "the loss is 0.002" in told
    beyond = (
        "20 gains of 20 exceed the loss itself, 0.002: the prediction does not hold so far, take it as an order only"
    )
    assert f"note: {beyond}" in told
    assert f"{beyond.capitalize()}." in report_figures.gains(table)
    assert replace(table, facts=facts | {"unit": "norm of the gradient"}).doubt() is None
    assert replace(table, facts=facts | {"loss": 0.003}).doubt() is None
