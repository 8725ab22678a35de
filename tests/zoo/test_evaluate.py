"""surgeon.zoo.evaluate and `surgeon evaluate`: the right numbers, the same every time, beside the original's."""

import json
import runpy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import Tensor, nn

import surgeon
from surgeon.cli import main
from surgeon.commands.evaluate import _layers, _one_filter
from surgeon.errors import ConfigError, DataError, InputError
from surgeon.surgery.rewrite import dynamic_layers
from surgeon.util.machine import tell_slow_bfloat16
from surgeon.zoo.evaluate import evaluate
from surgeon.zoo.finetune import FinetuneConfig, Source
from surgeon.zoo.finetune.networks import original_of
from surgeon.zoo.tasks import create_task, registry, task_names
from tests.support.fake_task import BrightnessTask
from tests.support.layers.contract import awaken

CONVERT = ["convert", "test_resnet", "--weights", "random", "--num-classes", "5", "--input-size", "64", "--quiet"]


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task_names()  # fill the registry first
    monkeypatch.setitem(registry._TASKS, "brightness", BrightnessTask)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return


class Reader(nn.Module):
    """Reads the class off the mean, as the task makes it; wrong on `wrong` classes."""

    num_classes = 5
    modes: ClassVar[list[bool]] = []  # of all calls: the state of a module is as before after an evaluation

    def __init__(self, wrong: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.wrong = wrong
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        Reader.modes.append(self.training)
        self.norm(x)
        found = (x.mean((1, 2, 3)) / 2).round().long()
        for label in self.wrong:
            found = torch.where(found == label, (label + 1) % 5, found)
        return nn.functional.one_hot(found, 5).float()


# --- the function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize(("wrong", "accuracy"), [((), 1.0), ((3,), 0.8), ((0, 4), 0.6)])
def test_metrics_are_those_of_the_whole_split(batch_size: int, wrong: tuple[int, ...], accuracy: float) -> None:
    task = create_task("brightness", samples=20)
    found = evaluate(Reader(wrong), task, batch_size=batch_size)
    assert found["accuracy"] == pytest.approx(accuracy)
    right, off = -torch.eye(5).log_softmax(1)[0, 0], -torch.eye(5).log_softmax(1)[0, 1]
    assert found["loss"] == pytest.approx(float(accuracy * right + (1 - accuracy) * off), rel=1e-5)


def test_an_evaluation_leaves_no_trace() -> None:
    model = Reader().train()
    model.norm.eval()
    Reader.modes.clear()
    before, state = model.norm.running_mean.clone(), torch.random.get_rng_state()
    evaluate(model, create_task("brightness"), batch_size=8)
    assert model.modes == [False] * 3
    assert (model.training, model.norm.training) == (True, False)
    assert torch.equal(model.norm.running_mean, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_two_evaluations_agree_whatever_was_drawn_before() -> None:
    model = timm.create_model("test_resnet", num_classes=5, drop_rate=0.5)
    task = create_task("brightness", seed=3)
    first = evaluate(model, task)
    torch.rand(1)
    assert evaluate(model, task) == first
    assert evaluate(model, create_task("brightness", seed=4))["loss"] != first["loss"]
    assert evaluate(model, task, split="train")["loss"] != first["loss"]


def test_amp_and_progress() -> None:
    model, task = timm.create_model("test_resnet", num_classes=5), create_task("brightness", samples=4)
    seen: list[tuple[str, int, int]] = []
    low = evaluate(model, task, batch_size=2, amp="bfloat16", progress=lambda *told: seen.append(told))
    assert seen == [("evaluate", 0, 2), ("evaluate", 1, 2), ("evaluate", 2, 2)]
    exact = evaluate(model, task, batch_size=2)
    assert low["loss"] != exact["loss"]
    assert low["loss"] == pytest.approx(exact["loss"], rel=0.05)


@pytest.mark.parametrize("supported", [True, False])
def test_a_cpu_that_emulates_bfloat16_is_told_once(
    supported: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with AVX2 an ordinary convolution took 20 times as long as in float32."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    tell_slow_bfloat16.cache_clear()
    for _ in range(2):
        evaluate(Reader(), create_task("brightness", samples=4), amp="bfloat16", device="cpu")
    tell_slow_bfloat16.cache_clear()
    told = [message for message in caplog.messages if "this CPU has no instructions for bfloat16" in message]
    assert len(told) == (not supported)


def test_what_cannot_be_evaluated_is_one_clear_error() -> None:
    model, task = Reader(), create_task("brightness")
    with pytest.raises(ConfigError, match="amp must be one of float16, bfloat16, got 'half'"):
        evaluate(model, task, amp="half")
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        evaluate(model, task, batch_size=0)
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        evaluate(model, task, device="gpu")
    with pytest.raises(ConfigError, match="cuda:99 not found"):
        evaluate(model, task, device="cuda:99")
    with pytest.raises(InputError, match=r"Linear does not run on a batch \(20, 3, 64, 64\) of task brightness"):
        evaluate(nn.Linear(7, 5), task)
    told = r"Its weights are torch.float64, and tasks are for torch.float32: call .float\(\) on it"
    with pytest.raises(InputError, match=told):
        evaluate(Reader().double(), task)
    with pytest.raises(DataError, match="the val split has no samples"):
        evaluate(model, create_task("brightness", samples=0))


# --- the command --------------------------------------------------------------------------------------------------


def converted(kind: str = "acda", *, change: bool = False) -> None:
    assert main([*CONVERT, "--layers", "stage4", "--type", kind, "-o", "run", "--json"]) == 0
    if change:
        model = surgeon.load("run")
        for layer in dynamic_layers(model).values():
            awaken(layer)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
        surgeon.save(model, "run", force=True)


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def test_the_original_stands_beside_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    converted()
    capsys.readouterr()
    assert main(["evaluate", "run", "--task", "brightness", "--json", "--quiet"]) == 0
    same = document(capsys)
    assert same["metrics"]["loss"] == pytest.approx(same["original"]["metrics"]["loss"], rel=1e-5)
    assert same["original"]["model"] == "test_resnet"
    assert same["params"] > same["original"]["params"]
    assert same["flops"] > same["original"]["flops"]
    assert same["input_size"] == [3, 64, 64]
    assert (same["samples"], same["primary"]) == (20, "accuracy")
    (note,) = same["notes"]
    assert note.startswith("one filter at every pixel in layer4.0.conv1, layer4.0.conv2: ")
    converted_again = surgeon.load("run")
    assert same["metrics"] == evaluate(converted_again, create_task("brightness"))
    assert same["flops"] == surgeon.cost(converted_again, mode="infer", input_size=64).flops


def test_the_table_is_80_columns_wide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CONVERT, "--layers", "stage4", "--type", "pafu", "-o", "run", "--json"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "run", "--task", "brightness", "--limit", "6", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("run: brightness, 6 samples of val\n")
    assert max(map(len, out.splitlines())) <= 80
    assert out.isascii()
    assert main(["evaluate", "run", "--task", "brightness", "--limit", "1", "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("run: brightness, 1 sample of val\n")
    rows = [line.split()[0] for line in out.splitlines() if line[:1].isalpha() and " " in line]
    assert rows[1:5] == ["accuracy*", "loss", "parameters", "FLOPs"]
    assert "* decides, higher is better" in out


def test_a_small_distance_is_not_shown_as_zero() -> None:
    layer = {"name": "conv", "type": "acda", "content": 0.5, "saturated": 0.0, "distance": 8e-6}
    assert _layers([layer], 80).splitlines()[-1].split() == ["conv", "acda", "0.500", "0.000", "8e-06"]


def test_layers_with_one_filter_everywhere_are_told() -> None:
    layers = [{"name": name, "distance": value} for name, value in (("a", 0.0), ("b", 8e-6), ("c", None), ("d", 1e-8))]
    told = _one_filter(layers)
    assert told is not None
    assert told.startswith("one filter at every pixel in a, d: nothing adapts there")
    assert _one_filter(layers[1:3]) is None


def test_a_difference_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    converted("sekg", change=True)
    capsys.readouterr()
    assert main(["evaluate", "run", "--task", "brightness", "--json", "--quiet"]) == 0
    found = document(capsys)
    assert abs(found["metrics"]["loss"] - found["original"]["metrics"]["loss"]) > 1e-3


def test_which_original(capsys: pytest.CaptureFixture[str]) -> None:
    converted()
    given = ["evaluate", "run", "--task", "brightness", "--limit", "2", "--json", "--quiet"]
    capsys.readouterr()
    assert main([*given, "--original", "none"]) == 0
    assert document(capsys)["original"] is None
    assert main([*given, "--original", "test_efficientnet", "--original-weights", "random"]) == 0
    found = document(capsys)
    assert found["original"]["model"] == "test_efficientnet"
    assert found["notes"][0] == "test_efficientnet has random weights (seed 0)"
    assert "test_efficientnet was given new, untrained parameters" in found["notes"][1]
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), "shapes.pth")
    assert main([*given, "--original", "test_resnet", "--original-weights", "shapes.pth"]) == 0, (
        "with the head of the file"
    )
    assert document(capsys)["original"]["model"] == "test_resnet"


MODULE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
"""


def test_the_runs_own_base_by_its_name_has_the_weights_that_were_converted(capsys: pytest.CaptureFixture[str]) -> None:
    """It was a fresh one: a gain over an untrained network under the name of the original."""
    Path("own_base.py").write_text(MODULE)
    make = runpy.run_path("own_base.py")["make"]
    for file in ("own.pth", "other.pth"):
        torch.save(make().state_dict(), file)
    given = ["--layers", "0", "--type", "acda", "--input-size", "16", "-o", "run", "--quiet"]
    assert main(["convert", "own_base:make", "--weights", "own.pth", *given]) == 0
    capsys.readouterr()
    command = ["evaluate", "run", "--trust-factory", "--task", "brightness", "--json", "--quiet"]
    found = {}
    for original in (
        [],
        ["--original", "own_base:make"],
        ["--original", "own_base:make", "--original-weights", "other.pth"],
    ):
        assert main([*command, *original]) == 0
        found[original[-1] if original else "auto"] = document(capsys)
    by_name, other = found["own_base:make"], found["other.pth"]
    assert by_name["original"] == found["auto"]["original"]
    assert by_name["original"]["metrics"]["loss"] == pytest.approx(by_name["metrics"]["loss"], rel=1e-5)
    assert "own_base:make has the weights that were converted" in by_name["notes"]
    assert abs(other["original"]["metrics"]["loss"] - other["metrics"]["loss"]) > 1e-4
    assert f"own_base:make has the weights of {Path('other.pth').resolve()}" in other["notes"]
    Path("theirs.py").write_text(MODULE)
    assert main([*command, "--original", "theirs:make"]) == 0
    told = "theirs:make has the weights that it makes itself; --original-weights FILE loads others"
    assert told in document(capsys)["notes"]


def test_an_original_that_cannot_be_had_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = surgeon.convert(
        timm.create_model("test_resnet", num_classes=5), layers="stage4", type="pafu", input_size=64
    )
    surgeon.save(model, "run")
    arguments = ["evaluate", "run", "--task", "brightness", "--limit", "2", "--json", "--quiet"]
    assert main(arguments) == 0
    found = document(capsys)
    assert found["original"] is None
    assert "came from a model object and are not recorded" in found["notes"][0]
    assert main([*arguments[:-2], "--quiet"]) == 0
    assert " of val; no original to compare with, see the note\n" in capsys.readouterr().out.replace("\n  ", " ")
    weights = timm.create_model("test_resnet", num_classes=5).state_dict()
    torch.save(weights, "base.pth")
    assert main([*arguments, "--original-weights", "base.pth"]) == 0
    assert document(capsys)["original"]["model"].startswith("test_resnet")
    assert main([*arguments, "--original-weights", "nowhere.pth"]) == 2
    assert "nowhere.pth" in capsys.readouterr().err


def test_of_an_original_of_other_classes_only_the_cost_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), "published.pth")
    command = ["convert", "test_resnet", "--weights", "published.pth", "--layers", "stage4", "--type", "acda"]
    assert main([*command, "--input-size", "64", "-o", "run", "--json"]) == 0
    tuned = create_task("brightness").bind(surgeon.load("run"))
    surgeon.save(tuned, "tuned")
    capsys.readouterr()
    given = ["evaluate", "tuned", "--task", "brightness", "--limit", "2", "--json", "--quiet"]
    for more in ([], ["--original-weights", "published.pth"]):
        assert main([*given, *more]) == 0
        found = document(capsys)
        name = found["original"]["model"]
        assert name.startswith("test_resnet")
        assert f"{name} was given new, untrained parameters to fit the task" in found["notes"][0]
        assert found["notes"][0].endswith("; only its cost is compared")
        assert found["original"]["metrics"] == {}
        assert found["original"]["params"] > 0
        assert found["metrics"].keys() == {"accuracy", "loss"}
    assert main([*given[:-2], "--quiet"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert next(row for row in rows if row[:1] == ["accuracy*"])[2:] == ["-", "-"]
    original, notes = original_of(tuned, create_task("brightness"), None, FinetuneConfig(), Source())
    assert original is not None
    assert notes == []


def test_new_heads_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["evaluate", "test_resnet", "--weights", "random", "--task", "brightness", "--limit", "2", "--json"]
    assert main([*given, "--quiet"]) == 0
    assert document(capsys)["notes"] == [
        "test_resnet was given new, untrained parameters to fit the task: fc.weight, fc.bias (5 outputs instead of 1000)",
        "only 2 samples judge: the metrics say little of other images; a larger val/ tells more",
    ]


def test_an_untrained_head_is_not_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), "published.pth")
    given = ["evaluate", "test_resnet", "--weights", "published.pth", "--task", "brightness", "--limit", "2", "--quiet"]
    assert main(given) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "test_resnet was given new, untrained parameters to fit the task: fc.weight, fc.bias" in error
    assert "there is nothing to evaluate before it is trained (`surgeon finetune` trains it; --weights random" in error


def test_the_head_is_that_of_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), "five.pth")
    given = ["evaluate", "test_resnet", "--weights", "five.pth", "--task", "brightness", "--limit", "2", "--quiet"]
    assert main(given) == 0
    assert "accuracy*" in capsys.readouterr().out
    assert main([*given, "--num-classes", "7"]) == 2
    assert "a head of 5 classes, and the model one of 7" in capsys.readouterr().err


def test_a_recipe_brings_the_size_of_its_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    made = ["convert", "test_resnet", "--weights", "random"]
    assert main([*made, "--layers", "stage4", "--type", "sekg", "--input-size", "64", "-o", "found"]) == 0
    capsys.readouterr()
    assert main([*made, "--recipe", "found/recipe.json", "-o", "again"]) == 0
    out, error = capsys.readouterr()
    assert "convolutions at 64x64" in out
    assert "images of 3x64x64, as in the recipe; --input-size takes others" in error
    assert main([*made, "--recipe", "found/recipe.json", "--input-size", "96", "-o", "other"]) == 0
    assert "convolutions at 96x96" in capsys.readouterr().out


def test_task_options_reach_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    converted()
    capsys.readouterr()
    options = ["--task-option", "samples=3", "--task-option", "contrast=0.5"]
    assert main(["evaluate", "run", "--task", "brightness", *options, "--json", "--quiet"]) == 0
    assert document(capsys)["samples"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "brigtness"], "Did you mean 'brightness'"),
        (["--task", "brightness", "--task-option", "sample=3"], "Did you mean 'samples'"),
        (["--task", "brightness", "--task-option", "contrast=-1"], "contrast must be positive"),
        (["--task", "brightness", "--data", "nowhere"], "--data: there is no folder nowhere"),
        (["--task", "brightness", "--data", "empty"], "empty is empty"),
        (["--task", "brightness", "--original", "resnet999"], "there is no model 'resnet999'"),
    ],
)
def test_wrong_usage_is_one_clear_error(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    converted()
    Path("empty").mkdir()
    capsys.readouterr()
    assert main(["evaluate", "run", *arguments, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
