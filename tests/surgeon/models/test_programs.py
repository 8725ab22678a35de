"""`.pt2` files of torch.export: the commands on them, their folders, and what is not loaded."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import timm
import torch

import surgeon
from surgeon.cli import main
from surgeon.errors import CheckpointError, ModelError, RecipeError
from surgeon.models.names import build_model, restore
from surgeon.models.programs import described, read_program
from surgeon.records.recipe import Recipe


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = timm.create_model("resnet10t", num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    path = tmp_path_factory.mktemp("programs") / "net.pt2"
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("n", max=64)},)), path)
    return path


def changed(program: Path, to: Path, member: str, change: object) -> Path:
    """The program with a member of the archive changed, or added where `change` is bytes."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if callable(change) and name.endswith(member) else content)
        if isinstance(change, bytes):
            new.writestr(f"net/{member}", change)
    return to


@pytest.mark.long
def test_the_command_converts_a_program_and_its_folder_verifies(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["convert", str(program), "--layers", "stage3", "--type", "acda", "-o", str(run), "--json", "--quiet"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["max_rel_error"] <= 1e-5
    assert [entry["name"] for entry in report["replaced"]] == ["layer3.0.conv1", "layer3.0.conv2"]
    assert any("a program of torch.export with" in note for note in report["notes"])
    assert json.loads((run / "recipe.json").read_text())["base"]["name"] == "program.pt2"
    assert main(["verify", str(run), "--quiet"]) == 0
    assert main(["revert", str(run), "--layers", "layer3.0.conv1", "-o", str(tmp_path / "less"), "--quiet"]) == 0
    assert main(["verify", str(tmp_path / "less"), "--quiet"]) == 0


@pytest.mark.long
def test_the_original_of_a_trained_program_is_the_trained_one(program: Path, tmp_path: Path) -> None:
    """It was the program with its own weights, which are those before any training."""
    model, base = build_model(str(program))
    with torch.no_grad():
        model.fc.weight.add_(1.0)
    trained, run = tmp_path / "trained", tmp_path / "run"
    surgeon.save(model, trained, base=base)
    arguments = ["convert", str(trained), "--layers", "layer3.0.conv1", "--type", "pafu", "-o", str(run), "--quiet"]
    assert main([*arguments, "--input-size", "64"]) == 0
    recorded = Recipe.read(run).base
    assert recorded is not None
    assert recorded.weights.path == str((trained / "model.safetensors").resolve())
    assert torch.equal(restore(recorded).get_parameter("fc.weight"), model.get_parameter("fc.weight"))
    assert main(["verify", str(run), "--quiet"]) == 0
    (trained / "model.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        restore(recorded)
    assert restore(recorded, weights=str(tmp_path / "moved.safetensors")) is not None


def test_a_program_has_a_cost(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", str(program), "--input-size", "64", "--infer", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] > 4e6


@pytest.mark.long
def test_a_folder_needs_its_program_whole_and_in_its_place(program: Path, tmp_path: Path) -> None:
    model, base = build_model(str(program))
    converted, _ = surgeon.convert(model, layers="stage4", type="pafu")
    run = tmp_path / "run"
    surgeon.save(converted, run, base=base)
    images = torch.randn(3, 3, 64, 64)
    assert torch.equal(surgeon.load(run)(images), converted(images))
    recipe = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps(recipe | {"base": recipe["base"] | {"name": str(program)}}))
    with pytest.raises(RecipeError, match="not the name of an entry of this folder"):
        surgeon.load(run)
    (run / "recipe.json").write_text(json.dumps(recipe))
    (run / "program.pt2").write_bytes((run / "program.pt2").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"program\.pt2 is damaged"):
        surgeon.load(run)
    assert Recipe.read(run).base is not None


def test_modes_reach_the_new_layers_alone(program: Path) -> None:
    graph = read_program(program)
    assert "64 x 64 float32" in described(graph)
    converted, _ = surgeon.convert(graph, layers="stage4", type="acda")
    assert converted.train().get_submodule("layer4.0.conv1").training
    assert not converted.eval().get_submodule("layer4.0.conv1").training


def test_what_would_run_code_is_not_loaded(program: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (open, (str(tmp_path / "boom"), "w"))

    cases = {
        "more than arithmetic": ("model.json", lambda c: c.replace(b"positive=True", b"positive=open('boom')")),
        "not one of PyTorch's own operators": (
            "model.json",
            lambda c: c.replace(b"torch.ops.aten.relu_.default", b"torch.load"),
        ),
        "pickled objects \\('": (
            "weights_config.json",
            lambda c: c.replace(b'"use_pickle": false', b'"use_pickle": true', 1),
        ),
        "sample inputs are pickled": ("sample_inputs/model.pt", lambda _: pickle.dumps(Bomb())),
        "not part of a plain program": ("data/constants/opaque_obj_0", pickle.dumps(Bomb())),
    }
    for match, (member, change) in cases.items():
        with pytest.raises(ModelError, match=match):
            read_program(changed(program, tmp_path / "bad.pt2", member, change))
    assert not (tmp_path / "boom").exists()


def test_a_file_that_is_none_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], program: Path
) -> None:
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(ModelError, match="not a program written by"):
        read_program(tmp_path / "text.pt2")
    assert main(["inspect", str(tmp_path / "none.pt2"), "--quiet"]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert main(["inspect", str(program), "--weights", "random", "--quiet"]) == 2
    assert "--weights random cannot apply" in capsys.readouterr().err


def test_convolutions_at_the_top_of_a_program(tmp_path: Path) -> None:
    """`GraphModule.to_folder` reads attributes of the modules at the top; it writes a module to disk and computes nothing."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 16, 16),)), tmp_path / "top.pt2")
    assert (
        main(["convert", str(tmp_path / "top.pt2"), "--layers", "all", "--type", "acda", "-o", str(tmp_path / "o")])
        == 0
    )
    assert main(["verify", str(tmp_path / "o")]) == 0
