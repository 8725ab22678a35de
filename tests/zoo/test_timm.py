"""The zoo's classifiers as timm models: what timm's own tests ask of one.

TorchScript is not among it: dynamic layers run custom operators and carry their geometry as objects, which TorchScript does not
compile; timm's `scriptable` mode is refused by `torch.jit.script` itself. `torch.fx`, `torch.compile` and `torch.export` are the
ways to a graph.
"""

import copy
import functools
import json
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from torch import nn

import surgeon.zoo  # registers its classifiers
from surgeon.layers.base import DynamicConv2d
from surgeon.sites.trace import trace_graph
from surgeon.zoo.classifiers import default_cfgs
from tests.support.places import ROOT

NAMES = sorted(default_cfgs)
QUICK = ["ad_resnet_s", "lenet", "lenet_acda", "resnet20_cifar"]
FEATURES: dict[str, tuple[list[int], list[int]]] = {
    "ad_resnet_s": ([64, 64, 128, 256, 512], [2, 4, 8, 16, 32]),
    "lenet_acda": ([6, 16], [2, 4]),
    "resnet20_cifar": ([16, 32, 64], [1, 2, 4]),
}


def each(names: list[str]) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@functools.cache
def _built(name: str) -> nn.Module:
    return timm.create_model(name)


def fresh(name: str) -> nn.Module:
    """A copy of a model that is built once: surgery takes seconds."""
    return copy.deepcopy(_built(name))


def side(name: str) -> int:
    return min(int(default_cfgs[name]["input_size"][-1]), 64)


def test_all_are_registered() -> None:
    assert set(NAMES) <= set(timm.list_models())
    assert {
        "ad_resnet_s",
        "ad_resnet_m",
        "ad_resnet_l",
        "pafu_resnet50",
        "pafu_resnet101",
        "pafu_resnet110_cifar",
    } <= set(NAMES)
    assert timm.list_pretrained("ad_resnet*") == []


@pytest.mark.parametrize("name", each(NAMES))
def test_forward_backward_and_configuration(name: str) -> None:
    model = fresh(name)
    cfg = model.default_cfg
    state = model.state_dict()
    assert cfg["architecture"] == name
    assert model.num_classes == cfg["num_classes"]
    assert f"{cfg['classifier']}.weight" in state
    assert any(key.startswith(cfg["first_conv"]) for key in state)
    size = side(name)
    out = model(torch.rand(2, 3, size, size))
    assert out.shape == (2, cfg["num_classes"])
    out.mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("name", each(NAMES))
def test_head_can_be_changed(name: str) -> None:
    model = timm.create_model(name, num_classes=7).eval()
    x = torch.rand(1, 3, side(name), side(name))
    with torch.no_grad():
        assert model(x).shape == (1, 7)
        features = model.forward_features(x)
        assert features.shape[1] == model.num_features
        torch.testing.assert_close(model.forward_head(features), model(x))
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        head = model.get_classifier()
        assert isinstance(head, nn.Linear)
        assert model.get_submodule(model.default_cfg["classifier"]) is head
        model.reset_classifier(3)
        assert model(x).shape == (1, 3)
        assert model.num_classes == 3
        model.reset_classifier(0)
        assert model(x).shape == (1, model.head_hidden_size)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), model.forward_features(x))
        unpooled = timm.create_model(name, num_classes=0, global_pool="").eval()
        assert unpooled(x).shape == features.shape


