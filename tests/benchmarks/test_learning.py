"""`benchmarks.learning`: how a rate is chosen, a sweep goes on, and what counts as decided."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import learning, report
from benchmarks._paired import differences, outcome
from benchmarks.studies import STUDIES
from benchmarks.studies.study import Study
from surgeon.zoo.tasks import Task, create_task


def test_what_is_decided() -> None:
    assert outcome([1.0, 1.1, 0.9]) == "won"
    assert outcome([1.0, 1.1, 0.9], lower=True) == "lost"
    assert outcome([-1.0, -1.1, -0.9]) == "lost"
    assert outcome([1.0, 1.1]) == "undecided", "two seeds decide nothing"
    assert outcome([1.0, -0.5, 0.4]) == "undecided", "within two standard errors"
    mine, other = {0: {"a": 1.0}, 1: {"a": 2.0}}, {1: {"a": 0.5}, 2: {"a": 9.0}}
    assert differences(mine, other) == {"a": [1.5]}
    assert differences(mine, {}) == {}


def toy(steps: int = 2) -> Study:
    def plain(material: Path) -> nn.Module:
        return nn.Conv2d(3, 3, 5, padding=2)

    def task(material: Path, work: Path, seed: int) -> Task:
        return create_task("sad", seed=seed, input_size=(3, 16, 16), images=8, val_images=2)

    return Study(
        title="toy",
        arms={"plain": plain, "ours": plain},
        task=task,
        judge=lambda model, material: {"sum": float(sum(p.sum().item() for p in model.parameters()))},
        needs=(),
        rates=(1e-3, 2e-3),
        steps=steps,
        batch=2,
        unit="nothing",
    )


@pytest.mark.parametrize("name", ["acda-sr", "dconv-denoising", "mdcb-denoising"])
def test_the_larger_plain_network_has_about_as_many_parameters_as_ours(name: str) -> None:
    study = STUDIES[name]()
    assert study.wide is not None
    ours = next(make for arm, make in study.arms.items() if arm.endswith("as published"))
    wide, dynamic = (sum(p.numel() for p in make(Path()).parameters()) for make in (study.arms[study.wide], ours))
    assert abs(wide / dynamic - 1) < 0.1


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "STUDIES", {"toy": toy})


def test_a_study_runs_and_is_not_run_again(
    studies: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--only", "toy", "--results", str(tmp_path), "--seeds", "2"]
    assert learning.main([*arguments, "--arms", "plain"]) == 0
    assert {row["arm"] for row in json.loads((tmp_path / "learning.json").read_text())["rows"]} == {"plain"}
    assert learning.main(arguments) == 0
    content = json.loads((tmp_path / "learning.json").read_text())
    rows = content["rows"]
    assert {row["arm"] for row in rows} == {"plain", "ours"}
    line = content["studies"]["toy"]["lines"][1]
    assert line["difference"] == "sum +0.00 ± 0.00 (0 of 2 ahead)", "equal networks of equal seeds differ by nothing"
    assert line["verdicts"] == {"sum": "undecided"}
    assert "of 1 comparisons: 0 won, 0 lost, 1 undecided" in capsys.readouterr().out
    assert "**toy**" in report.learning(content)

    def never(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(learning, "run", never)
    assert learning.main(arguments) == 0


def rows_by(score: Callable[[float], float]) -> Callable[..., dict[str, Any]]:
    def run(study: Study, arm: str, rate: float, seed: int, material: Path, work: Path) -> dict[str, Any]:
        facts = {"steps": 1, "flops": 1, "parameters": 1, "cpu_seconds": 1.0, "layers": []}
        return facts | {"chooses": score(rate), "higher_chooses": True, "scores": {"s": score(rate) + seed}}

    return run


@pytest.mark.parametrize(
    ("best", "swept", "at_edge"),
    [
        (1.4e-3, [5e-4, 1e-3, 2e-3], False),  # 1e-3 is the better edge: one step beyond
        (1.0, [1e-3, 2e-3, 4e-3, 8e-3], True),  # two steps beyond, and still at the edge
    ],
)
def test_a_sweep_goes_on_beyond_its_edge(
    studies: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    best: float,
    swept: list[float],
    at_edge: bool,
) -> None:
    monkeypatch.setattr(learning, "run", rows_by(lambda rate: -abs(rate - best)))
    assert learning.main(["--only", "toy", "--results", str(tmp_path)]) == 0
    line = json.loads((tmp_path / "learning.json").read_text())["studies"]["toy"]["lines"][0]
    assert line["swept"] == swept
    assert line["at edge"] is at_edge
    assert line["seeds"] == 3


def test_a_network_that_no_study_has(studies: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        learning.main(["--only", "toy", "--arms", "SEGK", "--results", str(tmp_path)])
    assert end.value.code == 2
    assert "no network 'SEGK' in toy; there are: plain, ours" in capsys.readouterr().err
