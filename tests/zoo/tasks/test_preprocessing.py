"""How inputs are made of images: told in a line, recorded with a fine-tuned model, known to timm and to an exported file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import surgeon
from surgeon.cli import main
from surgeon.errors import RecipeError
from surgeon.models.identify import identify
from surgeon.models.names import build_model
from surgeon.records.preprocessing import recorded_inputs, tell_timm
from surgeon.records.recipe import Recipe, Weights, trained
from surgeon.zoo.finetune import FinetuneConfig, dry_run, finetune
from surgeon.zoo.tasks import create_task
from surgeon.zoo.tasks.classification import Classification, ClassificationConfig
from surgeon.zoo.trial.report import write_report
from surgeon.zoo.trial.run import try_conversion
from surgeon.zoo.trial.twins import TryConfig
from tests.support.answers import make_answer
from tests.support.training.task_data import class_folders

HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
WHOLE = "mean 0.5 0.5 0.5, std 0.5 0.5 0.5"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    class_folders(tmp_path / "data")
    return tmp_path / "data"


def task_of(folder: Path, **options: Any) -> Classification:
    return Classification(ClassificationConfig(data=folder, **options))


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


def test_a_line_says_what_is_the_models_and_what_was_given(folders: Path) -> None:
    (task := task_of(folders)).bind(timm.create_model("test_resnet", num_classes=3))
    own = "160x160, bilinear, crop 0.95, mean 0.5 0.5 0.5, std 0.5 0.5 0.5 (the model's; mean=, std= for others)"
    assert task.images() == own
    (task := task_of(folders, mean=(0.1, 0.2, 0.3), crop_pct=1)).bind(timm.create_model("test_resnet", num_classes=3))
    assert task.images() == (
        "160x160, bilinear, crop 1, mean 0.1 0.2 0.3, std 0.5 0.5 0.5 "
        "(mean, crop_pct: as given; the rest: the model's; mean=, std= for others)"
    )
    (task := task_of(folders, input_size=(3, 32, 32), **HALF)).bind(net())
    whole = "bicubic, crop 1, crop mode squash"  # small images are only resized
    assert task.images() == f"32x32, {whole}, {WHOLE} (input_size, mean, std: as given; the rest: the task's default)"
    (task := task_of(folders)).bind(net())
    assert str(task.images()).endswith("std 0.229 0.224 0.225 (the task's default; mean=, std= for others)")
    segmentation = create_task("segmentation", data=folders, **HALF)
    assert segmentation.images() == f"{WHOLE} (mean, std: as given)"
    assert create_task("crowd-counting", data=folders, **HALF).images() == f"{WHOLE} (mean, std: as given)"
    assert create_task("denoising", data=folders).images() is None


def test_a_files_weights_whose_images_nobody_knows_are_told(folders: Path, tmp_path: Path) -> None:
    """By finetune, its dry run and a trial, on stderr and in what they return; by no other weights, and not once options say it."""
    model = timm.create_model("test_resnet", num_classes=3)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    model, base = build_model("test_resnet", weights=str(tmp_path / "mine.pth"), num_classes=3)
    assert base is not None
    (task := task_of(folders)).bind(model)
    start = f"the weights are from {tmp_path / 'mine.pth'}: if they were trained with another "
    note = f"{start}mean, std or size, give it with mean=, std=, input_size="
    assert task.unknown_images(model, base) == note
    assert task.unknown_images(model) is None
    assert task.unknown_images(model, replace(base, weights=Weights(kind="pretrained"))) is None
    (task := task_of(folders, input_size=(3, 32, 32), mean=HALF["mean"])).bind(model)
    assert task.unknown_images(model, base) == f"{start}std, give it with std="
    (task := task_of(folders, **HALF)).bind(model)
    assert task.unknown_images(model, base) is None
    assert create_task("denoising", data=folders).unknown_images(model, base) is None


def test_commands_tell_of_weights_whose_images_nobody_knows(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folders.parent)
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "mine.pth")
    common = ["test_resnet", "--weights", "mine.pth", "--num-classes", "3", "--task", "classification"]
    common += ["--data", str(folders), "--task-option", "input_size=32", "--batch-size", "2", "--device", "cpu"]
    note = "the weights are from mine.pth: if they were trained with another mean or std, give it with --task-option "
    note += "mean=... std=..."
    assert main(["evaluate", *common, "--json"]) == 0
    assert note in json.loads(capsys.readouterr().out)["notes"]
    assert main(["finetune", *common, "--max-steps", "1", "-o", "run", "--json"]) == 0
    out, told = capsys.readouterr()
    assert note in json.loads(out)["notes"]
    assert f"surgeon: {note}\n" in told
    assert main(["try", *common, "--steps", "1", "--seeds", "1", "--lr", "0.001", "-o", "out", "--json"]) == 0
    out, told = capsys.readouterr()
    assert note in json.loads(out)["notes"]
    assert told.count(note) == told.count("surgeon: images: 32x32, ") == 1
    assert told.index("surgeon: images: ") < told.index(note) < told.index("surgeon: plan: ")


@pytest.mark.parametrize("side", [48, 72])
def test_timms_transform_of_the_loaded_model_makes_what_the_task_judges(folders: Path, side: int) -> None:
    task = task_of(folders, input_size=(3, side, side))
    model = task.bind(timm.create_model("test_resnet", num_classes=3))
    made = create_transform(**resolve_model_data_config(model))
    item = task.labeled("val").items[0]
    image = Image.open(item).convert("RGB").resize((90, 110))
    image.save(item)
    judged = task.dataset("val")[0]["input"]
    with Image.open(item) as same:
        torch.testing.assert_close(made(same.convert("RGB")), judged, rtol=0, atol=0)


@pytest.mark.long
def test_the_commands_tell_and_what_they_write_knows(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    monkeypatch.chdir(folders.parent)
    task = ["--task", "classification", "--data", str(folders)]
    given = ["--task-option", "mean=0.1,0.2,0.3", "std=0.5,0.5,0.6", "input_size=3,72,72"]
    length = ["--max-steps", "1", "--batch-size", "2", "--device", "cpu", "-o", "run"]
    assert main(["finetune", "test_resnet", "--weights", "random", *task, *given, *length]) == 0
    line = "images: 72x72, bilinear, crop 0.95, mean 0.1 0.2 0.3, std 0.5 0.5 0.6 (input_size, mean, std: as given; "
    told = capsys.readouterr()
    assert f"surgeon: {line}" in told.err
    assert line in " ".join(told.out.split())
    assert main(["evaluate", "run", "--data", str(folders), "--quiet"]) == 0
    assert line in " ".join(capsys.readouterr().out.split())
    assert main(["evaluate", "run", "--data", str(folders), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"].startswith(line.removeprefix("images: "))
    loaded = surgeon.load("run")
    found = resolve_model_data_config(loaded)
    assert (found["input_size"], found["mean"], found["std"]) == ((3, 72, 72), (0.1, 0.2, 0.3), (0.5, 0.5, 0.6))
    surgeon.save(loaded, "again")
    assert resolve_model_data_config(surgeon.load("again")) == found
    exported = surgeon.export(loaded, "m.onnx", free="none")
    properties = {one.key: one.value for one in onnx.load("m.onnx").metadata_props}
    assert exported.metadata.items() <= properties.items()
    assert json.loads(properties["classes"]) == ["ant", "bee", "cow"]
    assert json.loads(properties["mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(properties["input_size"]) == [3, 72, 72]
    assert properties["interpolation"] == "bilinear"
    assert "metadata  input_size, mean, std, interpolation, crop_pct, crop_mode, classes\n" in str(exported)
    assert exported.size == Path("m.onnx").stat().st_size


@pytest.mark.long
def test_a_fine_tuned_model_is_trained_on_as_it_was(folders: Path, tmp_path: Path) -> None:
    """Its original, which has ImageNet's statistics, sees the same images."""
    model = surgeon.open_model("resnet10t", weights="random", num_classes=3)
    model, _ = surgeon.convert(model, layers="layer4.0.conv2", type="pafu", input_size=72)
    config = FinetuneConfig(max_steps=1, batch_size=2, device="cpu", recalibrate=0)
    given: dict[str, Any] = {"input_size": (3, 72, 72), "train_limit": 2, "val_limit": 2}
    first = finetune(model, task_of(folders, **HALF, **given), config, tmp_path / "run")
    assert resolve_model_data_config(first.model)["mean"] == HALF["mean"]
    assert "mean 0.485" in str(dry_run(model, task_of(folders, **given), config).notes)
    for tuned in (first.model, surgeon.load(tmp_path / "run")):
        assert (
            f"{WHOLE} (input_size: as given; the rest: the model's; "
            in (dry_run(tuned, task_of(folders, **given), config).notes[0])
        )


