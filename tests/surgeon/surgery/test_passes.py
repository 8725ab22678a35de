"""Graphs of torch.fx and torch.export: functional convolutions, the pass, and what it leaves alone."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn.utils import parametrize
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

import surgeon
from surgeon.errors import ConfigError, ModelError, NothingReplacedError, SelectionError
from surgeon.layers.base import DynamicConv2d
from surgeon.layers.registry import layer_types
from surgeon.passes import DynamicConvPass
from surgeon.records.recipe import get_recipe
from surgeon.surgery.rewrite import dynamic_layers

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
Graphed = Callable[[nn.Module], nn.Module]


class Functional(nn.Module):
    """A weight of the module itself, a buffer, one of a submodule, one used twice, and what cannot be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.register_buffer("blur", torch.ones(8, 1, 3, 3) / 9)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.line = nn.Parameter(torch.randn(8, 8, 3) / 5)
        self.twice = nn.Parameter(torch.randn(8, 8, 3, 3) / 9)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w, None, 1, "same")
        x = F.conv2d(x, self.blur, groups=8, padding=1).relu()
        x = F.conv2d(x, self.inner.weight, self.inner.bias, stride=2, padding=1)
        x = torch.conv2d(torch.conv2d(x, self.twice, None, 1, 1).relu(), self.twice, None, 1, 1)
        x = x + F.conv1d(x.flatten(2), self.line, padding=1).view_as(x)
        kernel = x.mean((0, 2, 3)).view(8, 1, 1, 1).expand(8, 1, 3, 3)
        return self.last(x) + F.conv2d(x, kernel, padding=1, groups=8)[:, :4]


def exported(model: nn.Module) -> fx.GraphModule:
    return torch.export.export(model.eval(), (X,)).module()


def decomposed(model: nn.Module) -> fx.GraphModule:
    return torch.export.export(model.eval(), (X,)).run_decompositions().module()


def unflattened(model: nn.Module) -> nn.Module:
    return torch.export.unflatten(torch.export.export(model.eval(), (X,)))


GRAPHS: dict[str, Graphed] = {
    "fx": fx.symbolic_trace,
    "export": exported,
    "decomposed": decomposed,
    "unflattened": unflattened,
}


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / a.abs().max())


# --- what is replaced ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        pytest.param(how, kind, marks=[] if (i + j) % 3 == 0 else pytest.mark.slow)
        for i, how in enumerate(GRAPHS)
        for j, kind in enumerate(layer_types())
    ],
)
def test_convolutions_of_a_graph_are_replaced_by_the_names_of_their_weights(how: str, kind: str) -> None:
    model = timm.create_model("resnet18", num_classes=10).eval()
    converted, report = surgeon.convert(GRAPHS[how](model), layers="stage1,layer2.*", type=kind, example_inputs=X)
    _, tree = surgeon.convert(model, layers="stage1,layer2.*", type=kind, example_inputs=X)
    assert [entry.name for entry in report.replaced] == [entry.name for entry in tree.replaced]
    assert sorted(entry.name for entry in report.skipped) == sorted(entry.name for entry in tree.skipped)
    assert report.max_rel_error <= 1e-5
    assert relative(run(model), run(converted)) <= 1e-5


@pytest.mark.parametrize("how", ["fx", "export", "decomposed"])
def test_functional_convolutions_of_every_kind_are_accounted_for(how: str) -> None:
    model = Functional().eval()
    graph = GRAPHS[how](model)
    converted, report = surgeon.convert(graph, layers="all", type="acda", example_inputs=X)
    assert {entry.name: entry.calls for entry in report.replaced} == {
        "w_conv": 1,
        "blur_conv": 1,
        "inner": 1,
        "twice_conv": 2,
        "last": 1,
    }
    reasons = " ".join(reason for entry in report.skipped for reason in entry.reasons)
    assert len(report.skipped) == 2
    assert "only 2-D convolutions" in reasons
    assert "computed from the input x" in reasons
    assert relative(run(model), run(converted)) <= 1e-5
    assert not {"w", "twice", "inner.weight"} & dict(converted.named_parameters()).keys()


