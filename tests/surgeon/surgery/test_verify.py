"""The check itself: comparing outputs, judging, settling in float64, gradients, and verify() on two given models."""

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

import surgeon
from surgeon.errors import InputError, VerificationError
from surgeon.layers import registry
from surgeon.layers.registry import layer_types
from surgeon.sites.inputs import Inputs, candidate_inputs, given_inputs
from surgeon.sites.observe import observe
from surgeon.surgery.compare import Difference, compare, compare_tensors
from surgeon.surgery.gradients import check_gradients, without_gradient
from surgeon.surgery.rewrite import build_layer, dynamic_layers
from surgeon.surgery.running import run
from surgeon.surgery.verify import Settled, judge, measure
from tests.support.fake_layer import FakeConfig, FakeConv2d

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("fake_type")


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2))


# --- comparing ----------------------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: Tensor
    extra: dict[str, Any]


class Pair(NamedTuple):
    first: Tensor
    second: float


def test_errors_are_hand_computed() -> None:
    found = compare_tensors(torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.0]))
    assert (found.max_abs, found.max_rel) == (0.5, 0.125)
    assert compare_tensors(torch.zeros(2), torch.zeros(2)).max_rel == 0
    assert compare_tensors(torch.zeros(2), torch.ones(2)).max_rel == math.inf
    assert compare_tensors(torch.tensor([3, 1]), torch.tensor([3, 2])).max_abs == 1


def test_nested_outputs_are_compared_and_the_worst_is_named() -> None:
    def tree(last: float) -> Any:
        inner = Output(
            logits=torch.ones(2), extra={"x": [torch.ones(1), Pair(torch.tensor([last]), 2.0)], "none": None}
        )
        return OrderedDict(out=(torch.zeros(1), inner))

    assert compare(tree(2.0), tree(2.0)).max_rel == 0
    found = compare(tree(2.0), tree(2.5))
    assert (found.max_abs, found.max_rel) == (0.5, 0.25)
    assert found.where == "output['out'][1].extra['x'][1][0]"


def test_another_structure_or_shape_is_an_infinite_error() -> None:
    found = compare({"a": torch.ones(1)}, {"b": torch.ones(1)})
    assert found.max_rel == math.inf
    assert "differ in structure" in found.notes[0]
    found = compare([torch.ones(1)], [torch.ones(2)])
    assert found.max_rel == math.inf
    assert "has the shape (2,), not (1,)" in found.notes[0]


def test_what_is_not_finite_must_be_so_at_the_same_places() -> None:
    nan, inf = math.nan, math.inf
    a = torch.tensor([1.0, nan, inf, 4.0])
    found = compare(a, torch.tensor([1.0, nan, inf, 5.0]))
    assert (found.max_abs, found.max_rel) == (1.0, 0.25)
    assert "in the same positions" in found.notes[0]
    assert compare(a, torch.tensor([1.0, nan, -inf, 4.0])).max_rel == inf
    assert compare(a, torch.tensor([1.0, 2.0, inf, 4.0])).max_rel == inf
    found = compare(torch.tensor([nan]), torch.tensor([nan]))
    assert found.max_rel == 0
    assert "only the layers' own errors" in found.notes[0]


def test_empty_outputs_are_noted() -> None:
    assert compare(torch.zeros(0, 4), torch.zeros(0, 4)).notes == (
        "parts of the output are empty and were not compared",
    )


# --- running and measuring ----------------------------------------------------------------------------------------


def test_a_run_leaves_the_model_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.drop = nn.Dropout(0.5).eval()

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.drop(x) + torch.rand_like(x)
            return out

    model, state = Counting(), torch.random.get_rng_state()
    first, second = (run(model, given_inputs(X)) for _ in range(2))
    assert torch.equal(first, second)  # stochastic models draw the same
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.calls == 0
    assert model.training
    assert not model.drop.training
    with pytest.raises(InputError, match=r"Sequential does not run on \(2, 3, 16, 16\)"):
        run(nn.Sequential(nn.Conv2d(4, 4, 3)), given_inputs(X))


def test_layers_are_measured_on_what_their_convolution_gets() -> None:
    model = small()
    layers = {
        name: build_layer(model.get_submodule(name), FakeConv2d, FakeConfig(flaw=flaw), 0)
        for name, flaw in (("0", 0.0), ("2", 0.5))
    }
    for conv in (model[0], model[2]):
        nn.init.zeros_(conv.bias)
    for layer in layers.values():
        nn.init.zeros_(layer.bias)
    output, errors = measure(model, layers, given_inputs(X))
    assert torch.equal(output["output"], run(model, given_inputs(X)))
    assert errors["0"].max_rel == 0
    assert errors["2"].max_rel == pytest.approx(0.5, rel=1e-3)
    assert errors["2"].max_abs == pytest.approx(0.5 * output["output"].abs().max().item(), rel=1e-3)
    assert not any(m._forward_hooks for m in model.modules())


