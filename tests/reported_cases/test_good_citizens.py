"""Dynamic layers under what people do with convolutions: tracing, fusing, adapters, pruning, hooks, writes to the weight."""

from typing import Any

import pytest
import timm
import torch
from timm.models._features_fx import FeatureGraphNet
from timm.models.byobnet import RepVggBlock
from timm.utils.model import reparameterize_model
from torch import Tensor, fx, nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.testing._internal.two_tensor import TwoTensor
from torchvision.models.feature_extraction import create_feature_extractor

import surgeon
from surgeon.cli import main
from surgeon.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    ReadOnlyError,
    SelectionError,
    UnsupportedLayerError,
)
from surgeon.layers import (
    ACDAConfig,
    DynamicConv2d,
    PAFUConfig,
    SEKGConfig,
    fold_batchnorm,
    layer_class,
    layer_types,
)
from surgeon.layers.registry import type_of
from surgeon.records.recipe import get_recipe
from surgeon.sites.inputs import Inputs
from surgeon.surgery.compare import compare
from surgeon.surgery.rewrite import plain_convolution

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("acda", {"atoms": 2}),
    ("acda", {"generator": "separable"}),
    ("pafu", {"group_size": 3}),
    ("sekg", {}),
    ("sekg", {"mode": "factorised"}),
    ("sekg", {"mode": "depthwise"}),
]


def learned(kind: str, bias: bool = True, **options: Any) -> DynamicConv2d:
    """A layer of this type in eval mode whose dynamic part has left its start."""
    groups = 4 if options.get("mode") == "depthwise" else 1
    conv = nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=groups, bias=bias)
    layer = layer_class(kind).from_conv(conv, layer_class(kind).Config(**options)).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return layer


def norm(channels: int) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels).eval()
    for tensor in (bn.weight.data, bn.bias.data, bn.running_mean):
        assert tensor is not None
        tensor.normal_()
    assert bn.running_var is not None
    bn.running_var.uniform_(0.5, 2)
    return bn


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=2e-6 * float(expected.detach().abs().max()))


# --- D: writes to the weight ----------------------------------------------------------------------------------------

PLAIN = nn.Conv2d(4, 8, 3)
WRITES = {
    "a merged adapter": lambda layer: layer.weight.data.add_(1),
    "an augmented assignment": lambda layer: exec("layer.weight.data += 1", {"layer": layer}),
    "new data": lambda layer: setattr(layer.weight, "data", torch.zeros(8, 4, 3, 3)),
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(8, 4, 3, 3))),
    "a new tensor": lambda layer: setattr(layer, "weight", torch.zeros(8, 4, 3, 3)),
    "removal": lambda layer: delattr(layer, "weight"),
    "an init loop": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "weight clipping": lambda layer: layer.weight.clamp_(-1, 1),
    "one element": lambda layer: layer.weight.__setitem__(0, 1),
    "freezing": lambda layer: layer.weight.requires_grad_(False),
    "a gradient hook": lambda layer: layer.weight.register_hook(print),
    "an output argument": lambda layer: torch.mul(PLAIN.weight, 2, out=layer.weight),
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "another convolution's weight": lambda layer: PLAIN.weight.copy_(layer.weight),
    "a scaled kernel": lambda layer: setattr(PLAIN.weight, "data", layer.weight * torch.ones(8, 1, 1, 1)),
    "a fused convolution": lambda layer: fuse_conv_bn_eval(layer, norm(8)),
    "a detector's fuse()": lambda layer: torch.mm(torch.eye(8), layer.weight.view(8, -1)),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(("kind", "options"), KINDS)
