"""Importing starts nothing: no torch for the package and its command line, no GPU, and an answer at once."""

import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import surgeon
from surgeon.util.declared import training_defaults
from tests.support.places import ROOT


def run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("module", ["surgeon", "surgeon.cli", "surgeon.errors"])
def test_importing_loads_no_heavy_library(module: str) -> None:
    heavy = {"torch", "torchvision", "timm", "numpy", "scipy", "optuna", "matplotlib", "safetensors", "PIL"}
    done = run(f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


def test_help_of_every_command_is_there_at_once() -> None:
    """No heavy library is loaded, and the process takes at most twenty times what an empty one takes (0.3 s of 15 ms)."""
    code = """
import time
print("empty", time.process_time())
import argparse, sys
from surgeon.cli import _parser, main

(commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
assert len(commands.choices) >= 19
assert main(["--help"]) == 0
print("once", time.process_time())
for name in commands.choices:
    assert main([name, "--help"]) == 0
print("loaded", sorted({"torch", "numpy", "optuna", "matplotlib", "timm"} & set(sys.modules)))
"""
    shares: list[float] = []
    while len(shares) < 3 and min(shares, default=100.0) > 20:  # other processes disturb
        done = run(code)
        assert done.returncode == 0, done.stderr
        told = dict(
            line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("empty ", "once ", "loaded "))
        )
        assert told["loaded"] == "[]"
        shares.append(float(told["once"]) / float(told["empty"]))
    assert min(shares) <= 20


