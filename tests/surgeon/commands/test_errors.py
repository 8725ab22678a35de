"""Bad input: one clear message on stderr, the right exit code, nothing on stdout, nothing written."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import surgeon
from surgeon.cli import main

CONVERT = ["convert", "test_resnet", "--weights", "random", "--input-size", "64", "--quiet"]
RULE = {"layers": "stage4", "type": "pafu"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(argv: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails with this code and one message that holds these words; the folder is as it was."""
    before = _files()
    assert main([argv[0], "--quiet", *argv[1:]]) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line and not line.startswith(("usage:", " "))]
    assert len(lines) == 1, captured.err
    assert "error: " in lines[0]
    assert all(word in lines[0] for word in words), lines[0]
    assert captured.out == ""
    assert _files() == before


def _files() -> dict[Path, int]:
    """When each file was written; Python's own of modules that it imported do not count."""
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--layers", "stage9", "--type", "pafu"], 2, ["stage9"]),
        (["--layers", "layer9", "--type", "pafu"], 2, ["layer9", "layer"]),
        (["--layers", "stage4,k>=9", "--type", "pafu"], 2, ["k>=9"]),
        (["--layers", "stage4", "--type", "pafo"], 2, ["'pafo'", "pafu", "acda", "sekg"]),
        (["--layers", "stage4"], 2, ["--type"]),
        (["--layers", "stage4", "--type", "acda", "-m", "0"], 2, ["atoms", "got 0"]),
        (["--layers", "stage4", "--type", "acda", "-S", "0"], 2, ["scales", "got 0"]),
        (["--layers", "stage4", "--type", "pafu", "-n", "1"], 2, ["pafu: --group-size (-n)", "got 1"]),
        (
            ["--layers", "stage4", "--type", "pafu", "-m", "4"],
            2,
            ["--atoms (-m) is no option of pafu layers but of acda", "group_size"],
        ),
        (["--layers", "stage4", "--type", "pafu", "--compress"], 2, ["--compress", "pafu"]),
        (["--layers", "stage4", "--type", "acda", "--option", "hiden=3"], 2, ["hiden", "hidden"]),
        (["--layers", "stage4", "--type", "acda", "--option", "hidden"], 2, ["KEY=VALUE", "'hidden'"]),
        (["--layers", "stage4", "--type", "acda", "-m", "four"], 2, ["--atoms", "'four'"]),
        (
            ["--layers", "stage4", "--type", "acda", "--compress", "--calibrate", "nowhere"],
            2,
            ["--calibrate", "nowhere"],
        ),
        (["--layers", "stage4", "--type", "pafu", "--input-size", "0x5"], 2, ["--input-size", "'0x5'"]),
        (["--layers", "stage4", "--type", "pafu", "--num-classes", "0"], 2, ["--num-classes", "'0'"]),
        (["--layers", "stage4", "--type", "pafu", "--model-args", "x=1"], 2, ["test_resnet", "'x'"]),
        (["--recipe", "absent.json"], 2, ["absent.json"]),
        (["--layers", "stage4", "--type", "pafu", "--weights", "empty.pth"], 2, ["empty.pth", "the file is empty"]),
    ],
)
def test_wrong_options(more: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.pth").touch()
    fails([*CONVERT, *more], code, words, capsys)


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_unknown_models_have_near_names(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--type", "pafu"] if command == "convert" else []
    fails([command, "resnet5O", *more], 2, ["'resnet5O'", "resnet50"], capsys)
    fails(["models", "resnet5O"], 2, ["'resnet5O'", "resnet50"], capsys)


def test_a_selection_of_refused_layers_only_is_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)\n"
        "        self.b.weight = self.a.weight\n"
        "    def forward(self, x):\n"
        "        return self.b(self.a(x))\n"
    )
    argv = ["convert", "mine:Net", "--input-size", "16", "--layers", "all", "--type", "pafu", "--quiet"]
    fails(argv, 1, ["nothing was replaced", "shared"], capsys)