@torch.no_grad()
def test_a_write_to_the_weight_of_a_dynamic_layer_says_that_it_would_be_lost(
    kind: str, options: dict[str, Any], write: str
) -> None:
    """D: LoRA merges, fusing, init loops and clipping wrote to a temporary."""
    layer = learned(kind, **options)
    x = torch.randn(1, 4, 9, 9)
    expected = layer(x)
    with pytest.raises(ReadOnlyError, match="fold_batchnorm"):
        WRITES[write](layer)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_weight_of_a_dynamic_layer_can_be_looked_at(kind: str, options: dict[str, Any]) -> None:
    """D: what only reads goes on working, with gradients."""
    layer = learned(kind, **options)
    expected = layer.static_weight().detach()
    assert torch.equal(layer.weight.detach().clone(), expected)
    assert type(layer.weight.square().sum()) is Tensor
    assert layer.weight.data.numpy().shape == tuple(expected.shape)
    layer.weight.square().sum().backward()
    assert any(p.grad is not None for p in layer.parameters())
    x = torch.relu_(nn.functional.conv2d(torch.randn(1, expected.shape[1], 9, 9), layer.weight[:8]))
    assert type(x) is Tensor


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "options"), KINDS)
@torch.no_grad()
def test_a_norm_is_folded_into_a_dynamic_layer(kind: str, options: dict[str, Any], bias: bool) -> None:
    """D: BatchNorm folding: exact with the dynamic part on and off, and the plain convolution that remains."""
    layer, bn = learned(kind, bias, **options), norm(8)
    folded = fold_batchnorm(layer, bn)
    assert isinstance(folded, DynamicConv2d)
    x = torch.randn(2, 4, 9, 9)
    for adaptive in (True, False):
        layer.adaptive = folded.adaptive = adaptive
        assert close(folded(x), bn(layer(x)))
    if folded.static_is_exact():
        assert close(plain_convolution(folded)(x), bn(layer(x)))


def test_a_norm_that_cannot_be_folded_is_refused_with_the_reason() -> None:
    """D: shared generated kernels, training mode, another kind of norm."""
    with pytest.raises(UnsupportedLayerError, match=r"8 channels, .* share 2 generated kernels"):
        fold_batchnorm(learned("sekg", kernel_groups=2), norm(8))
    with pytest.raises(ConfigError, match="eval mode"):
        fold_batchnorm(learned("pafu").train(), norm(8))
    with pytest.raises(ConfigError, match="running statistics can be folded, got GroupNorm"):
        fold_batchnorm(learned("pafu"), nn.GroupNorm(2, 8))
    conv, bn, x = nn.Conv2d(4, 8, 3).eval(), norm(8), torch.randn(1, 4, 9, 9)
    assert close(fold_batchnorm(conv, bn)(x), bn(conv(x)))


@pytest.mark.parametrize("kind", layer_types())
def test_reparameterising_a_converted_network_is_refused(kind: str) -> None:
    """D: timm's reparameterize_model made plain convolutions of the static weights; the dynamic layers were gone."""
    model = nn.Sequential(RepVggBlock(4, 4)).eval()
    converted, _ = surgeon.convert(model, layers="0.conv_kxk.conv", type=kind, example_inputs=torch.randn(1, 4, 8, 8))
    with pytest.raises(ReadOnlyError, match="before converting"):
        reparameterize_model(converted)


# --- K10: options ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_half_written")
def test_every_use_of_an_option_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """K10: of `--option a=1 --option b=2` only the last counted."""
    call = [
        "convert",
        "test_resnet",
        "--layers",
        "stage4",
        "--type",
        "acda",
        "--weights",
        "random",
        "--dry-run",
        "--json",
    ]
    assert main([*call, "--option", "atoms=2", "--option", "scales=1", "basis_size=4"]) == 0
    told = capsys.readouterr().out
    assert '"atoms": 2' in told
    assert '"scales": 1' in told
    for twice in (["--option", "atoms=2", "--option", "atoms=3"], ["--atoms", "2", "--option", "atoms=3"]):
        assert main([*call, *twice]) == 2
        assert "atoms is given" in capsys.readouterr().err