def test_inputs_of_all_forms() -> None:
    assert given_inputs(X).args[0] is X
    assert given_inputs((X, 3)).args == (X, 3)
    assert given_inputs([X]).args == ([X],)
    assert given_inputs({"x": X}).kwargs["x"] is X
    assert (given_inputs(X).batch, given_inputs([X, X, X]).batch) == (2, 3)
    assert given_inputs((X, {"y": [X]})).to_dtype(torch.float64).args[1]["y"][0].dtype == torch.float64
    assert Inputs(args=(X, 2), kwargs={"z": [X]}).shapes() == "(2, 3, 16, 16), 2, z=[(2, 3, 16, 16)]"


def test_default_inputs_follow_the_model() -> None:
    def first(model: nn.Module, size: Any = None) -> Inputs:
        return next(candidate_inputs(model, size))

    assert first(small()).args[0].shape == (2, 3, 224, 224)
    assert first(small(), 32).args[0].shape == (2, 3, 32, 32)
    assert first(nn.Conv2d(1, 1, 3).double(), (40, 48)).args[0].shape == (2, 1, 40, 48)
    assert first(nn.Conv2d(1, 1, 3).double()).args[0].dtype == torch.float64
    assert first(nn.Conv3d(3, 1, 3)).args[0].shape == (2, 3, 16, 112, 112)
    raft = torchvision.models.optical_flow.raft_small(weights=None)
    assert [a.shape for a in first(raft).args] == [(1, 3, 128, 128)] * 2


def test_a_convolution_that_does_not_see_the_images_may_come_first() -> None:
    """CSATv2 of timm defines the convolution of a later map before that of the images."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pretrained_cfg = {"input_size": (3, 24, 24)}
            self.second = nn.Conv2d(8, 4, 1)
            self.first = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x))
            return y

    model = Backwards()
    assert [i.args[0].shape for i in candidate_inputs(model)] == [(2, 8, 24, 24), (2, 3, 24, 24)]
    assert [i.args[0].shape for i in candidate_inputs(model, 16)] == [(2, 8, 16, 16), (2, 3, 16, 16)]
    assert observe(model, ()).inputs.args[0].shape == (2, 3, 24, 24)
    model.pretrained_cfg = {"input_size": (8, 24, 24)}
    assert len(list(candidate_inputs(model))) == 1


# --- judging ------------------------------------------------------------------------------------------------------


def difference(rel: float) -> Difference:
    return Difference(max_abs=rel, max_rel=rel, where="output", compared=1)


def never() -> tuple[Difference, dict[str, Difference]]:
    raise AssertionError("nothing was to be settled")


def test_within_the_tolerance_nothing_is_settled() -> None:
    found = judge(difference(9e-6), {"a": difference(1e-6)}, torch.float32, never)
    assert (found.precision, found.exact, found.notes) == ("float32", True, [])


def test_beyond_it_float64_settles() -> None:
    layers = {"a": difference(1e-6)}
    found = judge(difference(3e-4), layers, torch.float32, lambda: Settled(difference(1e-13), {"a": difference(1e-14)}))
    assert found.precision == "float64"
    assert found.exact
    assert found.max_rel_error == 1e-13
    assert "amplified by depth to a relative error of 3.0e-04" in found.notes[0]
    with pytest.raises(
        VerificationError, match=r"relative error 3\.0e-04 .*in float64 still 1\.0e-09.*Worst layers: a"
    ):
        judge(difference(3e-4), layers, torch.float32, lambda: Settled(difference(1e-9), {"a": difference(1e-9)}))
    with pytest.raises(VerificationError):
        judge(difference(math.inf), layers, torch.float32, lambda: Settled(difference(math.inf), {}))


def test_a_network_that_amplifies_even_float64_rounding() -> None:
    exact, inexact = {"a": difference(4e-15)}, {"a": difference(1e-11)}
    found = judge(
        difference(0.2), {"a": difference(1e-6)}, torch.float32, lambda: Settled(difference(6e-9), exact, 2e-9)
    )
    assert found.precision == "float64"
    assert "amplifies even float64 rounding" in found.notes[1]
    settled = Settled(difference(0.4), exact, 0.5, 1e-15)  # of order one: settled by the layers and what is around them
    assert judge(difference(0.9), {"a": difference(1e-6)}, torch.float32, lambda: settled).exact
    for settled in (
        Settled(difference(6e-9), exact, 2e-10),  # more than rounding explains
        Settled(difference(6e-9), inexact, 2e-9),  # a layer that is off by more than rounding
        Settled(difference(0.4), exact, 0.5, 1e-6),  # the model around the layers is another
        Settled(difference(math.inf), exact, math.inf),  # outputs that cannot be compared
    ):
        with pytest.raises(VerificationError, match="in float64 still"):
            judge(difference(0.2), {"a": difference(1e-6)}, torch.float32, lambda settled=settled: settled)


class Chaos(nn.Module):
    """A convolution and a logistic map, which doubles differences at every step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.conv(x))
        for _ in range(self.steps):
            x = 4 * x * (1 - x)
        return x