def test_the_answer_of_a_trial_and_its_page_tell(tmp_path: Path) -> None:
    answer = make_answer([0.5], [0.6], images="8x8, mean 0.5")
    assert "\nimages: 8x8, mean 0.5\n" in answer.to_text()
    assert answer.to_dict()["images"] == "8x8, mean 0.5"
    assert "images: 8x8, mean 0.5" in write_report(answer, tmp_path, "", "").read_text(encoding="utf-8")


def test_recorded_inputs_are_read_and_checked() -> None:
    old = trained({"name": "classification", "options": {"mean": [0.5], "input_size": [1, 8, 8], "mixup": 1}}, "r")
    assert old is not None
    recipe = Recipe(rules=(), task=old)
    assert recorded_inputs(recipe) == {"mean": (0.5,)}  # an option, before inputs were recorded
    recipe = replace(recipe, task=replace(old, inputs={"input_size": (1, 8, 8), "std": (1,), "crop_mode": "border"}))
    assert recorded_inputs(Recipe.from_json(recipe.to_json())) == recorded_inputs(recipe)
    for bad in ({"mean": "half"}, {"input_size": [8, 8]}, {"scale": 1}, {"std": [True]}):
        with pytest.raises(RecipeError, match="r: inputs"):
            trained({"name": "classification", "inputs": bad}, "r")


