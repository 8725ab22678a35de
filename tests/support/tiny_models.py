"""Small networks by name, and a function that nothing may call."""

from typing import Any

from torch import nn

from surgeon.models.names import build_model
from surgeon.records.recipe import BaseModel

TINY = "test_resnet"


def dangerous() -> nn.Module:
    """A factory, or a function in a pickle, that must not run by itself."""
    raise AssertionError("foreign code ran")


def random_model(name: str, **options: Any) -> tuple[nn.Module, BaseModel]:
    model, base = build_model(name, weights="random", **options)
    assert base is not None
    return model, base
