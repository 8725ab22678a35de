"""The commands from end to end, in process, on tiny networks: what they print, write and return."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import surgeon
from surgeon.cli import main
from surgeon.models import folder
from surgeon.records.recipe import Trained, get_recipe, set_recipe
from tests.support.forks import Fork
from tests.support.tiny_runs import environment

ARGS = ["convert", "test_resnet", "--weights", "random", "--input-size", "64", "--quiet"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    yield
    assert not list(tmp_path.rglob("*.partial*")), "nothing half-written may stay"


def document(text: str) -> Any:
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


@pytest.mark.parametrize("kind", ["acda", "pafu", "sekg"])
def test_convert_verify_revert(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    assert main([*ARGS, "--layers", "stage3,stage4", "--type", kind]) == 0
    out = capsys.readouterr().out
    assert "3 of 15 convolutions replaced" in out
    assert f"written to  runs/test_resnet-{kind}" in out
    assert max(map(len, out.splitlines())) <= 80
    folder = Path("runs", f"test_resnet-{kind}")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "model.safetensors",
        "recipe.json",
        "report.json",
        "report.txt",
    ]
    assert out.startswith((folder / "report.txt").read_text())

    assert main(["verify", str(folder)]) == 0
    assert "computes what the original computes" in capsys.readouterr().out

    assert main(["revert", str(folder), "--layers", "layer4", "-o", "one"]) == 0
    assert "2 layers reverted to plain convolutions: layer4.0.conv1, layer4.0.conv2" in capsys.readouterr().out
    assert main(["verify", "one", "--quiet"]) == 0
    assert main(["revert", str(folder), "-o", "plain"]) == 0
    assert "plain model weights" in capsys.readouterr().out
    plain, original = surgeon.load("plain"), timm.create_model("test_resnet")
    assert repr(plain) == repr(original)
    assert list(plain.state_dict()) == list(original.state_dict())


def test_every_command_has_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGS, "--layers", "layer4", "--type", "pafu", "-n", "3", "-o", "run", "--json"]) == 0
    converted = document(capsys.readouterr().out)
    assert converted["output"] == "run"
    assert [entry["name"] for entry in converted["replaced"]] == ["layer4.0.conv1", "layer4.0.conv2"]
    assert len(converted["replaced"]) + len(converted["skipped"]) == 15
    assert converted["replaced"][0]["options"]["group_size"] == 3
    assert main(["verify", "run", "--json"]) == 0
    verified = document(capsys.readouterr().out)
    assert verified["equal"] is True
    assert set(verified["layers"]) == {"layer4.0.conv1", "layer4.0.conv2"}
    assert main(["revert", "run", "-o", "plain", "--json"]) == 0
    assert document(capsys.readouterr().out)["remaining"] == 0
    assert main(["inspect", "test_resnet", "--weights", "random", "--json"]) == 0
    inspected = document(capsys.readouterr().out)
    assert len(inspected["convolutions"]) == 15
    first = inspected["convolutions"][0]
    assert (first["name"], first["stage"], first["activation_bytes"]) == ("conv1.0", "stem", 4 * 16 * 80 * 80)
    assert (first["can_become"], first["why_not"]) == (["acda", "pafu", "sekg"], {})
    assert main(["inspect", "run", "--json"]) == 0
    dynamic = [one for one in document(capsys.readouterr().out)["convolutions"] if one["dynamic"]]
    already = ["it is already a dynamic layer (pafu)"]
    assert [(one["can_become"], one["why_not"]) for one in dynamic] == [
        ([], dict.fromkeys(["acda", "pafu", "sekg"], already))
    ] * 2
    assert main(["models", "test_resnet", "--json"]) == 0
    assert document(capsys.readouterr().out) == ["test_resnet"]


def test_inspect_lists_every_convolution_at_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgeon.models.names.pretrained", lambda base: pytest.fail("weights were asked for"))
    assert main(["inspect", "test_resnet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("test_resnet: 15 convolutions")
    model = timm.create_model("test_resnet")
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert (
        len([line for line in out.splitlines() if line.startswith(("conv1.", "layer1", "layer2", "layer3", "layer4"))])
        == len(names)
        == 15
    )
    assert max(map(len, out.splitlines())) <= 80
    assert out.isascii()


def test_options_reach_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["-m", "4", "-S", "2", "--basis-size", "5", "--option", "hidden=16"]
    assert main([*ARGS, "--layers", "layer4.0.conv2", "--type", "acda", *given, "--json", "--dry-run"]) == 0
    options = document(capsys.readouterr().out)["replaced"][0]["options"]
    assert {key: options[key] for key in ("atoms", "scales", "basis_size", "hidden")} == {
        "atoms": 4,
        "scales": 2,
        "basis_size": 5,
        "hidden": 16,
    }
    assert (
        main([*ARGS, "--layers", "layer4.0.conv2", "--type", "sekg", "--kernel-groups", "4", "--json", "--dry-run"])
        == 0
    )
    assert document(capsys.readouterr().out)["replaced"][0]["options"]["kernel_groups"] == 4


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*ARGS, "--layers", "layer4", "--type", "pafu", "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_compression_states_its_error_and_calibration_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos", "a").mkdir(parents=True)
    for i in range(3):
        pixels = torch.randint(0, 256, (70 + i, 90, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(Path("photos", "a", f"{i}.png"))
    common = [*ARGS, "--layers", "layer4", "--type", "acda", "-m", "4", "--compress", "--json"]
    reports = []
    for output, more in (("plain", []), ("aware", ["--calibrate", "photos"])):
        assert main([*common, "-o", output, *more]) == 0
        reports.append(document(capsys.readouterr().out))
    assert all(report["exact"] is False for report in reports)
    assert all(entry["options"]["static_atoms"] == 0 for report in reports for entry in report["replaced"])
    assert reports[0]["replaced"][0]["max_rel_error"] != reports[1]["replaced"][0]["max_rel_error"]
    assert main(["verify", "plain"]) == 1, "a compressed model is not equal to its original"
    assert "NOT equal" in capsys.readouterr().out


def test_recipes_may_mix_types_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    rules = [
        {"layers": "stage3", "type": "pafu", "options": {"group_size": 2}},
        {"layers": "stage4", "type": "acda", "options": {"atoms": 3}},
        {"layers": "layer4.0.conv2", "type": "sekg"},
    ]
    Path("mine.json").write_text(json.dumps({"format": "surgeon-recipe", "version": 1, "rules": rules}))
    assert main([*ARGS, "--recipe", "mine.json", "--json"]) == 0
    report = document(capsys.readouterr().out)
    assert report["output"] == "runs/test_resnet-recipe"
    assert {entry["name"]: entry["type"] for entry in report["replaced"]} == {
        "layer3.0.conv2": "pafu",
        "layer4.0.conv1": "acda",
        "layer4.0.conv2": "sekg",
    }
    # The recipe of a run is a recipe again, and gives the same model.
    assert main([*ARGS, "--recipe", "runs/test_resnet-recipe/recipe.json", "-o", "again"]) == 0
    first, again = (surgeon.load(path).state_dict() for path in ("runs/test_resnet-recipe", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_run_can_be_converted_further(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGS, "--layers", "stage3", "--type", "pafu", "-o", "first"]) == 0
    again = ["convert", "first", "--layers", "stage4", "--type", "pafu", "--input-size", "80", "-q"]
    assert main([*again, "-o", "second"]) == 0
    assert main(["verify", "second", "--json"]) == 0
    assert [document(Path(run, "recipe.json").read_text())["base"]["input_size"] for run in ("first", "second")] == [
        [3, 64, 64],
        [3, 80, 80],
    ]
    out = capsys.readouterr().out
    assert set(document(out[out.rindex('{\n  "run"') :])["layers"]) == {
        "layer3.0.conv2",
        "layer4.0.conv1",
        "layer4.0.conv2",
    }


def test_a_trained_run_is_found_unequal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGS, "--layers", "layer4.0.conv2", "--type", "pafu", "-o", "run"]) == 0
    model: Any = surgeon.load("run")
    model.layer4[0].conv1.weight.data += 0.1
    surgeon.save(model, "trained")
    capsys.readouterr()
    assert main(["verify", "trained"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("surgeon: error:") == 1
    assert "layer4.0.conv1.weight" in captured.err
    model = surgeon.load("run")
    weight = next(p for name, p in model.layer4[0].conv2.named_parameters() if p.dim() > 2)
    weight.data += 0.1
    surgeon.save(model, "layer_trained")
    assert main(["verify", "layer_trained"]) == 1
    assert "error: the converted model is not equivalent to the original" in capsys.readouterr().err
    recipe = get_recipe(model)
    assert recipe is not None
    set_recipe(model, replace(recipe, task=Trained(name="classification")))  # as fine-tuning does
    surgeon.save(model, "fine_tuned")
    assert main(["verify", "fine_tuned"]) == 1
    told = "error: fine_tuned was trained after its conversion, so it should differ from its original: the converted"
    assert told in capsys.readouterr().err


def test_other_sources_convert_too(capsys: pytest.CaptureFixture[str]) -> None:
    for model, layers in (("zoo/resnet20_cifar", "stage3"), ("torchvision/squeezenet1_1", "k=3,in>=64")):
        name = model.rpartition("/")[2]
        assert (
            main(["convert", model, "--weights", "random", "--layers", layers, "--type", "pafu", "-n", "2", "--quiet"])
            == 0
        )
        assert main(["verify", f"runs/{name}-pafu", "--quiet"]) == 0


def test_weights_files_and_model_options(capsys: pytest.CaptureFixture[str]) -> None:
    source = timm.create_model("test_efficientnet", pad_type="same", num_classes=9)
    torch.save(source.state_dict(), "mine.pth")
    command = [
        "convert",
        "test_efficientnet",
        "--weights",
        "mine.pth",
        "--num-classes",
        "9",
        "--model-args",
        "pad_type=same",
    ]
    assert main([*command, "--layers", "depthwise", "--type", "sekg", "-o", "run", "--quiet"]) == 0
    x = torch.randn(1, 3, 65, 65)
    expected, found = source.eval()(x), surgeon.load("run")(x)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert main(["verify", "run", "--quiet"]) == 0


# --- the terminal -------------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_no_model_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for pattern in ("restnet18", "restnet*"):
        assert main(["models", pattern]) == 2
        assert f"no model matches {pattern!r}. Did you mean resnet" in capsys.readouterr().err


def test_progress_goes_to_stderr_and_quiet_stops_it(capsys: pytest.CaptureFixture[str]) -> None:
    from surgeon.commands.common.console import Progress

    with Progress() as progress:
        progress._last = float("-inf")
        progress("verify", 1, 3)
    assert capsys.readouterr() == ("", "surgeon: verify 1/3, 0 s so far\n")
    with Progress(enabled=False) as progress:
        progress._last = float("-inf")
        progress("verify", 1, 3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", [[], ["models"], ["inspect"], ["convert"], ["verify"], ["revert"]])
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert f"surgeon {' '.join(command)}" in out
    assert max(map(len, out.splitlines())) <= 110


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"surgeon {surgeon.__version__}\n"


def test_the_file_in_a_checkout_is_the_command(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, root / "cli.py", "--version"], capture_output=True, text=True, env=environment()
    )
    assert (done.returncode, done.stdout) == (0, f"surgeon {surgeon.__version__}\n")


def without_a_reader(arguments: Sequence[str]) -> int:
    """`surgeon models | head`, whose head has gone."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(writer)
    os.close(reader)
    return main(arguments)


def test_a_closed_pipe_is_no_error() -> None:
    child = Fork(without_a_reader, ["models", "--quiet"])
    assert child.communicate() == ("", "")
    assert child.returncode == 0
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "surgeon", "--print-completion", "bash"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment())
    os.close(writer)
    assert (done.stderr, done.returncode) == (b"", 0)


def while_it_is_written(arguments: Sequence[str]) -> int:
    """The command, whose writing takes a minute."""

    def slow(path: Path) -> None:
        print("writing", flush=True)
        time.sleep(60)

    folder.sync = slow
    return main(arguments)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_one_line_and_nothing_written(number: int, tmp_path: Path) -> None:
    child = Fork(while_it_is_written, [*ARGS, "--layers", "layer4.0.conv2", "--type", "pafu", "-o", "run"], tmp_path)
    while child.stdout.readline() not in ("writing\n", ""):
        pass
    child.send_signal(number)
    assert child.communicate()[1] == "surgeon: interrupted, nothing was written\n"
    assert child.returncode == 130
    assert list(tmp_path.iterdir()) == []