def test_a_config_object_names_the_type() -> None:
    """K10: `type=ACDAConfig(atoms=2)` was a raw TypeError."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8)
    for config in (ACDAConfig(atoms=2), PAFUConfig(group_size=3), SEKGConfig()):
        converted, report = surgeon.convert(model, layers="all", type=config, example_inputs=x)
        assert report.exact
        assert converted[0].type_name == type_of(config)
    with pytest.raises(ConfigError, match="leave out atoms"):
        surgeon.convert(model, layers="all", type=ACDAConfig(), atoms=3, example_inputs=x)
    with pytest.raises(ConfigError, match="unknown layer type 3"):
        surgeon.convert(model, layers="all", type=3, example_inputs=x)


# --- K2, K3: tracing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_symbolic_trace_sees_one_leaf(kind: str, options: dict[str, Any]) -> None:
    """K2: fx.symbolic_trace, with no tracer of ours."""
    model = nn.Sequential(learned(kind, **options), nn.ReLU())
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    x = torch.randn(2, 4, 10, 9)
    assert torch.equal(graph(x), model(x))


def test_feature_extractors_take_a_converted_network() -> None:
    """K2: torchvision's and timm's create_feature_extractor."""
    model = timm.create_model("test_resnet", num_classes=3).eval()
    converted, _ = surgeon.convert(model, layers="layer2,layer3", type="pafu", input_size=32)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = converted.forward_features(x)
        assert torch.equal(create_feature_extractor(converted, {"layer4": "y"})(x)["y"], expected)
        assert torch.equal(FeatureGraphNet(converted, out_indices=(4,))(x)[0], expected)


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace:FutureWarning")
def test_jit_traces_a_dynamic_layer(kind: str, options: dict[str, Any]) -> None:
    """K3: torch.jit.trace, for other image sizes, too."""
    model = nn.Sequential(learned(kind, **options), nn.ReLU())
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(2, 4, 9, 9))
        for shape in ((2, 4, 9, 9), (1, 4, 14, 11)):
            x = torch.randn(shape)
            assert torch.equal(traced(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_draws_a_converted_network(tmp_path: Any) -> None:
    """K3: add_graph on ACDA."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(nn.Sequential(learned("acda")), torch.randn(1, 4, 9, 9))
    assert list(tmp_path.iterdir())


# --- K6: what lies inside ---------------------------------------------------------------------------------------------


def inner(layer: DynamicConv2d) -> dict[str, nn.Module]:
    return {name: m for name, m in layer.named_modules() if isinstance(m, nn.Conv2d | nn.Conv1d)}


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_inner_convolutions_are_called(kind: str, options: dict[str, Any]) -> None:
    """K6: forward hooks on them, forward and backward."""
    layer, calls = learned(kind, **options), []
    x = torch.randn(1, 4, 9, 9, requires_grad=True)
    expected = layer(x)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in inner(layer).items():
        module.register_forward_hook(lambda m, args, out, name=name: kept.update({name: (out, out.clone())}))
        module.register_full_backward_hook(lambda *_, name=name: calls.append(name))
    layer(x).square().sum().backward()
    assert set(kept) == set(inner(layer))
    assert set(calls) >= {name for name in kept if not name.startswith("selector")}, (
        "PAFU's selects without a gradient here"
    )
    assert all(torch.equal(out, then) for out, then in kept.values()), "what a hook was given is changed afterwards"
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_inner_convolutions_can_be_pruned(kind: str, options: dict[str, Any]) -> None:
    """K6: a mask counts in the first step, and in the second."""
    layer = learned(kind, **options)
    for module in inner(layer).values():
        prune.l1_unstructured(module, "weight", 0.5)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        layer.train()(torch.randn(2, 4, 9, 9)).square().mean().backward()
        optimizer.step()
    before = layer.eval()(torch.ones(1, 4, 9, 9))
    for module in inner(layer).values():
        prune.remove(module, "weight")
    assert torch.equal(layer(torch.ones(1, 4, 9, 9)), before)


class Adapted(nn.Module):
    """A low-rank adapter around a convolution, built from its attributes as peft does."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down = nn.Conv2d(
            base.in_channels, 2, base.kernel_size, base.stride, base.padding, base.dilation, bias=False
        )
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        out: Tensor = self.base_layer(x, *args) + self.up(self.down(x))
        return out


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_adapters_inside_of_a_dynamic_layer_learn(kind: str, options: dict[str, Any]) -> None:
    """K6: LoRA on the convolutions of generators and selectors did nothing."""
    layer = learned(kind, **options).train()
    for name, module in inner(layer).items():
        if isinstance(module, nn.Conv2d):
            parent = layer.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Adapted(module))
    layer(torch.randn(2, 4, 9, 9)).square().mean().backward()
    adapters = [m for m in layer.modules() if isinstance(m, Adapted)]
    assert adapters
    assert all(m.up.weight.grad is not None and m.up.weight.grad.any() for m in adapters)


# --- K8: training -----------------------------------------------------------------------------------------------------


def test_converting_in_place_tells_of_optimizers() -> None:
    """K8: an optimizer made before does not know the new parameters."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    _, report = surgeon.convert(model, layers="all", type="pafu", example_inputs=torch.randn(1, 3, 8, 8), inplace=True)
    count = len(list(model.parameters()))
    assert any(f"does not know {count} parameters" in note for note in report.notes)
    _, report = surgeon.convert(
        nn.Sequential(nn.Conv2d(3, 4, 3)), layers="all", type="pafu", example_inputs=torch.randn(1, 3, 8, 8)
    )
    assert not any("optimizer" in note for note in report.notes)


