"""surgeon.convert: what is replaced, what is kept, what is refused."""

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn

import surgeon
from surgeon.errors import (
    ConfigError,
    InputError,
    ModelError,
    NothingReplacedError,
    SelectionError,
    VerificationError,
)
from surgeon.layers import ACDAConfig
from surgeon.layers.registry import layer_types
from surgeon.records.recipe import Recipe, Rule, get_recipe
from surgeon.surgery.rewrite import dynamic_layers
from surgeon.util.copying import uses_compiler
from surgeon.util.tables import count
from tests.support.fake_conversions import X, evaluated, fakes, small
from tests.support.fake_layer import FakeConv2d

TYPES = layer_types()
pytestmark = pytest.mark.usefixtures("fake_type")


# --- what comes out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_keeps_what_a_resnet_computes(kind: str) -> None:
    model = timm.create_model("resnet18", num_classes=10)
    converted, report = surgeon.convert(model, layers="stage1,stage2", type=kind, example_inputs=X)
    assert type(converted) is type(model)
    assert len(report.replaced) == 8
    assert len(report.replaced) + len(report.skipped) == 20
    assert torch.allclose(evaluated(model), evaluated(converted), rtol=0, atol=1e-5)
    assert report.max_rel_error is not None
    assert report.max_rel_error <= 1e-5
    assert report.exact
    assert not dynamic_layers(model)
    assert [r.name for r in report.replaced] == list(dynamic_layers(converted))
    assert report.params_after == sum(p.numel() for p in converted.parameters())
    assert report.params_before == sum(p.numel() for p in model.parameters())


def test_the_report_has_every_convolution() -> None:
    _, report = fakes(
        nn.Sequential(nn.Conv2d(3, 4, 7), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)), "0,1"
    )
    assert [(r.name, r.calls, r.macs_before) for r in report.replaced] == [("1", 1, 4 * 4 * 9 * 56 * 56)]
    assert [(s.name, s.selected, s.reasons) for s in report.skipped] == [
        ("0", True, ("the fake layer wants no 7x7 kernels",)),
        ("2", False, ("not selected",)),
        ("3", False, ("not selected",)),
    ]
    replaced = report.replaced[0]
    assert replaced.params_before == 4 * 4 * 9 + 4
    assert replaced.params_after > replaced.params_before
    assert replaced.max_abs_error == 0
    assert report.macs_after is not None
    assert report.macs_before is not None
    assert report.macs_after > report.macs_before


def test_the_callers_model_is_untouched_and_inplace_changes_it() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    converted, _ = fakes(model, "0,2")
    assert converted is not model
    assert not dynamic_layers(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks and m.training for m in model.modules())
    same, _ = fakes(model, "0,2", inplace=True)
    assert same is model
    assert list(dynamic_layers(model)) == ["0", "2"]


