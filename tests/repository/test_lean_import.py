"""Importing starts nothing: no torch for the package and its command line, no GPU, and an answer at once."""

import os
import subprocess
import sys

import pytest

import surgeon
from tests.support.places import ROOT


def run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("module", ["surgeon", "surgeon.cli", "surgeon.errors"])
def test_importing_loads_no_heavy_library(module: str) -> None:
    heavy = {"torch", "torchvision", "timm", "numpy", "scipy", "optuna", "rich", "safetensors", "PIL"}
    done = run(f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


def test_help_of_every_command_is_there_at_once() -> None:
    """No heavy library is loaded, and the process takes at most 0.3 s of processor time (it takes 0.08 s)."""
    code = """
import argparse, sys, time
from surgeon.cli import _parser, main

(commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
assert len(commands.choices) >= 19
assert main(["--help"]) == 0
print("once", time.process_time())
for name in commands.choices:
    assert main([name, "--help"]) == 0
print("loaded", sorted({"torch", "numpy", "optuna", "rich", "timm"} & set(sys.modules)))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    told = [line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("once ", "loaded "))]
    assert float(dict(told)["once"]) <= 0.3
    assert dict(told)["loaded"] == "[]"


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