def test_the_command_tells_nothing_of_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    """K8: it converts in place a model of its own."""
    arguments = ["convert", "test_resnet", "--weights", "random", "--input-size", "64", "--layers", "stage4"]
    assert main([*arguments, "--type", "sekg", "--dry-run", "--quiet"]) == 0
    assert "optimizer" not in capsys.readouterr().out


# --- K7: what cannot be saved, counted or named -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.usefixtures("nothing_half_written")
def test_tensors_that_no_folder_holds_are_refused_by_name() -> None:
    """K7: quantized tensor subclasses, sparse and meta tensors at surgeon.save."""
    for tensor in (
        TwoTensor(torch.zeros(2), torch.zeros(2)),
        torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
    ):
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        surgeon.convert(model, layers="all", type="sekg", example_inputs=torch.randn(1, 3, 8, 8), inplace=True)
        model.register_buffer("odd", tensor)
        with pytest.raises(CheckpointError, match="odd in the state dict is"):
            surgeon.save(model, "out")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning", "ignore:Sparse")
def test_sparse_and_nested_outputs_are_compared() -> None:
    """K7: a raw error in the comparison."""
    for change in (Tensor.to_sparse, lambda t: torch.nested.nested_tensor(list(t))):
        a, b = change(torch.ones(2, 3)), change(torch.full((2, 3), 1.5))
        assert compare(a, a).max_rel == 0
        assert compare(a, b).max_rel == 0.5
        assert compare(a, torch.ones(2, 3)).max_rel == float("inf")


def test_costs_of_models_that_need_more_than_an_image() -> None:
    """K7: surgeon.cost with arguments."""

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, t: Tensor, *, scale: float) -> Tensor:
            out: Tensor = self.conv(x) * t[:, None, None, None] * scale
            return out

    model, x = Conditioned(), torch.randn(2, 3, 8, 8)
    with pytest.raises(InputError, match="example_inputs"):
        surgeon.cost(model, input_size=8)
    for mode in ("train", "infer"):
        found = surgeon.cost(model, example_inputs=Inputs(args=(x, torch.ones(2)), kwargs={"scale": 2.0}), mode=mode)
        assert (found.batch_size, found.input_size) == (2, (3, 8, 8))
        assert found.macs == 4 * 3 * 9 * 36
    with pytest.raises(ConfigError, match="leave out"):
        surgeon.cost(model, example_inputs=x, input_size=8)


@pytest.mark.usefixtures("nothing_half_written")
def test_a_module_may_have_any_name() -> None:
    """K7: a comma in a ModuleDict's key: own recipe, reverting, saving, loading."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"3x3, (a": nn.Conv2d(3, 3, 3, padding=1), "k=3": nn.Conv2d(3, 3, 3, padding=1)})

        def forward(self, x: Tensor) -> Tensor:
            for module in self.body.values():
                x = module(x)
            return x

    x = torch.randn(1, 3, 8, 8)
    model = Named().eval()
    converted, report = surgeon.convert(model, layers='"body.3x3, (a"', type="sekg", example_inputs=x)
    assert [entry.name for entry in report.replaced] == ["body.3x3, (a"]
    recipe = get_recipe(converted)
    assert recipe is not None
    again, _ = surgeon.convert(model, recipe=recipe, example_inputs=x)
    assert torch.equal(again(x), converted(x))
    surgeon.save(converted, "out")
    assert torch.equal(surgeon.load("out", base=model)(x), converted(x))
    surgeon.revert(converted, '"body.3x3, (a"')
    left = get_recipe(converted)
    assert left is not None
    assert not left.rules
    for wrong in ('"body', "body.3x3, (a"):
        with pytest.raises(SelectionError):
            surgeon.convert(model, layers=wrong, type="sekg", example_inputs=x)
