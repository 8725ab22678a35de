"""The benchmark programs run, resume and count right, on toy networks and tiny inputs."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import (
    _models,
    _results,
    compress,
    convert_speed,
    coverage,
    trained,
)
from benchmarks import toys as toy_experiments
from benchmarks._tasks import Sample, Task
from surgeon.zoo.tasks import create_task

# --- toy tasks --------------------------------------------------------------------------------------------------------


def _toy_network(folder: Path) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    ).eval()


def _toy_classes(folder: Path, limit: int | None, split: str) -> Iterator[Sample]:
    x = torch.rand(8 if limit is None else limit, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    yield Sample((x,), torch.arange(len(x)) % 5)


def _toy_restorer(folder: Path) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3)).eval()


def _toy_images(folder: Path, limit: int | None, split: str) -> Iterator[Sample]:
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    yield Sample((x,), x)


def _inputs(folder: Path, count: int) -> tuple[Any, ...]:
    return (torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(5)),)


TOYS = {
    "classes": Task(
        name="classes",
        build=_toy_network,
        kind="top1",
        datasets={"toy": _toy_classes},
        calibration=_inputs,
        needs=(),
        quick=4,
        published={},
    ),
    "restore": Task(
        name="restore",
        build=_toy_restorer,
        kind="psnr",
        datasets={"toy": _toy_images},
        calibration=_inputs,
        needs=(),
        quick=1,
        published={},
    ),
}
TOYS["absent"] = replace(TOYS["restore"], name="absent", datasets={}, needs=("weights/none.pth",))


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in (trained, compress):
        monkeypatch.setattr(program, "TASKS", TOYS)


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


# --- the programs -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("toys")
def test_trained_keeps_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--results", str(tmp_path), "--data", str(tmp_path)]
    assert trained.main([*arguments, "--types", "acda", "pafu", "sekg"]) == 0
    content = _content(tmp_path / "trained.json")
    assert [(row["network"], row["type"]) for row in content["rows"]] == [
        (network, kind) for network in ("classes", "restore") for kind in ("original", "acda", "pafu", "sekg")
    ]
    for row in content["rows"]:
        assert row["type"] == "original" or row["replaced"] == 2
        assert all(dataset["kept"] for dataset in row["datasets"].values())
    assert content["skipped"] == {"absent": f"not in {tmp_path}: weights/none.pth"}
    assert "skipped absent" in capsys.readouterr().out


@pytest.mark.usefixtures("toys")
def test_trained_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--results", str(tmp_path), "--data", str(tmp_path), "--only", "classes"]
    assert trained.main([*arguments, "--types", "pafu"]) == 0

    def fail(*_: Any) -> Any:
        raise AssertionError("this row was there")

    monkeypatch.setattr(trained, "convert", fail)
    assert trained.main([*arguments, "--types", "pafu"]) == 0
    with pytest.raises(AssertionError, match="this row was there"):
        trained.main([*arguments, "--types", "pafu", "--fresh"])


@pytest.mark.usefixtures("toys")
def test_trained_sees_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(model: nn.Module, *_: Any) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(9)
        return nn.Sequential(nn.Conv2d(3, 3, 5), nn.ReLU()).eval(), {"replaced": 1}

    monkeypatch.setattr(trained, "convert", lossy)
    arguments = ["--results", str(tmp_path), "--data", str(tmp_path), "--only", "restore", "--types", "pafu"]
    assert trained.main(arguments) == 1
    (_, row) = _content(tmp_path / "trained.json")["rows"]
    assert not row["datasets"]["toy"]["kept"]


@pytest.mark.usefixtures("toys")
def test_compress(tmp_path: Path) -> None:
    arguments = ["--results", str(tmp_path), "--data", str(tmp_path), "--quick", "--calibration", "4"]
    assert compress.main([*arguments, "--atoms", "2", "9"]) == 0
    rows = {
        (row["network"], row["atoms"], row["truncation"]): row for row in _content(tmp_path / "compress.json")["rows"]
    }
    assert len(rows) == 8
    for network in ("classes", "restore"):
        plain, aware = rows[network, 2, "plain"], rows[network, 2, "aware"]
        assert 0 < aware["layer_error"] <= plain["layer_error"]
        assert rows[network, 9, "plain"]["layer_error"] < 1e-5  # 3x3 kernels have at most 9 atoms
        assert ("reestimated" in aware) == (network == "classes")


def test_reestimate_measures_the_inputs() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2)).eval()
    x = torch.randn(4, 2, 3, 3) + 5
    assert compress.reestimate(model, (x,))
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2, 3)))
    assert not model[0].training
    assert model[0].momentum == 0.1


def test_convert_speed(tmp_path: Path) -> None:
    arguments = ["--model", "resnet10t", "--size", "64", "--repeat", "1", "--types", "pafu"]
    assert convert_speed.main([*arguments, "--results", str(tmp_path)]) == 0
    (row,) = _content(tmp_path / "convert_speed.json")["rows"]
    assert row["replaced"] > 5
    assert sum(row["stages"].values()) == pytest.approx(row["seconds"], rel=0.2)


@pytest.mark.parametrize("program", ["cost_table", "memory_accuracy", "operators"])
def test_programs_say_what_they_do(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"benchmarks.{program}").main(["--help"])
    assert f"python -m benchmarks.{program}" in capsys.readouterr().out


@pytest.mark.long
def test_coverage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _models.Case("torchvision", "classification", "squeezenet", "squeezenet1_1")
    monkeypatch.setattr(coverage, "cases", lambda every: [case])
    monkeypatch.setattr(coverage, "timm_families", lambda: {"gemma4_vit": {"model": None, "reason": "none"}})
    docs = tmp_path / "coverage.md"
    arguments = ["--results", str(tmp_path), "--docs", str(docs), "--types", "pafu"]
    assert coverage.main(arguments) == 0
    (row,) = _content(tmp_path / "coverage.json")["rows"]
    assert row["status"] == "ok"
    assert row["found"] == row["replaced"] == 9
    assert row["refused"] == _results.Rows(tmp_path / "coverage.jsonl").values()[0]["unaccounted"] == []
    assert row["train_step"]
    assert row["round_trip"]
    assert "| torchvision/squeezenet1_1 | squeezenet | 9 |" in docs.read_text()
    monkeypatch.setattr(coverage, "run_case", lambda *_: pytest.fail("the row was there"))
    page = docs.read_text()
    (tmp_path / "coverage.jsonl").unlink()  # a clone has what is committed
    docs.unlink()
    assert coverage.main(arguments) == 0
    assert docs.read_text() == page


@pytest.mark.slow
def test_coverage_survives_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _models.Case("timm", "classification", "none", "no_such_model")
    monkeypatch.setattr(coverage, "cases", lambda every: [case])
    monkeypatch.setattr(coverage, "timm_families", dict)
    arguments = ["--results", str(tmp_path), "--docs", str(tmp_path / "c.md"), "--types", "pafu"]
    assert coverage.main(arguments) == 1
    (row,) = _content(tmp_path / "coverage.json")["rows"]
    assert row["status"] == "crashed"
    assert "no_such_model" in row["failures"][0]


@pytest.mark.filterwarnings("ignore")
def test_toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = {"sad": {"val_images": 2}, "pattern-detection": {}}
    monkeypatch.setattr(toy_experiments, "create_task", lambda name, **given: create_task(name, **few[name], **given))
    arguments = ["--steps", "2", "--quick", "--results", str(tmp_path), "--picture", str(tmp_path / "selection.png")]
    assert toy_experiments.main(arguments) == 0
    rows = {row["key"]: row for row in _content(tmp_path / "toys-quick.json")["rows"]}
    assert len(rows) == 6
    assert all(34_000 < row["parameters"] < 37_000 for key, row in rows.items() if key.startswith("sad"))
    assert rows["pattern/acda/0"]["equivariance"] < 1e-5
    assert rows["sad/pafu/0"]["from_dirac"] > 0
    assert (tmp_path / "selection.png").is_file()
    printed = capsys.readouterr().out
    assert toy_experiments.main(arguments) == 0  # nothing runs again
    assert capsys.readouterr().out == printed


def test_the_minimal_solution_of_sad_is_known_as_such(tmp_path: Path) -> None:
    model = toy_experiments.ARMS["sad"]["pafu"]()
    with torch.no_grad():
        model.kernel.zero_()
        model.further_kernels.zero_()
        model.further_kernels.view(3, 5, 5, 3)[range(3), 2, 2, range(3)] = 1
        facts = toy_experiments._sad(model.eval(), create_task("sad"), None)
    assert facts["from_dirac"] == facts["from_zero"] == 0
