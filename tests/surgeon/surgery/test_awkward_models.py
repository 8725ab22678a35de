"""Whole models that are awkward in one way or another, each with every layer type. Random weights, no network."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import surgeon
from surgeon.errors import ModelError
from surgeon.layers.registry import layer_types
from surgeon.surgery.rewrite import dynamic_layers

pytestmark = pytest.mark.slow

MODELS: dict[str, int] = {  # convolutions in it
    "resnetv2_50x1_bit": 54,  # 53 weight-standardized
    "dm_nfnet_f0": 81,
    "hrnet_w18_small": 91,
    "densenet121": 120,
    "inception_v4": 149,
    "coat_tiny": 21,  # shared convolutions
    "mobilevitv2_050": 64,  # sliced weights
    "tf_efficientnet_b0": 81,  # Conv2dSame
    "convnext_atto": 40,
    "efficientvit_b0": 50,
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn": 69,
    "torchvision/raft_small": 53,
    "torchvision/deeplabv3_mobilenet_v3_large": 70,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if not name.startswith("torchvision/"):
        return timm.create_model(name)
    options: dict[str, Any] = {} if "raft" in name else {"weights_backbone": None}
    model: nn.Module = torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None, **options)
    return model


@pytest.mark.parametrize("kind", layer_types())
@pytest.mark.parametrize("name", MODELS)
def test_all_spatial_convolutions(name: str, kind: str) -> None:
    model = build(name)
    converted, report = surgeon.convert(model, layers="all", type=kind)
    assert type(converted) is type(model)
    assert len(report.replaced) + len(report.skipped) == MODELS[name]
    assert list(dynamic_layers(converted)) == [r.name for r in report.replaced]
    refused = {s.name: s.reasons for s in report.skipped if s.selected}
    assert refused == {}
    assert max(r.max_rel_error for r in report.replaced) <= 1e-5
    assert report.max_rel_error is not None
    assert report.max_rel_error <= 1e-5 or report.precision == "float64"


@pytest.mark.parametrize("kind", layer_types())
def test_pointwise_convolutions_too(kind: str) -> None:
    model = build("mobilevitv2_050")
    converted, report = surgeon.convert(model, layers="all,k>=1", type=kind, input_size=64)
    refused = {s.name: s.reasons[0] for s in report.skipped}
    assert len(refused) == 9
    assert all("_forward_cross_attn" in reason for reason in refused.values())
    assert len(report.replaced) == 55
    assert type(converted) is type(model)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_is_named_as_the_reason() -> None:
    """It was said to have no convolution, or to run on no input."""
    traced = torch.jit.trace(nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 8, 8))
    for model, said in ((traced, "this is a TorchScript module"), (nn.Sequential(traced), r"contains a .* \(0\)")):
        for call in (surgeon.inspect, lambda model: surgeon.convert(model, "acda", layers="all", input_size=8)):
            with pytest.raises(ModelError, match=rf"{said}.*: give the nn.Module before tracing or scripting"):
                call(model)
