"""surgeon.export and the command: files that run without surgeon, checked, atomic, and clear words where it does not work."""

import errno
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.cli import main
from surgeon.errors import ConfigError, ExportError
from surgeon.exporting import exported
from surgeon.util.machine import machine
from tests.support.export_models import Fixed, Untraceable, Wrong, mixed, onnx_run
from tests.support.layers.contract import relative_error

export_module = importlib.import_module("surgeon.exporting.export")  # `surgeon.export` is the function

Capture = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("nothing_half_written")


@pytest.mark.long
def test_onnx_with_every_layer_type_and_free_sizes(tmp_path: Path) -> None:
    import onnx

    model = mixed()
    found = surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 32, 48))
    assert set(found.free) == {"batch", "height", "width"}
    assert found.fixed == {}
    assert found.foreign == []
    assert len(found.checks) == 5
    assert {c.shape[0] for c in found.checks} == {2, 3}
    assert {c.shape[2:] for c in found.checks} == {(32, 48), (64, 112), (33, 51)}
    file = onnx.load(tmp_path / "m.onnx")
    assert {node.domain for node in file.graph.node} == {""}
    assert not file.functions
    assert found.operators == len(file.graph.node)
    assert ([one.name for one in file.graph.input], [one.name for one in file.graph.output]) == (["images"], ["output"])
    sizes = [size.dim_param or size.dim_value for size in file.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", "width"]  # not torch's symbols
    assert file.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert found.input == "images"
    assert str(found).splitlines()[2] == "input     images (batch, 3, height, width), float32"
    assert str(found).endswith("m.onnx\n")
    assert found.size == (tmp_path / "m.onnx").stat().st_size
    for shape in ((1, 3, 40, 24), (5, 3, 19, 33)):
        x = torch.randn(shape)
        assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-4


@pytest.mark.long
def test_a_torch_archive_loads_where_surgeon_is_not_imported(tmp_path: Path) -> None:
    model, x = mixed(), torch.randn(3, 3, 20, 28)
    surgeon.export(model, tmp_path / "m.pt2", format="torch", input_size=(3, 20, 28), free="batch")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "y = torch.export.load('m.pt2').module()(torch.load('x.pt'))\n"
        "assert not [name for name in sys.modules if name.startswith('surgeon')]\n"
        "torch.save(y, 'y.pt')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-P", "-c", code], check=True, cwd=tmp_path)
    assert relative_error(torch.load(tmp_path / "y.pt"), model(x)) <= 1e-5


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    surgeon.export(model, tmp_path / "m.pt2", format="torch", input_size=(3, 16, 16))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_size_of_the_conversion_is_that_of_the_export(tmp_path: Path) -> None:
    model, _ = surgeon.convert(nn.Sequential(nn.Conv2d(3, 4, 3)), "acda", layers="all", input_size=24)
    assert surgeon.export(model, tmp_path / "m.pt2", free="none").input_shape[1:] == (3, 24, 24)
    assert surgeon.export(model, tmp_path / "n.pt2", free="none", input_size=16).input_shape[1:] == (3, 16, 16)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "said"), [(Untraceable(), "torch.export refuses Untraceable"), (Wrong(), "relative error 1.0e-02")]
)
def test_nothing_is_written_of_a_model_that_is_refused_or_differs(model: nn.Module, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(ExportError, match=said):
        surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 8, 8), force=True)
    assert (tmp_path / "m.onnx").read_text() == "old"


def test_weights_that_are_zero_are_named_because_the_checks_do_not_see_them(tmp_path: Path) -> None:
    model, _ = surgeon.convert(nn.Conv2d(3, 4, 3, padding=1), layers="all", type="acda", input_size=(3, 16, 16))
    found = surgeon.export(model, tmp_path / "m.pt2", input_size=(3, 16, 16))
    assert found.unseen
    assert all(not model.get_parameter(name).count_nonzero() for name in found.unseen)
    assert not any(name.endswith("bias") for name in found.unseen)
    assert re.search(r"unseen    \d+ weights? all zero \(", str(found))
    with torch.no_grad():
        for name in found.unseen:
            model.get_parameter(name).fill_(0.01)
    trained = surgeon.export(model, tmp_path / "n.pt2", input_size=(3, 16, 16))
    assert trained.unseen == []
    assert "unseen" not in str(trained)


