"""`surgeon finetune` as people call it."""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.cli import main
from surgeon.commands.evaluate import _named
from surgeon.records.recipe import BaseModel, Recipe, Trained, Weights
from surgeon.util.waiting import waiting
from surgeon.zoo.finetune import evaluation, journal, loop, run
from surgeon.zoo.finetune.evaluation import Evaluation
from surgeon.zoo.finetune.loop import Trainer
from surgeon.zoo.tasks import registry
from tests.support.training.runs import interrupt_at
from tests.support.training.tasks import TinyClassification, TinyRegression

FACTORY = "tests.support.training.tasks:make_restorer"
SHORT = ["--epochs", "2", "--batch-size", "4", "--eval-every", "3", "--checkpoint-every", "2", "--lr", "0.01"]

Finetune = Callable[..., int]


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry.task_names()  # the real ones first
    tasks = {cls.name: cls for cls in (TinyRegression, TinyClassification)}
    monkeypatch.setattr(registry, "_TASKS", registry._TASKS | tasks)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def finetune(tmp_path: Path) -> Finetune:
    """Fine-tunes a converted run; further arguments follow."""
    arguments = ["convert", FACTORY, "--layers", "middle", "--type", "pafu", "-n", "2", "--input-size", "8"]
    assert main([*arguments, "-o", "start", "--quiet"]) == 0

    def call(*more: str) -> int:
        return main(["finetune", "start", "--task", "tiny-regression", "--trust-factory", *SHORT, *more])

    return call


