"""A converted timm model works like one: its methods, training, EMA, DDP, compilation."""

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import surgeon
from surgeon.layers.registry import layer_types
from surgeon.surgery.rewrite import dynamic_layers

TYPES = layer_types()
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def evaluated(model: nn.Module, x: Any = X) -> Any:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


@pytest.fixture(scope="module", params=TYPES)
def resnet(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=7, zero_init_last=False)
    converted, _ = surgeon.convert(model, layers="stage1,stage2", type=request.param, example_inputs=X)
    return model, converted


def test_timm_methods_work(resnet: tuple[Any, Any]) -> None:
    model, converted = (copy.deepcopy(m).eval() for m in resnet)
    with torch.no_grad():
        assert torch.allclose(converted.forward_features(X), model.forward_features(X), atol=1e-4)
        assert converted.feature_info == model.feature_info
        assert converted.get_classifier().out_features == 7
        converted.reset_classifier(3)
        assert converted(X).shape == (2, 3)
        finals, taps = converted.forward_intermediates(X)
        assert len(taps) == 5
        assert finals.shape[1] == converted.num_features


def test_grad_checkpointing_trains(resnet: tuple[Any, Any]) -> None:
    converted = copy.deepcopy(resnet[1])
    converted.set_grad_checkpointing(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted.train()(X).sum().backward()
    assert all(p.grad is not None for p in converted.layer1.parameters())


def test_two_steps_change_every_new_parameter(resnet: tuple[Any, Any]) -> None:
    converted = copy.deepcopy(resnet[1]).train()
    new = {
        f"{name}.{local}": p for name, layer in dynamic_layers(converted).items() for local, p in layer.new_parameters()
    }
    before = {name: p.detach().clone() for name, p in new.items()}
    optimizer = torch.optim.Adam(converted.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(converted(X), torch.tensor([1, 5]))
        extras = [extra for m in dynamic_layers(converted).values() if (extra := m.regularization()) is not None]
        (loss + sum(extras, torch.zeros(()))).backward()
        optimizer.step()
    assert [name for name, p in new.items() if torch.equal(p, before[name])] == []


def test_ema_deepcopy_channels_last_and_autocast(resnet: tuple[Any, Any]) -> None:
    _, converted = (copy.deepcopy(m).eval() for m in resnet)
    expected = evaluated(converted)
    ema = timm.utils.ModelEmaV3(converted, decay=0.9)
    ema.update(converted)
    assert torch.allclose(evaluated(ema.module), expected, atol=1e-6)
    last = copy.deepcopy(converted).to(memory_format=torch.channels_last)
    assert torch.allclose(evaluated(last, X.contiguous(memory_format=torch.channels_last)), expected, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = evaluated(converted)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_state_dict_goes_round(resnet: tuple[Any, Any]) -> None:
    _, converted = resnet
    twin = copy.deepcopy(converted)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    twin.load_state_dict(converted.state_dict())
    assert torch.equal(evaluated(twin), evaluated(converted))


def test_ddp_trains(resnet: tuple[Any, Any], tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(resnet[1]).train())
            wrapped(X).sum().backward()
        assert all(p.grad is not None for p in wrapped.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", TYPES)
def test_compiled_models_compute_the_same(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 4, 1))
    converted, _ = surgeon.convert(model, layers="2", type=kind, example_inputs=X)
    converted.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(X), converted(X), atol=1e-5)
    torch.compiler.reset()


def test_features_only_models() -> None:
    model = timm.create_model("resnet10t", features_only=True, out_indices=(1, 2))
    converted, report = surgeon.convert(model, layers="stage2", type="acda", example_inputs=X)
    assert [r.name for r in report.replaced] == ["layer2.0.conv1", "layer2.0.conv2"]
    assert converted.feature_info.channels() == model.feature_info.channels()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(evaluated(model), evaluated(converted), strict=True))


FAMILIES = {  # name → all convolutions, how many of them are spatial, and a type (the slow tier has every type)
    "coat_tiny": (21, 20, "pafu"),
    "mobilevitv2_050": (64, 10, "sekg"),
    "tf_efficientnet_b0": (81, 17, "acda"),
    "convnext_atto": (40, 16, "acda"),
    "efficientvit_b0": (50, 16, "pafu"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    convolutions, spatial, kind = FAMILIES[name]
    options: dict[str, Any] = {"img_size": 64} if name.startswith("coat") else {}
    model = timm.create_model(name, num_classes=5, **options)
    converted, report = surgeon.convert(model, layers="all", type=kind, input_size=64)
    assert len(report.replaced) == spatial
    assert len(report.replaced) + len(report.skipped) == convolutions
    assert type(converted) is type(model)
    assert report.max_rel_error is not None
    assert report.max_rel_error <= 1e-5 or report.precision == "float64"
