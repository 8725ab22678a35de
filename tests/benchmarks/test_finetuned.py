"""The programs that fine-tune converted networks beside their originals, and that fold them back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import collapsed, finetuned, report
from benchmarks._experiments import Experiment
from benchmarks.finetuned import means
from surgeon.records.recipe import Recipe, Rule
from surgeon.zoo.tasks import Task, create_task


def _network(folder: Path) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)).eval()  # weights of the current seed


def _task(folder: Path, seed: int, images: int | None) -> Task:
    return create_task("pattern-detection", seed=seed)


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """A convolution and a PAFU of it, on generated data."""
    toy = Experiment(
        name="toy",
        build=_network,
        task=_task,
        arms={"pafu": Recipe(rules=[Rule(layers="all", type="pafu", options={"group_size": 2})])},
        needs=(),
        unit="1",
        metrics={"mse": 1.0},
        steps=3,
        batch=1,
        lr=1e-2,
        input_size=(1, 32, 32),
    )
    monkeypatch.setattr(finetuned, "EXPERIMENTS", {"toy": toy})
    return toy


def test_arms_begin_alike_and_are_trained(experiment: Experiment, tmp_path: Path) -> None:
    arguments = ["--only", "toy", "--seeds", "2", "--results", str(tmp_path), "--data", str(tmp_path)]
    assert finetuned.main(arguments) == 0
    rows = {row["key"]: row for row in json.loads((tmp_path / "finetuned.json").read_text())["rows"]}
    assert list(rows) == ["toy/original/0", "toy/pafu/0", "toy/original/1", "toy/pafu/1"]
    for seed in (0, 1):
        plain, pafu = rows[f"toy/original/{seed}"], rows[f"toy/pafu/{seed}"]
        assert plain["before"]["mse"] == pytest.approx(pafu["before"]["mse"], rel=1e-5)
        assert plain["after"]["mse"] < plain["before"]["mse"]
        assert pafu["replaced"] == ["0"]
        assert pafu["parameters"] > plain["parameters"]
    assert rows["toy/original/0"]["before"] != rows["toy/original/1"]["before"]


def test_a_cross_validation_trains_anew_for_every_fold(experiment: Experiment, tmp_path: Path) -> None:
    seen = []

    def task(folder: Path, seed: int, images: int | None, fold: int) -> Task:
        seen.append(fold)
        return create_task("pattern-detection", seed=fold)

    row = finetuned.run(replace(experiment, task=task, folds=2), "pafu", 0, tmp_path)
    alone = [
        finetuned.run(
            replace(experiment, task=lambda *_, n=n: create_task("pattern-detection", seed=n)), "pafu", 0, tmp_path
        )
        for n in (0, 1)
    ]
    assert seen == [0, 1]
    assert row["folds"] == 2
    assert row["after"]["mse"] == pytest.approx((alone[0]["after"]["mse"] + alone[1]["after"]["mse"]) / 2)


def test_rows_are_not_run_twice(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--only", "toy", "--results", str(tmp_path), "--data", str(tmp_path)]
    assert finetuned.main([*arguments, "--seeds", "1"]) == 0

    def never(*args: object, **options: object) -> None:
        raise AssertionError("a finished row was run again")

    monkeypatch.setattr(finetuned, "run", never)
    assert finetuned.main([*arguments, "--seeds", "1"]) == 0
    with pytest.raises(AssertionError, match="run again"):
        finetuned.main([*arguments, "--seeds", "2"])


def test_missing_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetuned.main(["--only", "camvid", "--results", str(tmp_path), "--data", str(tmp_path / "none")]) == 0
    assert "camvid left out: not in" in capsys.readouterr().err
    assert "seg_camvid" in json.loads((tmp_path / "finetuned.json").read_text())["skipped"]["camvid"]


def _row(arm: str, seed: int, before: float, after: float | None) -> dict[str, object]:
    scores = None if after is None else {"set": after}
    facts = {"experiment": "e", "arm": arm, "seed": seed, "unit": "dB", "steps": 5, "parameters": 7, "seconds": 1.0}
    return facts | {"before": {"set": before}, "after": scores}


def test_gains_are_of_equal_seeds() -> None:
    rows = [_row("original", 0, 1.0, 2.0), _row("original", 1, 1.0, 4.0)]
    rows += [_row("acda", 0, 1.0, 3.0), _row("acda", 1, 1.0, 5.5), _row("acda", 2, 1.0, None)]
    plain, acda = means(rows)
    assert (plain["after"], plain["gain"], plain["failed"]) == (3.0, None, 0)
    assert acda["after"] == 4.25
    assert acda["gain"] == 1.25
    assert acda["failed"] == 1
    assert acda["seeds"] == 2
    assert acda["gain_error"] == pytest.approx(torch.tensor([1.0, 1.5]).std().item() / 2**0.5)
    assert acda["verdict"] == "undecided", "two seeds decide nothing"
    text = report.finetuned({"rows": rows})
    assert "| e | set, dB | acda | 7 | 2 | 5 | 1.00 | 4.25 ± 1.77 | +1.25 ± 0.25: undecided |" in text


def test_collapsed_is_the_original_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--group-size", "2", "--batch", "1", "--size", "32", "--repeats", "1", "--results", str(tmp_path)]
    assert collapsed.main(small) == 0
    content = json.loads((tmp_path / "collapsed.json").read_text())
    plain, converted, folded = content["rows"]
    assert plain["flops"] == folded["flops"] < converted["flops"]
    assert plain["parameters"] == folded["parameters"] < converted["parameters"]
    assert content["kept"] == []
    assert content["units"] == 17
    assert content["max_rel_error"] <= 1e-5
    assert "17 units, 17 folded" in capsys.readouterr().out
    assert "resnet18, 17 units, 0 kept" in report.collapsed(content)