def test_what_is_not_selected_stays_a_function_with_the_same_parameter() -> None:
    graph = exported(Functional())
    before = graph.code, list(graph.state_dict())
    converted, _ = surgeon.convert(graph, layers="inner", type="pafu")
    assert isinstance(converted, fx.GraphModule)
    assert (graph.code, list(graph.state_dict())) == before
    calls = {str(n.target) for n in converted.graph.nodes if n.op == "call_module"}
    assert "inner" in calls
    assert "w_conv" not in calls
    assert "w" in dict(converted.named_parameters())
    assert isinstance(converted.get_submodule("inner"), DynamicConv2d)


def test_standardized_weights_start_from_the_effective_weight() -> None:
    model = timm.create_model("resnetv2_50x1_bit", num_classes=10).eval()
    converted, report = surgeon.convert(fx.symbolic_trace(model), layers="stage2,k>=3", type="pafu", example_inputs=X)
    assert len(report.replaced) == 4
    assert all("computed from stages" in " ".join(entry.notes) for entry in report.replaced)
    assert relative(run(model), run(converted)) <= 2e-5
    assert "batch_norm" in str(converted.graph)  # of those that were not selected


def test_parametrized_weights_are_named_after_their_owner() -> None:
    class Scale(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 0.5

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            parametrize.register_parametrization(self.conv, "weight", Scale())

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.conv.weight, self.conv.bias)

    model = Model().eval()
    converted, report = surgeon.convert(exported(model), layers="conv", type="sekg")
    assert [entry.name for entry in report.replaced] == ["conv"]
    assert relative(run(model), run(converted)) <= 1e-5