WRONG = {
    "evalute": "there is no command 'evalute'; .* Did you mean 'evaluate'",
    "convert resnet18 --layes x": "there is no option --layes. Did you mean '--layers'",
    "convert resnet18 --type pafo": "unknown layer type 'pafo'; there are acda, pafu, sekg. Did you mean 'pafu'",
    "convert resnet18 --type pafu --option group_sise=3": "'group_sise' is no option of pafu .* Did you mean 'group_size'",
    "convert resnet18 --type acda -n 4": r"--group-size \(-n\) is no option of acda layers but of pafu; acda has atoms",
    "convert resnet18 --type acda -m -3": r"acda: --atoms \(-m\) must be at least 1, got -3",
    "convert resnet18 --type pafu --option group_size=1": "pafu: group_size must be at least 2, got 1",
    "convert resnet18 --type pafu --compress": "--compress .* does not apply to pafu",
    "convert resnet18 --type pafu --recipe x.json": "--recipe defines layers, types and options",
    "convert runs/absent --type pafu": "there is no model 'runs/absent'.* does not exist",
    "verify runs/absent": "there is no surgeon folder runs/absent",
    "evaluate resnet18": "--task must be given: resnet18 does not record a task",
    "evaluate resnet18 --task clasification": "unknown task 'clasification'; .* Did you mean 'classification'",
    "finetune resnet18 --task classification": "task classification needs data: --data DIR",
    "finetune resnet18 --task denoising --data nowhere": "--data: there is no folder nowhere",
    "finetune resnet18 --task denoising --data . --task-option patches=3": "no option 'patches'",
    "finetune resnet18 --task denoising --data . --task-option patch=1.5": "patch must be an integer or none, got 1.5",
    "finetune resnet18 --task denoising --data . --task-option input_size=a": "input size: expected",
    "finetune resnet18 --task sad --warmup soon": "--warmup: expected steps",
    "finetune resnet18 --task sad --eval-every 0": "--eval-every must be more than 0, got '0'",
    "finetune resnet18 --task sad --epochs 0": "--epochs: expected a number above 0, got '0'",
    "finetune resnet18 --task sad --max-steps -1": "--max-steps: expected a positive integer, got '-1'",
    "finetune resnet18 --task sad --ema 1": "--ema: expected a number between 0 and 1, such as 0.999, got '1'",
    "finetune resnet18 --task sad --clip nan": "--clip: expected a number of at least 0, got 'nan'",
    "finetune resnet18 --task denoising --data . --task-option sigma=-5": "sigma must be at least 0, got -5",
    "finetune resnet18 --task denoising --data . --task-option val_fraction=1": "must be above 0 and below 1, got 1",
    "finetune resnet18 --task sad --task-option share=1.5": "share must be at least 0 and at most 1, got 1.5",
    "evaluate resnet18 --task denoising --data . --task-option train_limit=0": "train_limit must be at least 1, got 0",
    "finetune resnet18 --task sad --sched cosin": "argument --sched: .* Did you mean 'cosine'",
    "try resnet18 --task sad --max-time soon": "--max-time: expected a time",
    "search runs/absent --task sad": "there is no model 'runs/absent'",
    "search resnet18 --task sad --max-flops +ten": "--max-flops: cannot read '.ten' as a number; .* 4.5G or .10%",
    "place resnet18 --max-params 10%": "--max-params: a budget relative to the original has a sign: .10%",
    "place resnet18 --max-layers 0": "--max-layers: expected a positive integer, got '0'",
    "cost resnet18 --weight-decay -1": "--weight-decay: expected a number of at least 0, got '-1'",
    "gains resnet18 --task sad --steps 0": "--steps must be at least 1, got 0",
    "gains resnet18 --task sad --method probe --seeds 1": "--seeds must be at least 2, got 1",
    "gains resnet18 --task sad --method nqn": "there is no gain method 'nqn'.* Did you mean 'nqm'",
    "search resnet18 --task sad -o s": "there is already a search in s: continue it",
    "inspect mynet.py": "mynet.py is a Python file: name a class or function in it as mynet:NAME",
    "inspect ./own/mynet.py:make": "as own.mynet:make",
    "push run me/x/y": "a repository on the Hub is named ORG/NAME, .* got 'me/x/y'",
    "place resnet18 --max-flops -100%": "'-100%' leaves nothing of the original",
    "study status runs/absent": "there is no search in runs/absent: there is no such folder",
    "study export runs/absent": "there is no search in runs/absent",
    "inspect nowhere_to_be_found:make": "there is no Python module 'nowhere_to_be_found' in this folder",
    "convert resnet18 --type acda --option generator=separabel": "acda: generator must be .* Did you mean 'separable'",
    "finetune resnet18 --task denoising --data . --task-option loss=l3": "task denoising: loss must be one of l1, mse",
    "finetune resnet18 --task denoising --data there.onnx": "--data: there.onnx is a file, not a folder",
    "finetune --recipe srcn": "there is no training recipe 'srcn'; .* Did you mean 'srcnn'",
    "gains resnet18 --task sad --batches 3": "--batches must be at least 4, got 3",
    "visualize run . -o x": "IMAGE: . is a folder; name its pictures",
    "export resnet18 -o there.onnx": "there.onnx exists",
    "finetune resnet18 --task denoising --data . --task-option sigma=55-0": "sigma must be .* a range such as 0-55, got '55-0'",
    "visualize converted there.onnx -o x": "IMAGE: cannot read the image there.onnx: .onnx is not supported .*.png",
    "visualize plain there.onnx -o x": "plain has no dynamic layer: there is nothing to draw",
    "revert plain -o x": "plain has no dynamic layer: there is nothing to revert",
    "collapse plain -o x": "plain has no dynamic layer: there is nothing to collapse",
    "try converted --task sad": "a trial starts .* dynamic layers; it was made of resnet18 --weights own.pth --num-classes 3",
    "place converted --max-flops +5%": "a placement starts from a plain model, and converted has dynamic layers",
    "search converted --task sad": "a search starts from a plain model, and converted has dynamic layers",
    "finetune plain --task sad -o r --resume": "a run must be .* but --lr was 0.5 and is 0.0003. To train its result on, ",
    "finetune plain --task sad -o r --resume --lr 0.1": "a run must be .* but --lr was 0.5 and is 0.1\\. To",
    "finetune converted --task sad -o r --resume --lr 0.5": "but model was 'plain' and is 'converted'\\. To",
    "finetune plain --task sad -o r --resume --lr 0.5 --task-option share=0.5": "but share was 0.1 and is 0.5\\. To",
    "finetune plain --recipe lenet -o r --resume --lr 0.1": "but --lr was 0.5 and is 0.1\\. To",
    "collapse runs/absent --tolerance 0.1 -o x": "--tolerance needs --images",
}


