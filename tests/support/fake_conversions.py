"""Conversions to the fake layer (`tests.support.fake_layer`), of which the fixture `fake_type` makes a type."""

import copy
from typing import Any

import torch
from torch import nn

import surgeon

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    )


def fakes(model: nn.Module, layers: str = "all", **options: Any) -> tuple[nn.Module, surgeon.Report]:
    return surgeon.convert(model, layers=layers, type="fake", example_inputs=options.pop("x", X), **options)


def evaluated(model: nn.Module, x: Any = X) -> Any:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)