def test_a_run_from_the_command_line(finetune: Finetune, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert finetune("-o", "tuned", "--json", "--task-option", "samples=9", "noise=0.05", "--ema", "0.9") == 0
    out, error = capsys.readouterr()
    document = json.loads(out)
    assert document["output"] == "tuned"
    assert document["original"]["metrics"]["mse"] == pytest.approx(document["start"]["metrics"]["mse"], rel=1e-4)
    assert document["result"]["metrics"]["mse"] < document["start"]["metrics"]["mse"]
    assert document["steps"] == 4
    assert "step 3/4: mse" in error
    assert Path("tuned/report.json").is_file()
    recipe = Recipe.read("tuned")
    assert recipe.task == Trained(name="tiny-regression", options={"samples": 9, "noise": 0.05})
    card = Path("tuned/README.md").read_text()
    assert "- fine-tuned on `tiny-regression` with `samples=9, noise=0.05`" in card
    assert f"- on its validation samples: mse {document['result']['metrics']['mse']:.5g}" in card

    assert main(["evaluate", "tuned", "--trust-factory", "--json", "--quiet"]) == 0
    note, few = json.loads(capsys.readouterr().out)["notes"]
    assert "tuned was trained longer than" in note
    assert few.startswith("only 5 samples judge: the metrics say little of other images")

    model = surgeon.load("tuned", trust_factory=True)
    assert main(["finetune", "tuned", "--task", "tiny-regression", "--trust-factory", *SHORT, "--quiet"]) == 0
    out, error = capsys.readouterr()
    assert "written to  runs/tuned-tiny-regression" in out
    assert error == ""
    had = f"note: tuned had {document['steps']} steps of training by surgeon before this run: "
    assert f"{had}compare it with a network that had them, too" in " ".join(out.split())
    again = Recipe.read("runs/tuned-tiny-regression")
    summary = json.loads(Path("runs/tuned-tiny-regression/training/summary.json").read_text())
    assert again.task is not None
    assert again.task.steps == document["kept_step"] + summary["kept_step"]
    told = f"`, {again.task.steps} steps of training by surgeon\n"
    assert told in Path("runs/tuned-tiny-regression/README.md").read_text()
    assert main(["evaluate", "tuned", "--trust-factory", "--task-option", "samples=5", "--original", "none"]) == 0
    out, error = capsys.readouterr()
    assert "tuned: tiny-regression" in out
    assert "as recorded in tuned: tiny-regression with noise=0.05" in error
    assert not model.training


def test_weights_of_the_original_that_were_moved(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(surgeon.open_model(FACTORY).state_dict(), "own.pth")
    arguments = [
        "convert",
        FACTORY,
        "--weights",
        "own.pth",
        "--layers",
        "middle",
        "--type",
        "pafu",
        "--input-size",
        "8",
    ]
    assert main([*arguments, "-n", "2", "-o", "start", "--quiet"]) == 0
    Path("own.pth").rename("moved.pth")
    capsys.readouterr()
    tune = ["finetune", "start", "--task", "tiny-regression", "--trust-factory", *SHORT, "--quiet"]
    assert main([*tune, "-o", "a", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["original"] is None
    assert [note for note in found["notes"] if "are gone; pass their file with --original-weights FILE" in note]
    assert main([*tune, "-o", "b", "--distill", "0.1"]) == 2
    assert "distill needs the original network" in capsys.readouterr().err
    assert main([*tune, "-o", "b", "--distill", "0.1", "--original-weights", "moved.pth", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["original"] is not None


def test_a_plain_model_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", FACTORY, "--task", "tiny-regression", *SHORT, "-o", "plain"]) == 0
    assert "original" not in capsys.readouterr().out
    base = Recipe.read("plain").base
    assert base is not None
    assert base.input_size == (3, 8, 8)  # that of the training samples; a factory says none
    assert main(["finetune", "plain", "--trust-factory", *SHORT, "-o", "longer"]) == 0
    assert "original" not in capsys.readouterr().out, "a plain run has no original, trusted or not"


def test_an_original_is_named_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(tmp_path / "runs" / "plain" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    base = BaseModel(source="timm", name="test_resnet", weights=Weights(kind="file", path=file))
    assert _named(base) == "runs/plain"
    assert _named(replace(base, weights=Weights(kind="file", path="/there/mine.pth"))) == "test_resnet"
    assert _named(replace(base, weights=Weights(kind="random"))) == "test_resnet"


def test_max_steps_alone_are_the_length_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", FACTORY, "--task", "tiny-regression", "--batch-size", "4", "--max-steps", "33", "--json"]
    for more in ([], ["--resume"]):  # 10 epochs are 30 steps
        assert main([*command, "-o", "run", *more]) == 0
        out, error = capsys.readouterr()
        assert json.loads(out)["steps"] == 33
        assert "the run has" not in error
    for epochs, told in (
        ("2", "the run has 6 steps: 2 epochs (--epochs) are fewer steps than --max-steps 33"),
        ("20", ""),
    ):
        assert main([*command, "-o", "both", "--force", "--epochs", epochs]) == 0
        error = capsys.readouterr().err
        assert told in error.partition("step ")[0]
        assert ("the run has" in error) == bool(told)
    assert main([*command, "-o", "both", "--resume"]) == 2
    assert "--epochs was 20.0 and is None" in capsys.readouterr().err


def test_waits_of_a_run_are_told_in_a_pipe(
    finetune: Finetune, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*args: Any, **kwargs: Any) -> Evaluation:
        kwargs["progress"]("evaluate", 1, 2)
        time.sleep(0.05)
        return evaluation.evaluate(*args, **kwargs)

    for module in (run, loop):
        monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(journal, "waiting", lambda what, *, quiet: waiting(what, quiet=quiet, after=0.01))
    capsys.readouterr()
    assert finetune("-o", "tuned", "--task-option", "samples=9") == 0
    error = capsys.readouterr().err
    for what in ("original", "network at the start", "network after step 3"):
        assert f"surgeon: evaluating the {what}: 5 samples, batch 1/2 ... 0 s" in error
    assert finetune("-o", "other", "--task-option", "samples=9", "--quiet") == 0
    assert "evaluating" not in capsys.readouterr().err


def test_unequal_training_is_told_of_a_named_original(finetune: Finetune, capsys: pytest.CaptureFixture[str]) -> None:
    def train(output: str, *more: str) -> None:
        assert main(["finetune", FACTORY, "--task", "tiny-regression", *SHORT, "-o", output, "--quiet", *more]) == 0

    def notes(model: str, original: str) -> list[str]:
        capsys.readouterr()
        command = ["evaluate", model, "--original", original, "--task", "tiny-regression", "--trust-factory"]
        assert main([*command, "--json", "--quiet"]) == 0
        found: list[str] = json.loads(capsys.readouterr().out)["notes"]
        return [note for note in found if "samples judge" not in note and "one filter at every pixel" not in note]

    assert finetune("-o", "tuned", "--quiet") == 0
    train("equal")
    train("longer", "--epochs", "3")
    train("others", "--task-option", "samples=9")
    assert notes("tuned", "equal") == []
    (note,) = notes("tuned", "longer")
    assert note.startswith("trained unequally, tuned for 6 steps of 4 from 12 samples, longer for 9 steps of 4 from 12")
    (note,) = notes("tuned", "others")
    assert "others for 4 steps of 4 from 9 samples" in note
    again = ["finetune", "tuned", "--task", "tiny-regression", *SHORT, "-o", "twice", "--trust-factory", "--quiet"]
    assert main(again) == 0
    (note,) = notes("twice", "equal")
    assert note.startswith(
        "trained unequally, twice for 6 steps of 4 from 12 samples (after 6 steps before), equal for 6 steps"
    )
    weights, note = notes("tuned", FACTORY)
    assert weights == f"{FACTORY} has the weights that were converted"
    assert note.startswith(f"tuned was trained longer than {FACTORY}: only --original with a plain run")
    (note,) = notes("start", "equal")
    assert note == "equal was trained longer than start"
    summary = Path("longer/training/summary.json")
    recorded = summary.read_text()
    summary.write_text(json.dumps(json.loads(recorded) | {"kept_step": 0}))
    assert notes("start", "longer") == []
    summary.write_text(recorded)
    assert (
        main(["convert", "equal", "--type", "pafu", "-o", "after", "--trust-factory", "--quiet", "--layers", "middle"])
        == 0
    )
    assert notes("after", "auto") == [], "the same weights"
    (note,) = notes("after", "longer")
    assert note.startswith("trained unequally, after for 6 steps")
    Path("longer/training/summary.json").unlink()
    (note,) = notes("tuned", "longer")
    assert note == "how long longer was trained is not recorded: it may be unequal to the other"


def test_dry_run_writes_nothing(finetune: Finetune, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert finetune("--dry-run") == 0
    out = capsys.readouterr().out
    assert "12 training and 5 validation samples" in out
    assert "needed in total" in out
    assert "rate x: factor on --lr. New parameters learn at --new-lr-scale times it" in out
    assert "the indented rows are what is held at the moment of the peak" in out
    assert "dry run: nothing was written" in out
    assert finetune("--dry-run", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert {group["role"] for group in document["groups"]} == {"selector", "new", "other"}
    assert document["cost"]["params"] > 0
    assert sorted(Path().rglob("*")) == before


def test_interrupt_then_resume(
    finetune: Finetune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backward = Trainer.backward
    interrupt_at(monkeypatch, 2)
    assert finetune("-o", "tuned", "--quiet") == 130
    assert "interrupted after step 3; resume with the same command and --resume" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "backward", backward)
    assert finetune("-o", "tuned") == 2
    assert "continue it (--resume) or replace it (--force)" in capsys.readouterr().err
    assert finetune("-o", "tuned", "--resume", "--batch-size", "2") == 2
    assert (
        "--batch-size was 4 and is 2. To train its result on, begin another run: its folder as MODEL"
        in capsys.readouterr().err
    )
    assert finetune("-o", "tuned", "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--task", "tiny-regresion"], "unknown task 'tiny-regresion'; .* Did you mean 'tiny-regression'"),
        (["--task-option", "sample=3"], "has no option 'sample'.* Did you mean 'samples'"),
        (["--task-option", "samples=0"], "samples must be >= 1, got 0"),
        (["--task-option", "broken=true"], "image 3 of the training set cannot be read"),
        (["--task-option", "data=/tmp"], "with --data, not as"),
        (["--task-option", "samples"], "expected KEY=VALUE, got 'samples'"),
        (["--lr", "0"], "--lr: expected a number above 0, such as 3e-4, got .0"),
        (["--opt", "adamv"], "timm has no optimizer 'adamv'"),
        (["--warmup", "soon"], r"warmup: expected steps \(200\)"),
        (["--warmup", "200%"], "warmup: at most 100% of the run, got '200%'"),
        (["--max-time", "soon"], "--max-time: expected a time"),
        (["--sched", "plateau"], "there is no choice 'plateau'; there are cosine"),
        (["--amp", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
        (["--checkpointing"], "has no set_grad_checkpointing"),
        (["--weights", "random"], "has its own weights"),
        (["--resume"], "no run to resume"),
        (["--alternate", "0"], "--alternate: expected a positive integer, got '0'"),
    ],
)
def test_bad_input(finetune: Finetune, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    capsys.readouterr()
    assert finetune(*arguments, "-o", "tuned") == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert re.search(told, error), error
    assert "Traceback" not in error
    assert not Path("tuned").exists(), "what cannot begin leaves nothing in the way of the corrected command"


def test_nan_to_the_end_is_exit_code_1(finetune: Finetune, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("-o", "tuned", "--lr", "1e30", "--clip", "0", "--opt", "sgd", "--max-rollbacks", "1") == 1
    assert "after 1 rollbacks to earlier checkpoints" in capsys.readouterr().err


def test_defaults_are_left_to_the_config() -> None:
    import argparse

    from surgeon.commands import finetune as finetune_command
    from surgeon.zoo.finetune import FinetuneConfig

    parser = argparse.ArgumentParser()
    finetune_command.add_arguments(parser)
    args = parser.parse_args(["run", "--task", "t"])
    assert finetune_command.read_config(args) == FinetuneConfig()
    given: dict[str, Any] = vars(
        parser.parse_args(["run", "--task", "t", "--clip", "0", "--alternate", "--max-time", "2m"])
    )
    config = finetune_command.read_config(argparse.Namespace(**given))
    assert (config.clip, config.alternate, config.max_time) == (None, 3, 120)


def test_help_has_the_defaults_of_the_config() -> None:
    """Read from the source, because the config imports torch."""
    from surgeon.util.declared import training_defaults
    from surgeon.zoo.finetune import FinetuneConfig

    config = {field.name: field.default for field in dataclasses.fields(FinetuneConfig)}
    assert training_defaults() == {name: config[name] for name in training_defaults()}
    assert {"epochs", "batch_size", "lr", "opt", "warmup", "keep"} <= set(training_defaults())