@pytest.mark.parametrize("name", FEATURES)
def test_features_only(name: str) -> None:
    model = timm.create_model(name, features_only=True)
    channels, reductions = FEATURES[name]
    assert model.feature_info.channels() == channels
    assert model.feature_info.reduction() == reductions
    size = side(name)
    maps = model.eval()(torch.rand(1, 3, size, size))
    assert [m.shape[1] for m in maps] == channels
    if name != "lenet_acda":  # which does not pad
        assert [m.shape[-1] for m in maps] == [size // r for r in reductions]
    last = timm.create_model(name, features_only=True, out_indices=(-1,))
    assert last.feature_info.channels() == channels[-1:]


@pytest.mark.parametrize("name", [n if n == "lenet" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_features_of_all(name: str) -> None:
    """timm's test of `features_only`: as many maps as told, of the channels and, where the network pads, the sizes told.

    Slow but for LeNet: `test_features_only` has the others of the quick ones.
    """
    model = timm.create_model(name, features_only=True).eval()
    size = side(name)
    with torch.no_grad():
        maps = model(torch.rand(1, 3, size, size))
    assert len(maps) == len(model.feature_info)
    for found, channels, reduction in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert found.shape[1] == channels
        assert not torch.isnan(found).any()
        if not name.startswith("lenet"):
            assert found.shape[-1] == size // reduction


RESNETS = [name for name in NAMES if name.startswith(("ad_resnet", "pafu_resnet50", "pafu_resnet101"))]


@pytest.mark.parametrize("name", each(RESNETS))
def test_intermediates(name: str) -> None:
    """timm's test of `forward_intermediates`, for what is a timm ResNet: the maps told, the last of them the model's features."""
    model = fresh(name).eval()
    x = torch.rand(1, 3, side(name), side(name))
    with torch.no_grad():
        output, maps = model.forward_intermediates(x)
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        assert [side(name) // m.shape[-1] for m in maps] == [info["reduction"] for info in model.feature_info]
        torch.testing.assert_close(output, model.forward_features(x))
        only = model.forward_intermediates(x, indices=(-1,), intermediates_only=True)
    torch.testing.assert_close(only[0], maps[-1])


@pytest.mark.parametrize("name", ["ad_resnet_s", "resnet20_cifar"])
def test_features_are_those_of_the_whole_model(name: str) -> None:
    """The wrapper runs the modules in their order: nothing that only the forward method does is lost."""
    model = fresh(name).eval()
    features = timm.create_model(name, features_only=True, out_indices=(-1,)).eval()
    features.load_state_dict({k: v for k, v in model.state_dict().items() if k in features.state_dict()})
    x = torch.rand(1, 3, side(name), side(name))
    with torch.no_grad():
        torch.testing.assert_close(features(x)[0], model.forward_features(x))


@pytest.mark.parametrize("name", ["ad_resnet_s", "resnet20_cifar"])
def test_gradient_checkpointing(name: str) -> None:
    model = fresh(name)
    x = torch.rand(2, 3, side(name), side(name))
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.eval()(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("name", ["ad_resnet_s", "lenet_acda", "resnet20_cifar"])
def test_fx_backward(name: str) -> None:
    """timm's: every parameter of the traced model gets a gradient, the same as the model's."""
    model = fresh(name).eval()
    graph = trace_graph(model)
    x = torch.rand(1, 3, side(name), side(name))
    gradients = []
    for run in (model, graph):
        model.zero_grad()
        run(x).square().mean().backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == {key for key, _ in model.named_parameters()}
    assert set(gradients[1]) == set(gradients[0])
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["lenet_acda", "ad_resnet_s"])
def test_torchscript_is_refused_and_documented(name: str) -> None:
    """No TorchScript: it fails when it compiles, not with a wrong result, and the document says so."""
    with pytest.raises((RuntimeError, OSError)):
        torch.jit.script(fresh(name).eval())
    text = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert "TorchScript, which cannot compile the dynamic layers' operators" in " ".join(text.split())


@pytest.mark.parametrize("name", ["ad_resnet_s", "lenet_acda", "resnet20_cifar"])
def test_fx(name: str) -> None:
    model = fresh(name).eval()
    graph = trace_graph(model)
    x = torch.rand(1, 3, side(name), side(name))
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x))
    leaves = [n for n, m in graph.named_modules() if isinstance(m, DynamicConv2d)]
    assert len(leaves) == sum(isinstance(m, DynamicConv2d) for m in model.modules())


@pytest.mark.parametrize("name", ["ad_resnet_s", "resnet20_cifar", "lenet_acda"])
def test_channels_rates_and_groups(name: str) -> None:
    model = timm.create_model(name, in_chans=1, drop_rate=0.5).eval()
    assert model(torch.rand(1, 1, side(name), side(name))).shape[0] == 1
    assert model.drop_rate == 0.5
    patterns = model.group_matcher()
    assert set(patterns) == {"stem", "blocks"}


def test_stochastic_depth() -> None:
    model = timm.create_model("ad_resnet_s", drop_path_rate=0.1)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates[-1] == pytest.approx(0.1)
    assert len(rates) == 7


def test_a_wrong_option_is_told() -> None:
    from surgeon.errors import ConfigError

    with pytest.raises(ConfigError, match="'resnet20_cifar' cannot be built with widht=3"):
        surgeon.zoo.create("resnet20_cifar", widht=3)


@pytest.mark.slow
def test_loads_in_another_process(tmp_path: Any) -> None:
    """`import surgeon.zoo` is all that timm needs."""
    code = "import timm, surgeon.zoo, json; print(json.dumps(timm.list_models('ad_resnet_?')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["ad_resnet_l", "ad_resnet_m", "ad_resnet_s"]


@pytest.mark.parametrize("name", ["lenet_acda", "resnet20_cifar", pytest.param("ad_resnet_s", marks=pytest.mark.slow)])
def test_a_timm_made_model_is_known_again(name: str, tmp_path: Any) -> None:
    """Saved without being told what it is."""
    import surgeon

    model = timm.create_model(name, num_classes=5).eval()
    surgeon.save(model, tmp_path / "run")
    base = json.loads((tmp_path / "run" / "recipe.json").read_text())["base"]
    assert (base["source"], base["name"]) == ("zoo", name)
    x = torch.rand(1, 3, side(name), side(name))
    with torch.no_grad():
        assert torch.equal(surgeon.load(tmp_path / "run")(x), model(x))
