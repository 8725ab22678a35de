"""Importing starts nothing: no torch for the package and its command line, no GPU, and an answer at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import surgeon

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("module", ["surgeon", "surgeon.cli", "surgeon.errors"])
def test_importing_loads_no_heavy_library(module: str) -> None:
    heavy = {"torch", "torchvision", "timm", "numpy", "scipy", "optuna", "rich", "safetensors", "PIL"}
    done = run(f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


def test_help_loads_no_heavy_library() -> None:
    done = run(
        "import sys\nfrom surgeon.cli import main\nmain(['convert', '--help'])\nassert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


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
        "inspect",
        "load",
        "open_model",
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