def test_timms_configuration_is_not_shared_and_keeps_its_channels() -> None:
    model = timm.create_model("test_resnet", in_chans=1, num_classes=3)
    before = model.pretrained_cfg
    size = before["input_size"]
    tell_timm(model, {"input_size": (1, 72, 72), "mean": (0.5,)})
    assert before["input_size"] == size
    assert model.pretrained_cfg["input_size"] == (3, 72, 72)
    assert model.default_cfg is model.pretrained_cfg
    base = identify(model)
    assert base is not None
    assert (base.name, base.kwargs, base.input_size) == (
        "test_resnet.r160_in1k",
        {"num_classes": 3, "in_chans": 1},
        (1, 72, 72),
    )
    tell_timm(plain := net(), {"mean": (0.5,)})
    assert not hasattr(plain, "pretrained_cfg")


def test_a_trial_tells_of_a_head_that_it_threw_away(folders: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    config = TryConfig(layers="0", type="sekg", steps=1, seeds=1, rates=(1e-3,), max_time=60.0)
    told: list[str] = []
    answer = try_conversion(
        model, lambda seed: task_of(folders, input_size=(3, 32, 32)), tmp_path / "out", config, tell=told.append
    )
    given = (
        "both networks were given new, untrained parameters to fit the task: 3.weight, 3.bias (3 outputs instead of 5)"
    )
    assert f"WARNING: {given}" in told
    assert given in answer.notes
