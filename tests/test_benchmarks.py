"""The benchmark programs run, resume and count right, on toy networks and tiny inputs."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import (
    _data,
    _models,
    _results,
    _tasks,
    compress,
    convert_speed,
    coverage,
    operators,
    report,
    trained,
)
from benchmarks import toys as toy_experiments
from benchmarks._operator_cases import SHAPES, TARGETS
from benchmarks._tasks import Sample, Score, Task
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
    "absent": Task(
        name="absent",
        build=_toy_restorer,
        kind="psnr",
        datasets={},
        calibration=_inputs,
        needs=("weights/none.pth",),
        quick=1,
        published={},
    ),
}


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


def test_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for shape in SHAPES:
        monkeypatch.setitem(SHAPES, shape, (1, 4, 8))
    assert operators.main(["--quick", "--json", str(tmp_path / "operators.json")]) == 0
    rows = json.loads((tmp_path / "operators.json").read_text())["targets"]
    measured = [target for target in TARGETS if target.measure != "peak"]  # which --quick leaves out
    assert len(rows) == sum(len(target.must | target.aim) for target in measured)
    saved = [row for row in rows if ": saved" in row["what"]]
    assert saved
    assert all(row["ratio"] == 0 and row["met"] for row in saved)
    printed = capsys.readouterr().out
    assert all(row["what"] in printed for row in rows)


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


@pytest.mark.parametrize("program", ["cost_table", "memory_accuracy", "operators"])
def test_programs_say_what_they_do(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"benchmarks.{program}").main(["--help"])
    assert f"python -m benchmarks.{program}" in capsys.readouterr().out


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
    assert row["refused"] == row["unaccounted"] == []
    assert row["train_step"]
    assert row["round_trip"]
    assert "| torchvision/squeezenet1_1 | squeezenet | 9 |" in docs.read_text()
    monkeypatch.setattr(coverage, "run_case", lambda *_: pytest.fail("the row was there"))
    assert coverage.main(arguments) == 0


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


# --- what they share --------------------------------------------------------------------------------------------------


def test_rows_survive_a_broken_line(tmp_path: Path) -> None:
    rows = _results.Rows(tmp_path / "rows.jsonl")
    rows.add("a", {"value": 1})
    rows.add("b", {"value": 2})
    rows.add("a", {"value": 3})
    with rows.path.open("a") as file:
        file.write('{"key": "c", "val')
    again = _results.Rows(rows.path)
    assert again.values() == [{"key": "a", "value": 3}, {"key": "b", "value": 2}]
    again.add("c", {"value": 4})
    assert "c" in _results.Rows(rows.path)
    _results.write_json(rows.path.with_suffix(".json"), {"rows": again.values()})
    assert _results.Rows(rows.path, fresh=True).values() == []


def test_a_clone_goes_on_from_the_committed_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    _results.write_json(path.with_suffix(".json"), {"rows": [{"key": "a", "value": 1}, {"value": "of an old run"}]})
    rows = _results.Rows(path)
    assert rows.values() == [{"key": "a", "value": 1}]
    rows.add("b", {"value": 2})
    assert [row["key"] for row in _results.Rows(path).values()] == ["a", "b"]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    _results.table(("name", "n"), [("a", 1), ("long", None)])
    assert capsys.readouterr().out.splitlines() == ["name  n", "----  -", "a     1", "long  -"]
    assert _results.markdown(("a|b", "ok"), [(1.23456, False)]) == "| a\\|b | ok |\n| --- | --- |\n| 1.235 | NO |\n"


def test_machine_is_named(tmp_path: Path) -> None:
    _results.write_json(tmp_path / "x" / "y.json", {"rows": []})
    content = _content(tmp_path / "x" / "y.json")
    assert content["rows"] == []
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["y.json"]


def test_scores() -> None:
    top1 = Score("top1", [1, 2, 3, 4], [1, 2, 0, 0])
    assert top1.summary == 50
    assert top1.difference(Score("top1", [1, 5, 3, 9], [1, 2, 0, 0])) == 2
    assert Score("psnr", [30.0, 32.0], [0, 0]).summary == 31
    count = Score("count", [10.0, 20.0], [12, 16])
    assert count.summary == 3
    assert count.difference(Score("count", [10.0, 20.5], [12, 16])) == 0.5


def test_psnr_of_images_without_border() -> None:
    truth = torch.zeros(1, 3, 10, 12)
    out = torch.full((1, 3, 6, 8), 0.1)
    assert _tasks._image_psnr(out, Sample((truth,), truth)) == pytest.approx(20, abs=1e-4)


def test_luma_and_low_resolution() -> None:
    assert _data.luma(torch.ones(3, 1, 1)).item() * 255 == pytest.approx(235, abs=1e-3)
    image = Image.fromarray(np.full((11, 9, 3), 128, np.uint8))
    large, small = _data.low_resolution(image, 4)
    assert (large.size, small.size) == ((8, 8), (2, 2))


def test_even_choice_of_images() -> None:
    images = _data.Labelled(torch.zeros(10, 3, 1, 1), torch.arange(10))
    assert images.every(4).y.tolist() == [0, 3, 6, 9]
    assert images.every(None).y.tolist() == list(range(10))


def test_nothing_is_switched_off() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.zeros_(model[1].weight)
    kept = model[0].weight.clone()
    _models.awaken(model)
    assert torch.equal(model[0].weight, kept)
    weights: Tensor = model[1].weight.detach()
    assert float(weights.min()) > 0.05
    assert len(weights.unique()) == 4


def test_norms_take_the_statistics_of_what_they_get() -> None:
    case = _models.Case("torchvision", "classification", "toy", "toy")
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight.mul_(1e-2)
    before = _models.sensitivity(model, case, 16)
    state = {key: value.clone() for key, value in model.state_dict().items() if "running" not in key}
    _models.settle_norms(model, lambda: _models.training_loss(model, case, 16))
    assert before < 1e-3
    assert _models.sensitivity(model, case, 16) > 10 * before
    assert not model.training
    assert model[1].momentum == 0.1
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_norms_behind_a_settled_norm_take_what_it_gives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    ).train()
    x = 5 * torch.randn(2, 3, 16, 16)
    _models.settle_norms(model, lambda: model(x))
    with torch.no_grad():
        given, got = model[:4](x), model(x)
    torch.testing.assert_close(model[4].running_mean, given.mean((0, 2, 3)))
    spread = model[4].running_var / given.var((0, 2, 3), correction=0).mean()
    assert 0.5 <= float(spread.min()) <= float(spread.max()) <= 1.5
    torch.testing.assert_close(got.mean((0, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_spatial_convolutions() -> None:
    shared = nn.Conv2d(3, 3, (1, 3))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), shared, shared, nn.Conv3d(3, 3, 3))
    assert _models.spatial_convolutions(model) == ["1"]


def test_smallest_model_of_a_family() -> None:
    found = _models._smallest(["resnet18", "resnet10t"])
    assert found["model"] == "resnet10t"
    assert found["of"] == 2
    assert _models._smallest(["mlp_mixer_none"][:0])["model"] is None


def test_torchvision_is_complete() -> None:
    cases = list(_models._torchvision_cases())
    assert {case.kind for case in cases} == set(_models.KINDS)
    assert len(cases) == len({case.key for case in cases}) > 100
    assert not any("quantized" in case.name for case in cases)


def test_the_document_says_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0


def test_report_fills_tables_and_leaves_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"type": "acda", "replaced": 17, "seconds": 1.234}
    _results.write_json(tmp_path / "convert_speed.json", {"rows": [row]})
    document = tmp_path / "document.md"
    document.write_text(
        "before\n<!-- begin convert_speed -->\nold\n<!-- end -->\nbetween\n<!-- begin trained -->\nkept\n<!-- end -->\n"
    )
    arguments = ["--results", str(tmp_path), "--document", str(document)]
    assert report.main([*arguments, "--check"]) == 1
    assert "old" in document.read_text()
    assert report.main(arguments) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- begin convert_speed -->")
    assert "| acda | 17 | 1.23 |" in text
    assert text.endswith("<!-- end -->\nbetween\n<!-- begin trained -->\nkept\n<!-- end -->\n")
    assert report.main([*arguments, "--check"]) == 0
    document.write_text("<!-- begin nothing -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="no table of this name"):
        report.main(arguments)


@pytest.mark.filterwarnings("ignore")
def test_toys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