def test_chaos_is_measured_on_the_network_itself() -> None:
    torch.manual_seed(0)
    model = Chaos(26)
    converted, report = surgeon.convert(model, layers="all", type="acda", example_inputs=torch.rand(2, 3, 8, 8))
    assert report.precision == "float64"
    assert 1e-10 < report.max_rel_error < 1e-5
    assert any("amplifies even float64 rounding" in note for note in report.notes)
    assert surgeon.verify(model, converted, torch.rand(2, 3, 8, 8)).exact


def test_outputs_that_say_nothing_are_settled_by_the_layers_and_what_is_around_them() -> None:
    torch.manual_seed(0)
    model = Chaos(100)
    x = torch.rand(2, 3, 8, 8)
    converted, report = surgeon.convert(model, layers="all", type="acda", example_inputs=x)
    assert report.precision == "float64"
    assert report.max_rel_error is not None
    assert report.max_rel_error > 0.1
    assert any("computing in the converted model the outputs differ by 0.0e+00" in note for note in report.notes)

    assert surgeon.verify(model, converted, x).exact
    converted.steps = 101
    with pytest.raises(VerificationError, match="differs around its layers"):
        surgeon.verify(model, converted, x)


def test_a_wrong_layer_fails_whatever_float64_says() -> None:
    layers = {"good": difference(1e-7), "bad": difference(1e-3), "worse": difference(1e-2)}
    with pytest.raises(VerificationError, match=r"Worst layers: worse 1\.0e-02, bad 1\.0e-03$"):
        judge(difference(1e-7), layers, torch.float32, never)


def test_compressed_conversions_are_stated_not_judged() -> None:
    found = judge(difference(0.3), {"a": difference(0.2)}, torch.float32, never, compressed=True)
    assert not found.exact
    assert found.max_rel_error == 0.3
    assert judge(difference(1e-7), {}, torch.float32, never, compressed=True).exact


def test_a_model_that_does_not_run_in_float64() -> None:
    def fails() -> tuple[Difference, dict[str, Difference]]:
        raise InputError("float expected")

    found = judge(difference(5e-5), {"a": difference(1e-7)}, torch.float32, fails)
    assert "does not run in float64" in found.notes[0]
    with pytest.raises(VerificationError, match="cannot be settled in float64"):
        judge(difference(5e-2), {"a": difference(1e-7)}, torch.float32, fails)


