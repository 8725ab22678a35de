"""Dynamic layers switched off, and turned back into plain convolutions."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import SelectionError, UnsupportedLayerError
from surgeon.records.recipe import Rule, get_recipe
from surgeon.surgery.rewrite import dynamic_layers
from tests.support.fake_conversions import X, evaluated, fakes, small
from tests.support.fake_layer import FakeConv2d

pytestmark = pytest.mark.usefixtures("fake_type")


def disturbed(model: nn.Module, kind: str, layers: str = "all", x: Tensor = X, **options: Any) -> nn.Module:
    """Converted, with all new parameters moved: no longer the original."""
    converted, _ = surgeon.convert(model, layers=layers, type=kind, example_inputs=x, **options)
    with torch.no_grad():
        for layer in dynamic_layers(converted).values():
            for _, p in layer.new_parameters():
                p.add_(0.3 * torch.randn_like(p))
    return converted


def test_static_disables_the_dynamic_part_and_comes_back() -> None:
    converted = disturbed(small(), "fake")
    dynamic = evaluated(converted)
    with surgeon.static(converted) as model:
        plain = evaluated(model)
        assert not torch.allclose(plain, dynamic)
        with surgeon.static(converted, "0"):
            assert torch.equal(evaluated(converted), plain)
        assert torch.equal(evaluated(converted), plain)
    assert torch.equal(evaluated(converted), dynamic)
    with pytest.raises(KeyError), surgeon.static(converted, ["0"]):
        raise KeyError([layer.adaptive for layer in dynamic_layers(converted).values()])
    assert all(layer.adaptive for layer in dynamic_layers(converted).values())
    with (
        pytest.raises(SelectionError, match="'9' is not a dynamic layer of this model; there are: 0, 2"),
        surgeon.static(converted, "9"),
    ):
        pass


@pytest.mark.parametrize("kind", ["acda", "pafu", "sekg", "fake"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": 1, "stride": 2, "bias": False},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": (2, 0), "groups": 2, "dilation": 2},
    ],
)
def test_revert_gives_the_plain_convolution_back(kind: str, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, **options), nn.Conv2d(4, 2, 3))
    x = torch.randn(2, 4, 13, 16)
    converted, _ = surgeon.convert(model, layers="all", type=kind, example_inputs=x)
    reverted = surgeon.revert(copy.deepcopy(converted))
    assert [type(m) for m in reverted] == [nn.Conv2d, nn.Conv2d]
    assert reverted[0].kernel_size == (3, 3)
    assert torch.allclose(evaluated(reverted, x), evaluated(model, x), atol=1e-5)
    recipe = get_recipe(reverted)
    assert recipe is not None
    assert recipe.rules == ()


@pytest.mark.parametrize("kind", ["acda", "pafu"])
def test_revert_after_training_keeps_the_static_part(kind: str) -> None:
    x = torch.randn(2, 4, 13, 16)
    converted = disturbed(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, stride=2)), kind, x=x)
    with surgeon.static(converted):
        expected = evaluated(converted, x)
    reverted = surgeon.revert(converted)
    assert isinstance(reverted[0], nn.Conv2d)
    assert torch.allclose(evaluated(reverted, x), expected, atol=1e-4)


def test_revert_takes_names_and_knows_same_padding() -> None:
    model = nn.Sequential(timm.layers.Conv2dSame(3, 4, 3, stride=2), nn.Conv2d(4, 4, 2, padding="same"))
    converted, _ = fakes(model)
    assert surgeon.revert(converted, "0") is converted
    assert isinstance(converted[0], timm.layers.Conv2dSame)
    assert isinstance(converted[1], FakeConv2d)
    recipe = get_recipe(converted)
    assert recipe is not None
    assert [r.layers for r in recipe.rules] == ["1"]
    surgeon.revert(converted)
    assert converted[1].padding == "same"
    assert torch.allclose(evaluated(converted), evaluated(model), atol=1e-6)
    with pytest.raises(SelectionError, match="nothing to revert"):
        surgeon.revert(converted)


def test_a_reverted_standardized_convolution_is_in_the_recipe() -> None:
    model = nn.Sequential(timm.layers.StdConv2d(3, 4, 3))
    converted, _ = fakes(model)
    recipe = get_recipe(surgeon.revert(converted))  # the base model alone would standardize the weight again
    assert recipe is not None
    assert recipe.rules == (Rule(layers="0", type="conv", options={"window": [3, 3]}),)
    assert torch.allclose(evaluated(converted), evaluated(model), atol=1e-6)


def test_what_is_not_one_convolution_does_not_revert(monkeypatch: pytest.MonkeyPatch) -> None:
    converted, _ = fakes(small(), "0,2")
    monkeypatch.setattr(FakeConv2d, "static_conv2d", lambda self, x: F.conv2d(x, self.kernel).abs())
    with pytest.raises(UnsupportedLayerError, match=r"0 \(fake\) does not revert to one convolution"):
        surgeon.revert(converted)
    assert list(dynamic_layers(converted)) == ["0", "2"]


def test_all_layers_that_do_not_revert_are_named_and_how_the_others_do() -> None:
    """As of a trained denoiser: static kernels of a dense SEKG that left their center see zeros between its convolutions."""
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    converted, _ = surgeon.convert(model, layers="0,2", type="sekg", input_size=(4, 8, 8))
    converted, _ = surgeon.convert(converted, layers="1", type="acda", input_size=(4, 8, 8))
    with torch.no_grad():
        for layer in (converted[0], converted[2]):
            layer.dconv.static.add_(0.01)
    told = r"^0 \(sekg\) does not revert to one convolution: .* two convolutions, .*; nor do 2; '1' reverts the others$"
    with pytest.raises(UnsupportedLayerError, match=told):
        surgeon.revert(converted)
    assert list(dynamic_layers(converted)) == ["0", "1", "2"]
    assert list(dynamic_layers(surgeon.revert(converted, "1"))) == ["0", "2"]