def test_a_conversion_is_reproducible_and_leaves_the_random_state_alone() -> None:
    model, state = small(), torch.random.get_rng_state()
    first, _ = surgeon.convert(model, layers="all", type="pafu", example_inputs=X, seed=3)
    alone, _ = surgeon.convert(model, layers="2", type="pafu", example_inputs=X, seed=3)
    other, _ = surgeon.convert(model, layers="2", type="pafu", example_inputs=X, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    kernels = [m.get_submodule("2").selector.expand.weight for m in (first, alone, other)]
    assert torch.equal(kernels[0], kernels[1])
    assert not torch.equal(kernels[0], kernels[2])


def test_a_recipe_mixes_types_and_is_recorded() -> None:
    recipe = Recipe(
        rules=(Rule(layers="all", type="fake"), Rule(layers="2", type="pafu", options={"group_size": 3})), seed=5
    )
    model = small()
    for given in ({"layers": recipe}, {"recipe": recipe}):
        converted, report = surgeon.convert(model, example_inputs=X, **given)
        assert [r.type for r in report.replaced] == ["fake", "pafu"]
        found = get_recipe(converted)
        assert found is not None
        assert found.seed == 5
        assert [(r.layers, r.type) for r in found.rules] == [("0", "fake"), ("2", "pafu")]
        assert found.rules[1].options == converted.get_submodule("2").config.to_dict()
        assert get_recipe(copy.deepcopy(converted)) == found
    assert get_recipe(model) is None


def test_a_config_is_the_type_with_its_options() -> None:
    model = timm.create_model("test_resnet").eval()
    by_config, _ = surgeon.convert(model, ACDAConfig(atoms=4), layers="stage3", input_size=64)
    by_name, _ = surgeon.convert(model, type="acda", atoms=4, layers="stage3", input_size=64)
    assert get_recipe(by_config).rules == get_recipe(by_name).rules
    assert {layer.config.atoms for layer in dynamic_layers(by_config).values()} == {4}


def test_a_second_conversion_adds_to_the_first() -> None:
    once, _ = fakes(small(), "0")
    twice, report = surgeon.convert(once, layers="all", type="pafu", example_inputs=X)
    assert [(s.name, s.reasons) for s in report.skipped if s.selected] == [
        ("0", ("it is already a dynamic layer (fake)",))
    ]
    recipe = get_recipe(twice)
    assert recipe is not None
    assert [(r.layers, r.type) for r in recipe.rules] == [("0", "fake"), ("2", "pafu")]


def test_a_single_convolution_is_a_model() -> None:
    converted, report = fakes(nn.Conv2d(3, 4, 3))
    assert isinstance(converted, FakeConv2d)
    assert report.replaced[0].name == ""
    with pytest.raises(ConfigError, match="cannot be replaced in place"):
        fakes(nn.Conv2d(3, 4, 3), inplace=True)


def test_a_graph_module_can_be_had() -> None:
    model = timm.create_model("resnet18").train()
    graph, _ = fakes(model, "stage1", as_graph=True)
    assert isinstance(graph, fx.GraphModule)
    graph.graph.lint()
    leaves = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    assert set(dynamic_layers(graph)) <= leaves
    assert graph.training
    assert torch.allclose(evaluated(graph), evaluated(model), atol=1e-6)
    assert get_recipe(graph) is not None


def test_progress_and_check_off() -> None:
    told: list[tuple[str, int, int]] = []
    _, report = fakes(small(), check=False, progress=lambda *step: told.append(step))
    assert [stage for stage, done, total in told if done == total] == ["trace", "build"]
    assert report.max_rel_error is None
    assert report.notes == ["not verified"]
    told.clear()
    fakes(small(), progress=lambda *step: told.append(step))
    assert told[-1] == ("verify", 3, 3)


# --- what is kept -------------------------------------------------------------------------------------------------


def test_shared_convolutions_are_replaced_once_at_all_names() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 3, padding=1)
            self.block = nn.Sequential(nn.ReLU(), self.first)
            self.listed = nn.ModuleDict({"a": self.first, "b": self.block})

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.block(self.first(x))
            return out

    converted, report = fakes(Shared())
    assert converted.first is converted.block[1] is converted.listed["a"]
    assert isinstance(converted.first, FakeConv2d)
    assert report.replaced[0].aliases == ("block.1", "listed.a", "listed.b.1")
    assert report.replaced[0].calls == 2


def test_mode_dtype_layout_flags_and_names_are_kept() -> None:
    model = small().double().to(memory_format=torch.channels_last)
    model[3].eval()
    model[2].requires_grad_(False)
    model[2].eval()
    converted, _ = fakes(model, "0,2", x=X.double())
    assert [m.training for m in converted] == [True, True, False, False, True]
    assert all(p.dtype == torch.float64 for p in converted.parameters())
    assert converted[0].kernel.is_contiguous(memory_format=torch.channels_last)
    assert converted[0].kernel.requires_grad
    assert not converted[2].kernel.requires_grad
    untouched = {"3.weight", "3.bias", "3.running_mean", "4.weight", "4.bias"}
    assert untouched <= set(converted.state_dict())