def test_what_is_wrong_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    """Each within half a second of processor time (it takes 0.1 s); importing torch alone takes more than one."""
    (tmp_path / "there.onnx").touch()
    weights = {"kind": "file", "path": "own.pth"}
    base = {"source": "timm", "name": "resnet18", "kwargs": {"num_classes": 3}, "weights": weights}
    rules = [{"layers": "conv1", "type": "conv"}, {"layers": "layer1.0.conv1", "type": "acda"}]
    config = training_defaults() | {"lr": 0.5}
    record = {"model": "plain", "task": "sad", "options": {"share": 0.1}, "config": config}
    for file, values in {
        "s/study.jsonl": {},
        "run/recipe.json": {},
        "plain/recipe.json": {"base": base, "rules": rules[:1]},
        "converted/recipe.json": {"base": base, "rules": rules},
        "r/training/run.json": record,
    }.items():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(json.dumps(values))
    code = f"""
import contextlib, io, os, re, sys, time
from surgeon.cli import main

os.chdir({str(tmp_path)!r})
for call, told in {WRONG!r}.items():
    error, before = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(error):
        code = main(call.split())
    seconds, line = time.process_time() - before, error.getvalue()
    if code != 2 or seconds > 0.5 or line.count("\\n") != 1 or not re.search(told, line):
        print(call, code, seconds, line)
print("torch" in sys.modules, sorted(os.listdir()))
"""
    done = run(code)
    assert done.stdout == "False ['converted', 'plain', 'r', 'run', 's', 'there.onnx']\n", done.stdout + done.stderr


def test_what_is_declared_is_what_is_registered() -> None:
    """The options read from the source are those of the classes, with their types."""
    from surgeon.layers.registry import layer_class, layer_types
    from surgeon.util import declared
    from surgeon.util.limits import choices_of, limits_of, ranges_of
    from surgeon.zoo.tasks import task_class, task_names

    for found, names, config in (
        (declared.layer_types(), layer_types(), lambda name: layer_class(name).Config),
        (declared.tasks(), task_names(), lambda name: task_class(name).config_class),
    ):
        assert sorted(found) == names
        for name, one in found.items():
            kind: Any = config(name)
            hints = typing.get_type_hints(kind)
            assert one.options == {field.name: hints[field.name] for field in dataclasses.fields(kind)}
            assert one.limits == limits_of(kind)
            assert one.choices == choices_of(kind)
            assert one.ranges == ranges_of(kind)
            assert one.compressed == bool(getattr(kind, "compressed", None))


def test_the_public_list_is_sorted_and_complete() -> None:
    assert surgeon.__all__ == sorted(surgeon.__all__)
    assert surgeon.__all__ == [
        "CollapseReport",
        "ConvSite",
        "Cost",
        "Recipe",
        "Report",
        "SurgeonError",
        "__version__",
        "collapse",
        "convert",
        "cost",
        "cost_table",
        "create_task",
        "dynamic_layers",
        "evaluate",
        "export",
        "finetune",
        "from_pretrained",
        "inspect",
        "load",
        "open_model",
        "parameter_groups",
        "push_to_hub",
        "revert",
        "save",
        "static",
        "verify",
    ]
    for name in surgeon.__all__:
        assert getattr(surgeon, name) is not None
    assert dir(surgeon) == surgeon.__all__
    with pytest.raises(AttributeError, match="no attribute 'transmogrify'"):
        _ = surgeon.transmogrify