@pytest.mark.parametrize("how", ["fx", "export"])
def test_a_weight_that_others_read_is_left_alone(how: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3, 3, 3, 3)), nn.Parameter(torch.randn(3, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(F.conv2d(x, self.a, padding=1), self.a, padding=2)
            return F.conv2d(x, self.b) * self.b.mean()

    with pytest.raises(NothingReplacedError, match=r"shared by 2 convolutions.*used by mean"):
        surgeon.convert(GRAPHS[how](Model()), layers="all", type="pafu", example_inputs=X)


def test_unflattened_modules_of_several_calls_are_refused_with_the_way_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(self.conv(x).relu()))

    for graph in (exported(Model()), unflattened(Model())):
        _, report = surgeon.convert(graph, layers="all", type="pafu", example_inputs=X)
        assert {entry.name: entry.calls for entry in report.replaced} == {"conv": 2, "last": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its own nodes
        program = torch.export.export(Model().eval(), (X,), preserve_module_call_signature=("conv",))
        kept = torch.export.unflatten(program)
    _, report = surgeon.convert(kept, layers="all", type="pafu", example_inputs=X)
    assert [entry.name for entry in report.replaced] == ["last"]
    assert "convert ExportedProgram.module()" in report.skipped[0].reasons[0]


def test_random_weights_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, F.dropout(self.w, 0.5, training=True))

    with pytest.raises(NothingReplacedError, match="is random"):
        surgeon.convert(fx.symbolic_trace(Model()), layers="all", type="pafu", example_inputs=X)


def test_feature_extractors_and_fx_features_are_converted() -> None:
    features = create_feature_extractor(resnet18().eval(), {"layer2": "out"})
    converted, report = surgeon.convert(features, layers="layer2", type="pafu", example_inputs=X)
    assert len(report.replaced) == 4
    assert relative(features(X)["out"], converted(X)["out"]) <= 1e-5
    timms = timm.create_model("resnetv2_50x1_bit", features_only=True, feature_cls="fx", out_indices=(0, 1)).eval()
    converted, report = surgeon.convert(timms, layers="re:stages.0.*conv2", type="pafu", example_inputs=X)
    assert len(report.replaced) == 3
    assert all(relative(a, b) <= 2e-5 for a, b in zip(timms(X), converted(X), strict=True))
    converted.train()  # the other graph
    assert all(relative(a, b) <= 2e-5 for a, b in zip(timms.train()(X), converted(X), strict=True))


@settings(max_examples=12)
@given(
    st.sampled_from([1, 2]),
    st.sampled_from([0, 1, (2, 1), "same", "valid"]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.sampled_from(["fx", "export", "decomposed"]),
)
def test_any_functional_geometry(stride: int, padding: Any, dilation: int, groups: int, bias: bool, how: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 3 // groups, 3, 3))
            self.bias = nn.Parameter(torch.randn(6)) if bias else None

        def forward(self, x: Tensor) -> Tensor:
            step = 1 if padding == "same" else stride
            return F.conv2d(x, self.weight, self.bias, step, padding, dilation, groups)

    model = Model().eval()
    converted, report = surgeon.convert(GRAPHS[how](model), layers="all", type="pafu", example_inputs=X)
    assert [entry.name for entry in report.replaced] == ["weight_conv"]
    assert relative(run(model), run(converted)) <= 1e-5


def test_a_function_in_an_eager_module_is_reported_with_the_way_to_replace_it() -> None:
    _, report = surgeon.convert(Functional(), layers="last", type="pafu", example_inputs=X)
    told = {entry.name: entry.reasons for entry in report.skipped if entry.module == "conv2d"}
    assert told.keys() == {"w_conv", "twice_conv"}
    with pytest.raises(NothingReplacedError, match="function in Functional, not a module: the graph form can take it"):
        surgeon.convert(Functional(), layers="w_conv", type="pafu", example_inputs=X)


# --- the pass -------------------------------------------------------------------------------------------------------


class Relu6(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        changed = False
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.aten.relu.default:
                node.target, changed = torch.ops.aten.relu6.default, True
        graph_module.recompile()
        return PassResult(graph_module, changed)


def test_the_pass_works_beside_others_and_runs_twice_without_harm() -> None:
    graph = exported(Functional())
    expected = run(graph)
    own = DynamicConvPass("all", "pafu")
    manager = PassManager(passes=[own, Relu6()])
    result = manager(graph)
    assert result.modified
    assert own.report is not None
    assert len(own.report.replaced) == 5
    code = graph.code
    assert relative(run(graph), expected) <= 1e-5  # values below 6
    again = own(graph)
    assert again is not None
    assert not again.modified
    assert own.report is None
    assert "already a dynamic layer" in own.unchanged
    assert graph.code == code
    assert get_recipe(copy.deepcopy(graph)) is not None


def test_an_error_leaves_the_graph_as_it_was() -> None:
    graph = exported(Functional())
    before = graph.code, list(graph.state_dict())
    with pytest.raises(SelectionError):
        DynamicConvPass("nowhere", "pafu")(graph)
    with pytest.raises(NothingReplacedError, match="computed from the input"):
        DynamicConvPass("re:conv2d_6", "pafu")(graph)
    assert (graph.code, list(graph.state_dict())) == before
    assert not dynamic_layers(graph)


def test_what_is_no_graph_with_weights_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"rewrites a torch\.fx\.GraphModule, got a Functional"):
        DynamicConvPass("all", "pafu")(Functional())
    with pytest.raises(ModelError, match="no parameters or buffers"):
        DynamicConvPass("all", "pafu")(fx.symbolic_trace(nn.ReLU()))


def test_new_layers_in_a_graph_learn() -> None:
    graph = exported(Functional())
    DynamicConvPass("inner", "acda")(graph)
    layer = dynamic_layers(graph)["inner"]
    graph(X).sum().backward()
    assert all(p.grad is not None for _, p in layer.new_parameters())


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=[] if how in ("fx", "unflattened") else pytest.mark.slow) for how in GRAPHS]
)
def test_folders_of_graphs_load_into_the_graph_they_were_made_of(how: str, tmp_path: Any) -> None:
    model = timm.create_model("resnet18", num_classes=10).eval()
    graph = GRAPHS[how](model)
    converted, report = surgeon.convert(graph, layers="layer3,!layer3.1", type="acda", example_inputs=X)
    surgeon.save(converted, tmp_path / "run", report=report)
    loaded = surgeon.load(tmp_path / "run", base=graph)
    assert torch.equal(run(loaded), run(converted))
    assert surgeon.verify(graph, loaded, example_inputs=X).max_rel_error <= 1e-5
    reverted = surgeon.revert(loaded, "layer3.0.conv1")
    surgeon.save(reverted, tmp_path / "less")
    assert torch.equal(run(surgeon.load(tmp_path / "less", base=graph)), run(reverted))


@pytest.mark.slow
@pytest.mark.parametrize("kind", layer_types())
def test_standardized_convolutions_of_nfnets_are_replaced_in_the_exported_graph(kind: str) -> None:
    model = timm.create_model("dm_nfnet_f0", num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    graph = torch.export.export(model, (x,)).module()
    own = DynamicConvPass("all", kind)
    own(graph)
    assert own.report is not None
    spatial = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    assert len(own.report.replaced) == len(spatial)
    assert all("computed from" in " ".join(entry.notes) for entry in own.report.replaced)
    assert own.report.max_rel_error <= 1e-5