def test_hooks_move_and_their_handles_go_on_working() -> None:
    model = small()
    calls: list[str] = []
    handle = model[0].register_forward_hook(lambda *_: calls.append("after"))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    expected = evaluated(model)
    converted, report = fakes(model, "0", inplace=True)
    assert torch.equal(evaluated(converted), expected)
    calls.clear()
    model.eval()(X)
    assert calls == ["after"]
    handle.remove()
    model(X)
    assert calls == ["after"]
    assert "hooks move" in report.replaced[0].notes[0]


def test_parametrized_and_same_padded_convolutions() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect")),
        nn.Conv2d(4, 4, (2, 3), padding="same"),
        timm.layers.Conv2dSame(4, 4, 3, stride=2),
        timm.layers.StdConv2d(4, 4, 3, bias=False),
    )
    for kind in TYPES:
        converted, report = surgeon.convert(model, layers="all", type=kind, example_inputs=torch.randn(2, 3, 15, 18))
        assert len(report.replaced) == 4
        assert list(dynamic_layers(converted)) == ["0", "1", "2", "3"]


def test_old_style_weight_norm_elsewhere_does_not_stand_in_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        normed = nn.utils.weight_norm(nn.Conv2d(3, 3, 3))
    model = nn.Sequential(normed, nn.Conv2d(3, 3, 3))
    model(X)
    _, report = fakes(model)
    assert [r.name for r in report.replaced] == ["1"]
    assert "old-style weight_norm" in report.skipped[0].reasons[0]


def test_lazy_modules_stay_lazy() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3))
    _, report = fakes(model, inplace=True)
    assert [r.name for r in report.replaced] == ["0"]
    assert isinstance(model[1], nn.LazyConv2d)


def test_layers_that_are_never_reached_are_replaced_and_noted() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    _, report = fakes(Unused())
    unused = report.replaced[1]
    assert (unused.calls, unused.macs_before, unused.notes) == (0, None, ("the forward pass never reaches it",))


