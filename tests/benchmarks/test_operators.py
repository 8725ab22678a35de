"""The benchmark of the operators: what it measures, what it holds them to, and the table of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import operators, report
from benchmarks._operator_cases import OPERATORS, SHAPES, TARGETS


def test_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for shape in SHAPES:
        monkeypatch.setitem(SHAPES, shape, (1, 4, 8))
    monkeypatch.setattr(operators, "PROBE", 16)
    monkeypatch.setattr(operators, "COPIED", 1 << 10)
    assert operators.main(["--quick", "--json", str(tmp_path / "operators.json")]) == 0
    rows = json.loads((tmp_path / "operators.json").read_text())["targets"]
    measured = [target for target in TARGETS if target.measure != "peak"]  # which --quick leaves out
    assert len(rows) == sum(len(target.must | target.aim) for target in measured)
    saved = [row for row in rows if ": saved" in row["what"]]
    assert saved
    assert all(row["ratio"] == 0 and row["met"] for row in saved)
    printed = capsys.readouterr().out
    assert all(row["what"] in printed for row in rows)
    first = next(OPERATORS["dconv"]())
    monkeypatch.setattr(operators, "OPERATORS", {"dconv": lambda: [first]})
    assert operators.main(["--quick", "--dtype", "bfloat16", "--json", str(tmp_path / "half.json")]) == 0
    half = json.loads((tmp_path / "half.json").read_text())
    assert half["dtype"] == "bfloat16"
    assert operators.main(["--quick", "--match", "eval n=5"]) == 2
    assert "no case with 'eval n=5' in its name; there are dconv/apply/A" in capsys.readouterr().err
    told = {row["what"] for row in half["targets"]}
    assert told == {f"dconv apply A: {measure}, torch / ours" for measure in ("forward", "both")}


@pytest.mark.parametrize(("clock", "ratio"), [("cpu_ms", 4.0), ("wall_ms", 3.0)])
def test_operators_are_compared_by_one_clock(clock: str, ratio: float) -> None:
    def step(cpu: float, wall: float) -> dict[str, Any]:
        return {"forward": {"cpu_ms": cpu, "wall_ms": wall}}

    found = {"ours": step(2, 1), "unfold": step(8, 3)}
    target = next(t for t in TARGETS if t.operator == "dconv" and t.a == "unfold" and t.measure == "forward")
    assert operators._ratio(target, "A", found, clock) == ratio


def test_the_table_of_operators_says_what_is_missed_and_reached() -> None:
    def forward(shape: str, least: float, ratio: float, most: float, met: bool, aim_met: bool) -> dict[str, Any]:
        what = f"dconv apply {shape}: forward, unfold / ours"
        found = {"what": what, "ratio": ratio, "least": least, "most": most, "met": met, "aim_met": aim_met}
        return found | {"must": ">= 6", "aim": ">= 14"}

    rows = [
        forward("A", 4, 5, 7, met=False, aim_met=False),
        forward("B", 7, 7, 7, met=True, aim_met=False),
        forward("D", 12, 15, 16, met=True, aim_met=True),
        {"what": "dconv apply A: saved, ours / x", "ratio": 0, "least": 0, "most": 0, "must": "<= 0", "aim": ""}
        | {"met": True, "aim_met": None},
    ]
    told = report.operators({"targets": rows})
    assert (
        "| dconv apply | forward, unfold / ours | **5** (4 to 7) | 7 |  | *15* (12 to 16) | >= 6/6/6 | >= 14/14/14 |"
        in told
    )
    assert "| dconv apply | saved, ours / x | 0 |  |  |  | <= 0 |  |" in told
    assert told.endswith("\nMusts missed: 1 of 4. Aims reached: 1 of 3.\n")


def test_shares_are_of_the_rate_on_as_many_threads() -> None:
    def step(cpu: float, wall: float) -> dict[str, Any]:
        return {"forward": {"cpu_ms": cpu, "wall_ms": wall}}

    (case,) = (c for c in OPERATORS["pafu"]() if c.name == "pafu/eval n=4/A")
    product = 2 * operators.PROBE**3 / case.flops  # ms at one FLOP of the case a ms
    run = {"mm": step(product, 9 * product), "ours": step(2, 9), "conv3": step(1, 9)}
    run |= {"mm" + operators.ALL: step(9 * product, product / 2), "ours" + operators.ALL: step(9, 2)}
    rows = operators.shares([case], {case.name: [run]}, "cpu_ms")
    found = {row["step"]: row["share"] for row in rows}
    assert found == pytest.approx({"ours": 0.5, "conv3": 1.0, "ours" + operators.ALL: 0.25})


def test_the_median_of_several_runs_counts() -> None:
    def run(unfold: float) -> dict[str, Any]:
        times = {"ours": 1.0, "unfold": unfold, "conv3": 2.0}
        return {name: {"forward": {"cpu_ms": ms}} for name, ms in times.items()}

    (row,) = [
        row
        for row in operators.compare({"dconv/apply/A": [run(5), run(20), run(7)]}, "cpu_ms")
        if "unfold / ours" in row["what"]
    ]
    assert (row["least"], row["ratio"], row["most"]) == (5, 7, 20)
    assert row["met"]
    assert not row["aim_met"]


@pytest.mark.parametrize(("ratio", "sign", "holds"), [(2.0, ">=", True), (1.9, ">=", False), (2.1, "<=", False)])
def test_operator_targets_compare(ratio: float, sign: str, holds: bool) -> None:
    assert operators._holds(ratio, sign, 2.0) is holds
