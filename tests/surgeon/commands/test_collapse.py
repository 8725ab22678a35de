"""surgeon collapse from end to end, in process: what it prints, writes and returns."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import surgeon
from surgeon.cli import main
from surgeon.records.collapse_report import Collapsed, CollapseReport
from surgeon.surgery.rewrite import dynamic_layers
from tests.support.layers.contract import awaken
from tests.support.tiny_models import random_model
from tests.support.tiny_runs import with_dynamic

RUN = ["--quiet", "collapse"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    yield
    assert not list(tmp_path.rglob("*.partial*")), "nothing half-written may stay"


def converted(kind: str, *, vary: int = 0) -> str:
    """A run with three dynamic layers, the first `vary` of which vary."""
    model, base = random_model("test_resnet", input_size=(64, 64))
    model = with_dynamic(model, "layer3.0.conv2", "layer4.0.conv1", "layer4.0.conv2", kind=kind)
    for layer in list(dynamic_layers(model).values())[:vary]:
        awaken(layer)
        if kind == "pafu":
            with torch.no_grad():
                layer.get_submodule("selector.expand").bias.zero_()
    surgeon.save(model, "run", base=base)
    return "run"


def photos(n: int = 3) -> str:
    folder = Path("photos")
    folder.mkdir()
    for i in range(n):
        values = np.random.default_rng(i).integers(0, 255, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i}.png")
    return str(folder)


def document(text: str) -> Any:
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_a_run_becomes_the_plain_network(capsys: pytest.CaptureFixture[str]) -> None:
    converted("pafu")
    capsys.readouterr()
    assert main(["collapse", "run", "-o", "plain", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "run: 3 of 3 dynamic layers folded into convolutions" in out
    assert "3 layers, proven from the parameters:" in out
    assert "no dynamic layer remains" in out
    assert "written to  plain" in out
    assert max(map(len, out.splitlines())) <= 80
    assert out.isascii()
    assert sorted(path.name for path in Path("plain").iterdir()) == [
        "README.md",
        "model.safetensors",
        "recipe.json",
        "report.json",
        "report.txt",
    ]
    assert json.loads(Path("plain/recipe.json").read_text())["rules"] == []
    assert main(["verify", "plain", "--quiet"]) == 0
    assert main(["cost", "plain", "--infer", "--compare", "--json", "--quiet"]) == 0
    text = capsys.readouterr().out
    costs = document(text[text.index("{") :])
    assert costs["flops"] == costs["compared_with"]["flops"]


@pytest.mark.parametrize("kind", ["acda", "pafu", "sekg"])
def test_what_varies_stays_and_the_rest_folds(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    converted(kind, vary=1)
    capsys.readouterr()
    assert main(["collapse", "run", "--images", photos(), "-o", "lean", "--json", "--quiet"]) == 0
    found = document(capsys.readouterr().out)
    assert found["output"] == "lean"
    assert [layer["folded"] for layer in found["layers"]] == [False, True, True]
    assert found["images"] == 3
    assert found["layers"][0]["variation"] > 0
    assert found["params_after"] < found["params_before"]
    assert found["flops_after"] < found["flops_before"]
    again = surgeon.load("lean")
    assert len(dynamic_layers(again)) == 1
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(again(x), surgeon.load("run")(x), atol=1e-5)


def test_nothing_to_fold_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    converted("acda", vary=3)
    photos()
    capsys.readouterr()
    assert main(["collapse", "run", "-o", "out", "--json", "--quiet"]) == 1
    captured = capsys.readouterr()
    told = "be folded. Images show whether there is variation: --images DIR"
    assert captured.err == f"surgeon: error: none of the 3 dynamic layers can {told}\n"
    found = document(captured.out)
    assert found["output"] is None
    assert "the parameters allow variation, and no images were given" in found["layers"][0]["reason"]
    assert main(["collapse", "run", "-o", "out", "--images", "photos", "--quiet"]) == 1
    captured = capsys.readouterr()
    assert "0 of 3 dynamic layers folded" in captured.out
    assert "folds the layer that varies least" in captured.err
    first = next(iter(dynamic_layers(surgeon.load("run"))))
    assert main(["collapse", "run", "-o", "out", "--layers", first, "--quiet"]) == 1
    assert capsys.readouterr().err == f"surgeon: error: the dynamic layer cannot {told}\n"
    assert not Path("out").exists()
    assert main(["collapse", "run", "-o", "out", "--images", "photos", "--tolerance", "0.99", "--quiet"]) == 0
    assert "not exact by choice" in capsys.readouterr().out


def test_an_error_beyond_the_variation_is_explained() -> None:
    known: dict[str, Any] = {"type": "pafu", "folded": True, "geometry": {}, "params_before": 9, "params_after": 3}
    layers = [
        Collapsed(name="body.2", variation=0.011, max_rel_error=0.14, **known),
        Collapsed(name="body.8", variation=0.2, max_rel_error=0.1, **known),
    ]
    told = " ".join(CollapseReport(layers=layers).to_text().split())
    assert "note: the error of body.2 is larger than what varies: that is the distance of the filters" in told
    assert "larger than what varies" not in CollapseReport(layers=layers[1:]).to_text()


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    converted("pafu")
    before = sorted(Path().iterdir())
    assert main(["collapse", "run", "--dry-run", "--quiet"]) == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "give an output folder"),
        (["nowhere", "-o", "out"], "there is no surgeon folder nowhere"),
        (["run", "-o", "run"], "the output run exists"),
        (["run", "-o", "out", "--tolerance", "2"], "expected a number from 0 to less than 1, such as 0.02, got '2'"),
        (["run", "-o", "out", "--tolerance", "nan"], "got 'nan'"),
        (["run", "-o", "out", "--tolerance", "0.1"], "needs --images"),
        (["run", "-o", "out", "--images", "nowhere"], "--images: there is no folder nowhere"),
        (["run", "-o", "out", "--images", "run", "--limit", "0"], "--limit must be at least 1"),
        (["run", "-o", "out", "--layers", "layer9"], "'layer9' is not a dynamic layer"),
        (["plain", "-o", "out"], "nothing to collapse"),
    ],
)
def test_wrong_usage_is_one_clear_error(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    converted("pafu")
    assert main(["collapse", "run", "-o", "plain", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["collapse", *arguments, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
    assert not Path("out").exists()