def test_a_conversion_that_multiplies_the_parameters_says_what_makes_them_fewer() -> None:
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1, groups=32) for _ in range(2)))
    _, report = surgeon.convert(model, layers="all", type="sekg", input_size=(32, 8, 8))
    assert report.params_after > 3 * report.params_before
    assert report.macs_before is not None
    assert report.macs_after is not None
    assert [note for note in report.notes if "kernel_groups" in note] == [
        f"x{report.params_after / report.params_before:.2g} parameters and "
        f"x{report.macs_after / report.macs_before:.2g} FLOPs in all: "
        f"sekg layers add {count(report.params_after - report.params_before)} parameters; "
        "kernel_groups shares kernels among channels: 4 is a value to start with"
    ]
    _, report = surgeon.convert(model, layers="0", type="sekg", kernel_groups=1, input_size=(32, 8, 8))
    assert not any("parameters;" in note for note in report.notes)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": "nowhere", "type": "fake"}, SelectionError, "'nowhere' matches no convolution"),
        ({"layers": "all", "type": "fkae"}, ConfigError, "unknown layer type 'fkae'.*Did you mean 'fake'"),
        ({"layers": "all", "type": "ACDA"}, ConfigError, "unknown layer type 'ACDA'.*Did you mean 'acda'"),
        ({"layers": "all", "type": "fake", "hidden": 0}, ConfigError, "hidden must be an integer >= 1"),
        ({"layers": "all", "type": "fake", "atoms": 3}, ConfigError, "has no option 'atoms'"),
        (
            {"layers": "all", "type": "acda", "atom": 3},
            ConfigError,
            "^layer type acda has no option 'atom'; .* Did you mean 'atoms'",
        ),
        ({"layers": "all", "typ": "fake"}, ConfigError, "type is missing.* Did you mean 'type'"),
        ({"layers": "all"}, ConfigError, "type is missing"),
        ({"type": "fake"}, ConfigError, "layers is missing"),
        ({"recipe": Recipe(rules=()), "type": "fake"}, ConfigError, "leave out type"),
        ({"recipe": Recipe(rules=())}, ConfigError, "no rules"),
        ({"layers": "all", "type": "fake", "x": torch.randn(1, 4, 8, 8)}, InputError, "does not run"),
        (
            {"layers": "all", "type": "pafu", "group_size": 1},
            ConfigError,
            "^pafu: group_size must be an integer >= 2, got 1",
        ),
        ({"layers": "all", "type": "acda", "atoms": 0}, ConfigError, "^acda: atoms must be an integer >= 1, got 0"),
        ({"layers": "all", "type": "acda", "scales": 0}, ConfigError, "scales must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = small()
    given = dict(arguments)
    with pytest.raises(error, match=message):
        surgeon.convert(model, example_inputs=given.pop("x", X), inplace=True, **given)
    assert not dynamic_layers(model)


def test_a_selection_of_refused_layers_only_is_an_error_with_the_reasons() -> None:
    with pytest.raises(NothingReplacedError, match="0: the fake layer wants no 7x7 kernels"):
        fakes(nn.Sequential(nn.Conv2d(3, 3, 7), nn.Conv2d(3, 3, 3)), "0")


@pytest.mark.parametrize("inplace", [False, True])
def test_a_failed_check_raises_and_restores(inplace: bool) -> None:
    model = small()
    first, third = model[0], model[2]
    with pytest.raises(VerificationError, match=r"relative error .*Worst layers: "):
        fakes(model, "0,2", flaw=1e-2, inplace=inplace)
    assert model[0] is first
    assert model[2] is third
    assert get_recipe(model) is None
    assert model[0].training


def test_an_error_after_the_check_restores_too() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x) if float(x.sum()) > -1e9 else x
            return out

    model = Branching()
    with pytest.raises(surgeon.SurgeonError, match=r"torch\.fx cannot trace Branching"):
        fakes(model, as_graph=True, inplace=True)
    assert type(model.conv) is nn.Conv2d
    assert get_recipe(model) is None


@pytest.mark.parametrize("call", [surgeon.convert, surgeon.inspect, surgeon.cost, surgeon.revert, surgeon.collapse])
def test_a_name_is_no_model(call: Any) -> None:
    with pytest.raises(
        ModelError, match=r"must be a torch.nn.Module, got 'resnet18': surgeon.open_model\('resnet18'\) makes"
    ):
        call("resnet18", **({"layers": "all", "type": "acda"} if call is surgeon.convert else {}))
    weights: Any = {}
    with pytest.raises(ModelError, match=r"must be a torch\.nn\.Module, got dict"):
        surgeon.save(weights, "nowhere")


def test_a_misspelled_argument_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'layer' is none of the arguments\. Did you mean 'layers'"):
        surgeon.convert(small(), layer="all", type="acda")


def test_the_meta_device_as_default_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with torch.device("meta"):
        converted, report = surgeon.convert(model, "acda", layers="all", input_size=8)
        assert surgeon.verify(model, converted, input_size=8).exact
        assert surgeon.collapse(converted, input_size=8)[1].folded
        assert torch.empty(0).is_meta
    assert report.exact
    assert {p.device.type for p in converted.parameters()} == {"cpu"}


@pytest.mark.parametrize("how", ["wrapped", "within", "in place"])
def test_a_compiled_model_comes_back_uncompiled_and_this_is_said(how: str) -> None:
    model = small()
    if how == "within":
        model[0] = torch.compile(model[0])
    elif how == "in place":
        model.compile()
    converted, report = surgeon.convert(
        torch.compile(model) if how == "wrapped" else model, layers="all", type="acda", example_inputs=X
    )
    assert not uses_compiler(converted)
    assert report.notes[-1].startswith("the model was compiled, the converted one is not")
    assert uses_compiler(model) == (how != "wrapped")
