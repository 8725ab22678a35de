"""A U-Net of one's own that needs sides of 4k pixels, on photos of 481x321 and the like: what each command says of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import surgeon
from surgeon.cli import main
from surgeon.errors import InputError, in_terminal
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.finetune import FinetuneConfig, dry_run, finetune
from surgeon.zoo.finetune.loop import Run
from surgeon.zoo.finetune.run import _Session
from surgeon.zoo.tasks import Task, create_task
from tests.support.training.task_data import class_folders, photo
from tests.support.training.unet import UNet, make_unet

FACTORY = "tests.support.training.unet:make_unet"
SHORT = ["--batch-size", "4", "--epochs", "1", "--device", "cpu", "--quiet"]
Told = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(3):
        photo(tmp_path / f"photos/train/{index}.png", 40, 48, index)
    for index, (width, height) in enumerate([(81, 61), (61, 81), (81, 61), (64, 48)]):
        photo(tmp_path / f"photos/val/{index}.png", width, height, index)
    monkeypatch.chdir(tmp_path)


def denoising(**options: Any) -> Task:
    return create_task("denoising", **{"data": Path("photos"), "patch": 16, **options})


def interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


CONFIG = FinetuneConfig(epochs=None, max_steps=1, batch_size=4, device="cpu")
RUNS: list[Callable[[nn.Module, Task], Any]] = [
    lambda model, task: evaluate(model, task),
    lambda model, task: finetune(model, task, CONFIG),
    lambda model, task: dry_run(model, task, CONFIG),
]
TOLD = r"UNet does not run on a batch of 4 images of 81x61, 61x81 and 64x48 pixels of task denoising: RuntimeError: The size"


@pytest.mark.parametrize("run", RUNS)
def test_the_images_and_the_padding_that_helps_are_named(run: Callable[[nn.Module, Task], Any]) -> None:
    with pytest.raises(InputError, match=TOLD + r"(.|\n)*this one runs with multiple=4, which pads them"):
        run(make_unet(), denoising())
    run(make_unet(), denoising(multiple=4))


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", FACTORY, "--weights", "random"],
        ["finetune", FACTORY, *SHORT],
        ["finetune", FACTORY, *SHORT, "--dry-run"],
        ["try", FACTORY, "--layers", "first", "--type", "pafu", "--option", "group_size=2", *SHORT[:2], *SHORT[4:]],
        ["search", FACTORY, "--types", "acda", "--gains", "uniform", "--steps", "2", *SHORT[:2], *SHORT[4:]],
    ],
)
def test_every_command_names_the_option(command: list[str], capsys: Told) -> None:
    assert main([*command, "--task", "denoising", "--data", "photos", "--task-option", "patch=16"]) == 2
    error = capsys.readouterr().err
    assert "UNet does not run on a batch of 4 images of 81x61, 61x81 and 64x48 pixels" in error
    assert "this one runs with --task-option multiple=4, which pads them" in error


def test_no_padding_is_named_where_it_does_not_help() -> None:
    class Refusing(UNet):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] < 64, "too wide"
            return super().forward(x)

    for model in (Refusing(), nn.Linear(7, 3)):
        with pytest.raises(InputError, match="does not run on a batch of 4 images") as told:
            evaluate(model, denoising())
        assert "multiple" not in str(told.value)


def test_flops_are_those_of_the_padded_image(capsys: Told) -> None:
    convert = ["convert", FACTORY, "--layers", "last", "--type", "pafu", "--group-size", "2", "--input-size", "16"]
    assert main([*convert, "-o", "run", "--quiet"]) == 0
    options = ["--task", "denoising", "--data", "photos", "--task-option", "patch=16", "multiple=4"]
    capsys.readouterr()
    assert main(["finetune", "run", *options, *SHORT, "--trust-factory", "-o", "tuned", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    model = surgeon.load("tuned", trust_factory=True)
    assert summary["result"]["flops"] == surgeon.cost(model, mode="infer", input_size=summary["input_size"]).flops
    given = ["evaluate", "tuned", "--data", "photos", "--trust-factory", "--quiet"]
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["input_size"] == [3, 64, 84]
    assert found["flops"] == surgeon.cost(model, mode="infer", input_size=(3, 64, 84)).flops
    assert found["original"]["flops"] == surgeon.cost(make_unet(), mode="infer", input_size=(3, 64, 84)).flops
    assert not [note for note in found["notes"] if "FLOPs" in note]
    assert main(given) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "FLOPs (1 MAC = 2 FLOPs) are those of one input of 3x64x84, padded to multiples of 4." in out


def test_there_is_no_legend_of_flops_that_were_not_counted(capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise InputError("UNet fails")

    monkeypatch.setattr("surgeon.costs.cost", refuse)
    options = ["--task", "denoising", "--data", "photos", "--task-option", "patch=16", "multiple=4"]
    assert main(["evaluate", FACTORY, "--weights", "random", *options, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert f"note: the FLOPs of {FACTORY} cannot be counted: UNet fails" in " ".join(out.split())
    assert "FLOPs (1 MAC" not in out


@pytest.mark.parametrize(
    ("flags", "hint"), [({"--input-size"}, "; give a supported --input-size"), ({"--task-option"}, "")]
)
def test_a_size_is_asked_for_only_where_it_can_be_given(flags: set[str], hint: str) -> None:
    with in_terminal(frozenset(flags)), pytest.raises(InputError, match=r"fails on images of 3x61x81: ") as told:
        surgeon.cost(make_unet(), mode="infer", input_size=(3, 61, 81))
    assert str(told.value).endswith(f"at non-singleton dimension 3{hint}")


def test_a_new_head_is_told_before_the_training(capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    told = (
        "the network was given new, untrained parameters to fit the task: fc.weight, fc.bias (3 outputs instead of 10)"
    )
    class_folders(Path("classes"))
    model = [
        "test_resnet",
        "--weights",
        "random",
        "--num-classes",
        "10",
        "--task",
        "classification",
        "--data",
        "classes",
    ]
    tune = ["finetune", *model, "--task-option", "input_size=3,32,32", *SHORT]
    assert main([*tune, "--dry-run"]) == 0
    out, error = capsys.readouterr()
    assert (out.count(told), error) == (1, "")
    with monkeypatch.context() as patched:
        patched.setattr(Run, "train", interrupt)
        assert main([*tune, "-o", "tuned"]) == 130
    out, error = capsys.readouterr()
    assert (out, error.count(told)) == ("", 1)
    assert error.startswith("surgeon: WARNING: ")
    assert main([*tune, "-o", "tuned", "--resume"]) == 0
    out, error = capsys.readouterr()
    assert " ".join(out.split()).count(told) == 1
    assert told not in error


# --- interrupted outside of the training --------------------------------------------------------------------------


TUNE = [
    "finetune",
    FACTORY,
    "--task",
    "denoising",
    "--data",
    "photos",
    "--task-option",
    "patch=16",
    "multiple=4",
    *SHORT,
]


def test_an_interrupt_before_the_first_checkpoint_leaves_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Told) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("surgeon.zoo.finetune.loop.evaluate", interrupt)
        assert main([*TUNE, "-o", "run"]) == 130
    assert capsys.readouterr().err == "surgeon: interrupted, nothing was written\n"
    assert not Path("run").exists()
    assert main([*TUNE, "-o", "run"]) == 0


def test_an_interrupt_after_the_last_step_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: Told) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(_Session, "_end", interrupt)
        assert main([*TUNE, "-o", "run"]) == 130
    told = "surgeon: interrupted after step 1; resume with the same command and --resume\n"
    assert capsys.readouterr().err == told
    with monkeypatch.context() as patched:
        patched.setattr(_Session, "_end", interrupt)
        assert main([*TUNE, "-o", "run", "--resume"]) == 130
    assert capsys.readouterr().err == told
    assert main([*TUNE, "-o", "run", "--resume"]) == 0
