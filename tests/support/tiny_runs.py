"""A tiny converted model, saved: what the tests of checkpoints share."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from surgeon.layers.registry import layer_class
from surgeon.surgery.rewrite import Rewrite
from tests.support.places import ROOT

X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def with_dynamic(model: nn.Module, *names: str, kind: str = "pafu", **options: Any) -> nn.Module:
    """The model with these convolutions replaced, which is all that a checkpoint needs of a conversion."""
    cls = layer_class(kind)
    config = cls.Config.from_dict(options)
    return Rewrite(model, {name: cls.from_conv(model.get_submodule(name), config) for name in names}).apply()


def tiny(**options: Any) -> nn.Module:
    model = timm.create_model("test_resnet", **options).eval()
    return with_dynamic(model, "layer3.0.conv2", "layer4.0.conv1", group_size=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run_python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