def test_a_model_of_other_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="only models of one batch of images"):
        surgeon.export(nn.Bilinear(2, 2, 2), tmp_path / "m.onnx", example_inputs=(torch.ones(1, 2), torch.ones(1, 2)))


@pytest.mark.long
def test_weights_that_one_onnx_file_cannot_hold_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "LARGE", 1000)
    model, path = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), tmp_path / "m.onnx"
    for force in (False, True):
        made = surgeon.export(model, path, input_size=(3, 24, 24), free="batch", force=force)
        assert made.data == f"{path}.data"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
        assert made.size == sum(file.stat().st_size for file in tmp_path.iterdir())
        x = torch.randn(3, 3, 24, 24)
        assert relative_error(onnx_run(path, x)[0], model(x)) <= 1e-5
    before = [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    monkeypatch.setattr(export_module, "read", lambda path, format: lambda images: [torch.zeros(len(images), 16)])
    with pytest.raises(ExportError, match="is not equivalent to the model"):
        surgeon.export(model, path, input_size=(3, 24, 24), free="none", force=True)
    assert [file.read_bytes() for file in sorted(tmp_path.iterdir())] == before
    path.unlink()
    with pytest.raises(ConfigError, match=r"m\.onnx\.data exists; choose another, or replace it with force=True"):
        surgeon.export(model, path, input_size=(3, 24, 24))
    monkeypatch.undo()
    made = surgeon.export(model, path, input_size=(3, 24, 24), free="none", force=True)
    assert made.data is None
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"], "weights of the one that was replaced"


def test_a_full_disk_is_no_refusal_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onnx.checker.check_model", full)
    with pytest.raises(ExportError, match=r"cannot write .*m\.onnx: No space left on device"):
        surgeon.export(Fixed(), tmp_path / "m.onnx", input_size=(3, 8, 8), free="none")


@pytest.mark.parametrize(("kind", "good_from", "draws"), [("pafu", 3, 3), ("pafu", 9, None), ("sekg", 3, None)])
def test_where_rounding_selects_another_kernel_other_images_are_drawn(
    kind: str, good_from: int, draws: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selection that is tied comes out otherwise in another program, which is wrong there; a wrong file is wrong everywhere."""
    read, asked = exported.read, 0

    def tied(path: Path, format: str) -> exported.Runner:
        runner = read(path, format)

        def run(images: Tensor) -> list[Tensor]:
            nonlocal asked
            asked += 1
            (found,) = runner(images)
            if asked < good_from:
                found = found.clone()
                found[0, 0, 2, 3] += 0.1
            return [found]

        return run

    monkeypatch.setattr(export_module, "read", tied)
    model, _ = surgeon.convert(nn.Conv2d(3, 4, 3, padding=1), layers="all", type=kind, input_size=(3, 16, 16))
    path = tmp_path / "m.pt2"
    if draws is None:
        with pytest.raises(ExportError, match="is not equivalent to the model"):
            surgeon.export(model, path, format="torch", input_size=(3, 16, 16), free="none")
        assert not path.exists()
    else:
        found = surgeon.export(model, path, format="torch", input_size=(3, 16, 16), free="none")
        assert [check.draws for check in found.checks] == [draws]
        assert found.checks[0].max_rel <= 1e-5
        assert found.to_dict()["checks"][0]["draws"] == draws


class Sharp(nn.Module):
    """Magnifies what float32 rounds of its input by 1e5."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e5 * x)


@pytest.mark.parametrize(("wrong_by", "allowed"), [(1e-3, True), (0.9, False)])
def test_a_model_that_magnifies_rounding_is_allowed_what_it_does_to_itself(
    wrong_by: float, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = exported.read

    def other(path: Path, format: str) -> exported.Runner:
        runner = read(path, format)
        return lambda images: [output + wrong_by for output in runner(images)]

    monkeypatch.setattr(export_module, "read", other)
    words: Any = {"format": "torch", "input_size": (3, 16, 16), "free": "none"}
    if allowed:
        (check,) = surgeon.export(Sharp(), tmp_path / "m.pt2", **words).checks
        assert check.own is not None
        assert 1e-4 < check.max_rel <= 10 * check.own
        return
    with pytest.raises(ExportError, match=r"at most 0\.0001, or 10 times the model's own float32 error of .*e-0\d"):
        surgeon.export(Sharp(), tmp_path / "m.pt2", **words)


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (left := tmp_path / f".m.pt2.partial-{machine()}-4194305-0").mkdir()  # a process that cannot be
    (left / "m.pt2").write_bytes(b"half")
    surgeon.export(Fixed(), tmp_path / "m.pt2", format="torch", input_size=(3, 8, 8), free="none")
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]


def test_a_missing_folder_is_made_and_a_refusal_leaves_none(tmp_path: Path) -> None:
    surgeon.export(Fixed(), tmp_path / "a/b/m.pt2", input_size=(3, 8, 8), free="none")
    assert (tmp_path / "a/b/m.pt2").is_file()
    with pytest.raises(ExportError):
        surgeon.export(Wrong(), tmp_path / "c/d/m.pt2", input_size=(3, 8, 8), free="none")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_missing_package_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = exported.importlib.util.find_spec
    monkeypatch.setattr(
        exported.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(
        ConfigError, match=r"needs onnxscript, .*pip install onnxscript, or pip install 'surgeon\[export\]'"
    ):
        surgeon.export(Fixed(), tmp_path / "m.onnx")
    found = surgeon.export(Fixed(), tmp_path / "m.pt2", input_size=(3, 8, 8))  # needs none
    assert found.format == "torch", "as the suffix says"


def test_where_it_cannot_be_written_is_said_before_work_starts(tmp_path: Path) -> None:
    (tmp_path / "there.onnx").write_text("mine")
    for path, said in (("there.onnx", "exists"), (".", "is a folder"), ("there.onnx/m.onnx", "is not a folder")):
        with pytest.raises(ConfigError, match=said):
            surgeon.export(Fixed(), tmp_path / path, format="onnx")
    with pytest.raises(ConfigError, match="free must be one of"):
        surgeon.export(Fixed(), tmp_path / "m.onnx", free="all")
    with pytest.raises(ConfigError, match="the format must be one of"):
        surgeon.export(Fixed(), tmp_path / "m.onnx", format="tensorrt")
    with pytest.raises(ConfigError, match=r"cannot tell the format from m\.tflite"):
        surgeon.export(Fixed(), tmp_path / "m.tflite")
    assert (tmp_path / "there.onnx").read_text() == "mine"


# --- the command --------------------------------------------------------------------------------------------------


def converted() -> str:
    given = ["zoo/espcnn", "--weights", "random", "--input-size", "64", "--layers", "conv2", "--type", "sekg"]
    assert main(["convert", *given, "--quiet", "--json", "-o", "run"]) == 0
    return "run"


def test_the_command_writes_and_tells(capsys: Capture) -> None:
    run = converted()
    capsys.readouterr()
    assert main(["export", run, "-o", "m.onnx", "--quiet", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["run"] == run
    assert found["input_shape"] == [2, 3, 64, 64]
    assert set(found["free"]) == {"batch", "height", "width"}
    assert all(check["rel_error"] <= 1e-4 for check in found["checks"])
    x = torch.randn(1, 3, 96, 64)
    assert relative_error(onnx_run(Path("m.onnx"), x)[0], surgeon.load(run)(x)) <= 1e-4
    assert main(["export", run, "-o", "m.onnx", "--quiet"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["export", run, "-o", "m.pt2", "--free", "none", "--quiet"]) == 0
    told = capsys.readouterr().out
    for part in (
        "torch, ",
        "(1, 3, 64, 64)",
        "batch: asked for; for 1 image at a time",
        "height, width: asked for",
        "written to",
    ):
        assert part in told


def test_wrong_usage_is_said(capsys: Capture) -> None:
    cases = [
        (["lenet", "-o", "m.bin"], 2, "cannot tell the format"),
        (["lenet", "-o", "m.onnx", "--format", "torch"], 2, "--format torch contradicts the name m.onnx"),
        (["zoo/lenet", "-o", "m.pt2", "--opset", "18"], 2, "--opset applies to ONNX"),
        (["zoo/lenet", "-o", "m.onnx", "--opset", "0"], 2, "--opset must be at least 1"),
        (["zoo/lenett", "-o", "m.onnx", "--weights", "random"], 2, "lenett"),
        (["zoo/lenet", "-o", "m.pt2", "--weights", "random", "--free", "size"], 1, "does not run at"),
    ]
    for words, code, said in cases:
        assert main(["export", *words, "--quiet"]) == code, words
        assert said in capsys.readouterr().err
    assert not list(Path().iterdir())