class Chaotic(nn.Module):
    """Amplifies rounding: a hundred steps of a logistic map behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).sigmoid()
        for _ in range(14):
            x = 3.9 * x * (1 - x)
        return x


def test_amplified_rounding_is_settled_by_a_float64_conversion() -> None:
    model = Chaotic()
    converted, report = surgeon.convert(model, layers="all", type="acda", example_inputs=X)
    assert report.max_rel_error is not None
    assert report.max_rel_error <= 1e-10
    assert report.replaced[0].max_rel_error < 1e-5
    assert report.precision == "float64"
    assert report.exact
    assert "amplified by depth" in report.notes[0]
    assert list(dynamic_layers(converted)) == ["conv"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_settled_in_float64(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    _, report = surgeon.convert(model, layers="all", type="acda", example_inputs=X.to(dtype))
    assert report.precision == "float64"
    assert report.max_rel_error is not None
    assert report.max_rel_error <= 1e-10


def test_compressed_conversions_state_their_error() -> None:
    _, report = surgeon.convert(small(), layers="0", type="acda", example_inputs=X, atoms=2, static_atoms=0)
    assert not report.exact
    assert report.max_rel_error is not None
    assert report.max_rel_error > 1e-3
    assert "reported, not bounded" in report.notes[0]


def test_calibration_reaches_the_layers_and_helps() -> None:
    x = X.cumsum(-1).cumsum(-2)  # smooth: far from white
    options: dict[str, Any] = {"layers": "0", "type": "acda", "example_inputs": x, "atoms": 3, "static_atoms": 0}
    model = small()
    _, plain = surgeon.convert(model, **options)
    converted, fitted = surgeon.convert(model, **options, calibration=x)
    assert fitted.replaced[0].max_rel_error < 0.5 * plain.replaced[0].max_rel_error
    assert all(layer.training for layer in dynamic_layers(converted).values())


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", layer_types())
def test_every_new_parameter_gets_a_gradient(kind: str) -> None:
    layer = build_layer(nn.Conv2d(8, 8, 3, padding=1), registry.layer_class(kind), None, 0)
    before = copy.deepcopy(layer.state_dict())
    assert without_gradient(layer) == []
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("kind", layer_types())
def test_a_bias_before_a_norm_does_not_depend_on_rounding(kind: str) -> None:
    torch.manual_seed(0)
    layers = [build_layer(nn.Conv2d(8, 1, 3, padding=1), registry.layer_class(kind), None, seed) for seed in range(6)]
    assert [seed for layer in layers for seed in range(6) if without_gradient(layer, seed)] == []


def test_a_parameter_without_gradient_fails_the_check() -> None:
    model = small()
    with pytest.raises(VerificationError, match=r"0 \(fake\): no gradient reaches reduce\.weight, .* in two steps"):
        surgeon.convert(model, layers="all", type="fake", example_inputs=X, keeps_gradient=False)


def test_zero_weights_are_noted_not_failed() -> None:
    conv = nn.Conv2d(3, 3, 3)
    nn.init.zeros_(conv.weight)
    notes = check_gradients({"zero": build_layer(conv, FakeConv2d, FakeConfig(), 0)})
    assert "zero: its weight is zero or not finite" in notes[0]


# --- verify() -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", layer_types())
def test_verify_two_models(kind: str) -> None:
    model = small()
    converted, _ = surgeon.convert(model, layers="all", type=kind, example_inputs=X)
    found = surgeon.verify(model, converted, X)
    assert found.max_rel_error <= 1e-5
    assert list(found.layers) == ["0", "2"]
    assert found.exact
    with torch.no_grad():
        for _, p in dynamic_layers(converted)["2"].new_parameters():
            p.add_(torch.randn_like(p))
    with pytest.raises(VerificationError, match="Worst layers: 2"):
        surgeon.verify(model, converted, X)


def test_verify_names_a_changed_layer_in_either_order() -> None:
    model = small()
    converted, _ = surgeon.convert(model, layers="0", type="acda", example_inputs=X)
    assert list(surgeon.verify(converted, model, X).layers) == ["0"]
    with torch.no_grad():
        dynamic_layers(converted)["0"].bias.add_(0.3)
    for pair in ((model, converted), (converted, model)):
        with pytest.raises(VerificationError, match=r"layers beyond 1e-04\)\. Worst layers: 0 "):
            surgeon.verify(*pair, X)


def test_verify_takes_a_reverted_model() -> None:
    converted, _ = surgeon.convert(Chaotic(), layers="all", type="acda", example_inputs=X)
    plain = surgeon.revert(copy.deepcopy(converted))
    found = surgeon.verify(converted, plain, X)
    assert (found.precision, list(found.layers)) == ("float64", ["conv"])


def test_verify_says_when_no_layer_was_replaced() -> None:
    other = small()
    with torch.no_grad():
        other[0].bias.add_(0.3)
    with pytest.raises(VerificationError, match=r"in float64 still [1-9].*no layer was replaced[^.]*$"):
        surgeon.verify(small(), other, X)


def test_verify_settles_in_float64_too() -> None:
    model = Chaotic()
    converted, _ = surgeon.convert(model, layers="all", type="acda", example_inputs=X)
    assert surgeon.verify(model, converted, X).precision == "float64"


@pytest.mark.parametrize("kind", ["acda", "pafu", "sekg"])
def test_a_small_change_of_a_layer_is_not_taken_for_rounding(kind: str) -> None:
    model = Chaotic()
    converted, _ = surgeon.convert(model, layers="all", type=kind, example_inputs=X)
    with torch.no_grad():
        dynamic_layers(converted)["conv"].bias.mul_(1 + 3e-5)
    with pytest.raises(VerificationError, match=r"weights differ by more than rounding\)\. Worst layers: conv "):
        surgeon.verify(model, converted, X)