def test_an_input_that_the_model_rejects(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["convert", "zoo/resnet20_cifar", "--weights", "random", "--input-size", "5x32x32", "--layers", "all"]
    fails([*argv, "--type", "pafu", "--quiet"], 2, ["5", "32"], capsys)


OWN = """import sys
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, first, second):
        return self.conv(first) + second


def lacks(config={}):
    return nn.Conv2d(3, config["width"], 3)


def leaves():
    sys.exit("no config given")


def single():
    return nn.Sequential(nn.Conv2d(3, 4, 3))
"""


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("odd_nets:lacks", ["odd_nets:lacks raised KeyError: 'width' (odd_nets.py, line 15)"]),
        ("odd_nets:leaves", ["odd_nets:leaves called sys.exit: no config given (odd_nets.py, line 19)"]),
        (
            "odd_nets:Two",
            ["missing 1 required positional argument", "are for Python: example_inputs=(first, second, ...)"],
        ),
        (
            "./odd_nets:single",
            ["there is no model './odd_nets:single': in the folder of odd_nets.py, write odd_nets:single"],
        ),
    ],
)
def test_ones_own_factory(model: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("odd_nets.py").write_text(OWN)
    fails(["convert", model, "--type", "pafu", "--input-size", "16", "--quiet"], 2, words, capsys)


def test_whose_weights_a_factory_has_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("given_nets.py").write_text(OWN)
    argv = ["convert", "given_nets:single", "--type", "pafu", "--input-size", "16"]
    assert main([*argv, "-o", "a"]) == 0
    told = "surgeon: the weights are as given_nets:single makes them; --weights FILE loads a state dict\n"
    assert told in capsys.readouterr().err
    torch.save(surgeon.open_model("given_nets:single").state_dict(), "own.pth")
    assert main([*argv, "-o", "b", "--weights", "own.pth"]) == 0
    assert "the weights are" not in capsys.readouterr().err


def test_channels_that_a_size_brings_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["convert", "test_resnet", "--weights", "random", "--layers", "stage4", "--type", "pafu", "--dry-run"]
    assert main([*argv, "--input-size", "1x64x64"]) == 0
    assert "test_resnet is built with in_chans=1, the channels of the given size\n" in capsys.readouterr().err


def test_images_that_no_layer_is_fitted_to(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    Image.new("RGB", (64, 64)).save("photos/a.png")
    argv = [*CONVERT, "--layers", "stage4", "--type", "acda", "--calibrate", "photos"]
    fails(argv, 2, ["--calibrate fits layers to the images where they compress", "Add --compress"], capsys)


def test_weights(capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.pth").write_bytes(b"\x80\x02 not a checkpoint")
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "other.pth")
    argv = ["convert", "test_resnet", "--type", "pafu", "--layers", "stage4", "--quiet", "--weights"]
    fails([*argv, "absent.pth"], 2, ["absent.pth", "auto, pretrained, random"], capsys)
    fails([*argv, "broken.pth"], 2, ["broken.pth"], capsys)
    fails([*argv, "other.pth"], 2, ["other.pth", "fc.weight has shape (3, 96), expected (1000, 96)"], capsys)
    said = [
        "pretrained weights of test_resnet are unavailable",
        "; --weights FILE takes a file's, --weights random does without",
    ]
    fails([*argv, "pretrained"], 2, said, capsys)


def test_another_head_names_an_option_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "shapes.pth")
    Path("heads.py").write_text(
        "import timm\ndef make(classes=10):\n    return timm.create_model('test_resnet', num_classes=classes)\n"
    )
    argv = ["inspect", "test_resnet", "--weights", "shapes.pth", "--quiet"]
    fails(argv, 2, ["shapes.pth has a head of 3 classes, and the model one of 1000", ": --num-classes 3"], capsys)
    assert main([*argv, "--num-classes", "3"]) == 0
    capsys.readouterr()
    fails(["export", *argv[1:], "-o", "m.onnx"], 2, [": --num-classes 3"], capsys)
    wanted = ["model one of 4 (", ": --num-classes 3; finetune and try put in the head that the data need"]
    fails([*argv, "--num-classes", "4"], 2, wanted, capsys)
    argv[1] = "heads:make"
    fails(argv, 2, [": --model-args classes=3"], capsys)
    assert main([*argv, "--model-args", "classes=3"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    "command",
    [
        "inspect",
        "convert --type acda",
        "cost",
        "export -o m.onnx",
        "place",
        "finetune",
        "evaluate",
        "try",
        "search",
        "gains",
    ],
)
def test_a_folder_has_its_own_classes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    surgeon.save(timm.create_model("test_resnet"), "plain")
    name, *more = command.split()
    for option, told in ((["--num-classes", "3"], "--num-classes 3"), (["--model-args", "a=1"], "--model-args a=1")):
        argv = [name, "plain", *more, *option, "--quiet"]
        fails(argv, 2, [f"plain is a surgeon folder and has its own weights; {told} cannot apply"], capsys)
    twice = [name, "test_resnet", *more, "--num-classes", "3", "--model-args", "num_classes=4", "--quiet"]
    fails(twice, 2, ["num_classes is given twice: --num-classes 3 and --model-args num_classes=4"], capsys)


def test_classes_count(capsys: pytest.CaptureFixture[str]) -> None:
    def params(*more: str) -> int:
        assert main(["cost", "test_resnet", "--input-size", "32", "--json", "--quiet", *more]) == 0
        return int(json.loads(capsys.readouterr().out)["params"])

    assert params() - params("--num-classes", "3") == 997 * 97
    assert params("--num-classes", "3") == params("--model-args", "num_classes=3")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"format": "surgeon-recipe", "version": 3, "rules": [RULE]}, ["version 3, newer than version 2"]),
        ({"format": "surgeon-recipe", "version": 1, "rules": [RULE | {"type": "x"}]}, ["rule 1", "'x'"]),
        ({"format": "surgeon-recipe", "version": 1, "rules": []}, ["no rules"]),
        ([], ["JSON object"]),
    ],
)
def test_recipes(recipe: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.json").write_text(json.dumps(recipe))
    fails([*CONVERT, "--recipe", "r.json"], 2, words, capsys)


def test_a_recipe_says_everything_itself(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.json").write_text(json.dumps({"format": "surgeon-recipe", "version": 1, "rules": [RULE]}))
    for more in (["--layers", "stage3"], ["--type", "pafu"], ["-n", "4"]):
        fails([*CONVERT, "--recipe", "r.json", *more], 2, ["--recipe", "leave out"], capsys)


def test_an_output_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out", "thesis.tex").write_text("years of work")
    argv = [*CONVERT, "--layers", "layer4.0.conv2", "--type", "pafu", "-o", "out"]
    fails(argv, 2, ["out", "exists", "not written by surgeon", "choose another"], capsys)
    fails([*argv, "--force"], 2, ["not written by surgeon"], capsys)


@pytest.fixture
def run_folder(capsys: pytest.CaptureFixture[str]) -> Path:
    assert main([*CONVERT, "--layers", "layer4.0.conv2", "--type", "pafu", "-o", "run"]) == 0
    capsys.readouterr()
    return Path("run")


def test_damaged_and_absent_runs(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for argv in (["verify", "run"], ["revert", "run", "-o", "new"], ["inspect", "run"]):
        fails([*argv, "--quiet"], 2, ["model.safetensors", "SHA-256", "expected"], capsys)
    file.write_bytes(whole[:1000])
    fails(["verify", "run", "--quiet"], 2, ["1000 bytes, expected"], capsys)
    fails(["verify", "absent"], 2, ["no surgeon folder", "absent"], capsys)


def test_verify_and_revert_say_what_they_miss(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(["revert", "run", "-o", "run"], 2, ["exists"], capsys)
    fails(["revert", "run", "--layers", "layer3", "-o", "new"], 2, ["layer3", "layer4.0.conv2"], capsys)
    fails(["convert", "run", "--type", "pafu", "--weights", "random", "-o", "new"], 2, ["run", "own weights"], capsys)
    recipe = json.loads((run_folder / "recipe.json").read_text())
    recipe["base"]["weights"] = {"kind": "given", "sha256": recipe["base"]["weights"]["sha256"]}
    (run_folder / "recipe.json").write_text(json.dumps(recipe))
    fails(["verify", "run", "--quiet"], 2, ["came from a model object", "--weights"], capsys)
    torch.save(timm.create_model("test_resnet").state_dict(), "other.pth")
    fails(["verify", "run", "--quiet", "--weights", "other.pth"], 2, ["not those that were converted"], capsys)
    recipe["base"] = None
    (run_folder / "recipe.json").write_text(json.dumps(recipe))
    fails(["verify", "run", "--quiet"], 2, ["base"], capsys)


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "surgeon: error: cannot write {}: No space left on device",
        ),
        (KeyboardInterrupt(), 130, "surgeon: interrupted, nothing was written"),
    ],
)
def test_a_full_disk_and_ctrl_c(
    failure: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.setattr("surgeon.models.folder.sync", fail)
    assert main([*CONVERT, "--layers", "layer4.0.conv2", "--type", "pafu", "-o", "run"]) == code
    captured = capsys.readouterr()
    assert captured.err == message.format(tmp_path / "run") + "\n"
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "absent", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_weights_beside_a_folder_may_be_the_originals(capsys: pytest.CaptureFixture[str]) -> None:
    surgeon.save(timm.create_model("test_resnet"), "plain")
    Path("w.pth").touch()
    argv = ["evaluate", "plain", "--weights", "w.pth", "--original", "test_resnet", "--quiet"]
    fails(argv, 2, ["--weights w.pth cannot apply; for the original: --original-weights"], capsys)


def test_force_is_not_offered_where_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("foreign").mkdir()
    Path("foreign/thesis.tex").touch()
    Path("file").touch()
    Path("photos").mkdir()
    training = ["finetune", "test_resnet", "--task", "denoising", "--data", "photos"]
    for name, why in (("foreign", "was not written by surgeon"), ("file", "is not a folder")):
        for command in (["convert", "test_resnet", "--type", "pafu"], training):
            assert main([*command, "-o", name, "--quiet"]) == 2
            told = capsys.readouterr().err
            assert why in told
            assert told.endswith(": choose another with -o\n"), told
            assert main([*command, "-o", name, "--force", "--quiet"]) == 2
            assert "--force" in capsys.readouterr().err


def test_a_folder_of_pictures_is_answered_with_their_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/cat").mkdir(parents=True)
    Path("photos/cat/a.jpg").touch()
    surgeon.save(
        surgeon.convert(timm.create_model("test_resnet"), layers="all", type="pafu", input_size=(3, 32, 32))[0], "run"
    )
    fails(
        ["visualize", "run", "photos", "-o", "x"],
        2,
        ["is a folder; name its pictures, such as photos/cat/*.jpg"],
        capsys,
    )


def test_several_rates_have_blanks_between_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", "test_resnet", "--task", "denoising", "--lr", "1e-3,3e-4"]) == 2
    assert "such as 3e-4, or several with blanks between them, got '1e-3,3e-4'" in capsys.readouterr().err
