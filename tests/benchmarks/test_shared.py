"""What the benchmark programs share: rows, tables, scores, the models of the matrix, the documents' tables."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import _data, _models, _results, _tasks, report
from benchmarks._tasks import Sample, Score


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


def test_a_row_is_a_line(tmp_path: Path) -> None:
    content = {
        "n": [1, 2],
        "rows": [{"a": 1, "b": [2]}, {"a": 3}],
        "by_name": {"x": {"y": 1}, "z": {}},
        "none": [],
        "told": "x",
    }
    text = _results.as_lines(content)
    assert json.loads(text) == content
    assert text.splitlines()[2:6] == [' "rows": [', '  {"a": 1, "b": [2]},', '  {"a": 3}', " ],"]
    assert len(text.splitlines()) == 13
    assert _results.only({"a": 1, "b": 2}, ["b", "c"]) == {"b": 2}


def test_committed_results_are_what_tables_are_made_of() -> None:
    """Raw measurements stay out (.gitignore), and no table takes more than a line a row."""
    command = ["git", "-C", str(_results.ROOT), "ls-files", "benchmarks/results"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(listed) > 20
    texts = {name: (_results.ROOT / name).read_text() for name in listed}
    assert [name for name, text in texts.items() if text != _results.as_lines(json.loads(text))] == []
    assert sum(text.count("\n") for text in texts.values()) < 5000
    assert not [name for name in listed if "fine_tunes" in name or name.endswith((".raw.json", "-quick.json"))]


def test_a_tuple_is_written_as_a_list() -> None:
    assert _results.as_lines({"shapes": {"A": (1, 2)}}) == _results.as_lines({"shapes": {"A": [1, 2]}})


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    _results.table(("name", "n"), [("a", 1), ("long", None)])
    assert capsys.readouterr().out.splitlines() == ["name  n", "----  -", "a     1", "long  -"]
    assert _results.markdown(("a|b", "ok"), [(1.23456, False)]) == "| a\\|b | ok |\n| --- | --- |\n| 1.235 | NO |\n"


def test_machine_is_named(tmp_path: Path) -> None:
    _results.write_json(tmp_path / "x" / "y.json", {"rows": []})
    content = json.loads((tmp_path / "x" / "y.json").read_text())
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
    images = _data.Labeled(torch.zeros(10, 3, 1, 1), torch.arange(10))
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
