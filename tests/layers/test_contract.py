"""One contract for every registered layer type."""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from surgeon.errors import GeometryError
from surgeon.layers import ConvGeometry, DynamicConv2d, layer_types
from surgeon.visualize.adaptivity import measure, observed
from tests.support.layers.contract import (
    VARIANTS,
    awaken,
    class_of,
    counted_macs,
    geometries,
    make,
    plain_conv,
    random_input,
    random_source,
    relative_error,
    small_config,
)

every_type = pytest.mark.parametrize("type_name", [*layer_types(), *VARIANTS])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def accepts(type_name: str, geometry: ConvGeometry) -> bool:
    return not class_of(type_name).why_not(geometry, small_config(type_name))


@every_type
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=geometries(), double=st.booleans())
def test_birth_is_exact_for_every_geometry(type_name: str, case: Any, double: bool) -> None:
    geometry, size = case
    assume(accepts(type_name, geometry))
    source = random_source(geometry, torch.float64 if double else torch.float32)
    layer = make(type_name, source).eval()
    x = random_input(source, 2, *size)
    with torch.no_grad():
        expected = source.conv2d(x)
        for adaptive in (True, False):
            layer.adaptive = adaptive
            y = layer(x)
            assert y.dtype == expected.dtype
            assert relative_error(y, expected) <= (1e-10 if double else 1e-5)


@every_type
def test_default_options_are_exact(type_name: str) -> None:
    conv, x = plain_conv(in_channels=16, out_channels=16, stride=2), torch.randn(2, 16, 15, 17)
    options = VARIANTS.get(type_name, (type_name, {}))[1]
    kind = class_of(type_name)
    layer = kind.from_conv(conv, kind.Config(**options)).eval()
    assert relative_error(layer(x), conv(x)) <= 1e-5


@every_type
@pytest.mark.parametrize(
    "changes", [{}, {"groups": 2, "stride": 2, "bias": False}, {"groups": 6, "out_channels": 12, "dilation": 2}]
)
def test_gradients_are_those_of_finite_differences(type_name: str, changes: dict[str, Any]) -> None:
    source = plain_conv(dtype=torch.float64, **changes)
    layer = awaken(make(type_name, source)).eval()
    x = torch.randn(1, 6, 5, 6, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return y

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@every_type
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_half_precision_stays_close(type_name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Both for a convolution that is of that dtype and for a layer that is converted to it."""
    conv, x = plain_conv(), torch.randn(2, 6, 9, 8)
    half = copy.deepcopy(conv).to(dtype)
    born = make(type_name, half).eval()
    assert {p.dtype for p in born.parameters()} == {dtype}
    with torch.no_grad():
        assert relative_error(born(x.to(dtype)), half.float()(x.to(dtype).float())) <= tolerance
        layer = awaken(make(type_name, conv)).eval()
        layer.adaptive = False
        expected = layer(x)
        y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, expected) <= tolerance


@every_type
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_trains(type_name: str, training: bool) -> None:
    layer = awaken(make(type_name, plain_conv(dtype=torch.bfloat16))).train(training)
    x = torch.randn(2, 6, 9, 8).bfloat16().requires_grad_()
    layer(x).float().square().mean().backward()
    grads = [p.grad for p in (x, *layer.parameters()) if p.grad is not None]
    assert len(grads) > 2
    assert all(bool(grad.isfinite().all()) and grad.dtype == torch.bfloat16 for grad in grads)


@every_type
def test_autocast_gives_what_a_convolution_gives(type_name: str) -> None:
    conv, x = plain_conv(), torch.randn(2, 6, 9, 8)
    layer = make(type_name, conv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = conv(x)
        for training in (True, False):
            y = layer.train(training)(x)
            assert y.dtype == expected.dtype == torch.bfloat16
    assert relative_error(y, expected) <= 6e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer.train()(x).float().square().mean()
    loss.backward()
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    assert all(bool(grad.isfinite().all()) and grad.dtype == torch.float32 for grad in grads)


@every_type
def test_channels_last_changes_nothing(type_name: str) -> None:
    layer = awaken(make(type_name, plain_conv())).eval()
    x = torch.randn(2, 6, 9, 8)
    expected = layer(x)
    last = layer.to(memory_format=torch.channels_last)
    y = last(x.to(memory_format=torch.channels_last))
    assert relative_error(y, expected) <= 1e-5


@every_type
def test_a_state_dict_rebuilds_the_layer(type_name: str) -> None:
    """From geometry and config alone, through plain JSON values, without any pickled object."""
    layer = awaken(make(type_name, plain_conv(groups=2))).eval()
    geometry = ConvGeometry.from_dict(layer.geometry.to_dict())
    rebuilt = type(layer)(geometry, layer.Config.from_dict(layer.config.to_dict())).eval()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    rebuilt.load_state_dict(torch.load(file, weights_only=True))
    assert all(t.is_contiguous() for t in rebuilt.state_dict().values())  # safetensors takes no others
    x = torch.randn(2, 6, 9, 8)
    assert torch.equal(rebuilt(x), layer(x))


@every_type
def test_a_deep_copy_is_equal_and_independent(type_name: str) -> None:
    layer = awaken(make(type_name, plain_conv())).eval()
    x = torch.randn(2, 6, 9, 8)
    expected = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), expected)


class LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, DynamicConv2d) or super().is_leaf_module(m, module_qualified_name)


@every_type
def test_it_is_one_leaf_of_a_graph(type_name: str) -> None:
    model = nn.Sequential(make(type_name, plain_conv()), nn.ReLU()).eval()
    graph = LeafTracer().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1"]
    x = torch.randn(2, 6, 9, 8)
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))


@every_type
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch.compile
def test_it_compiles_as_one_graph(type_name: str, backend: str) -> None:
    torch.compiler.reset()
    layer = awaken(make(type_name, plain_conv(stride=2)))
    x = torch.randn(2, 6, 9, 8)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    layer.eval()
    assert relative_error(compiled(x), layer(x)) <= 1e-5
    layer.train()
    compiled(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


@every_type
@pytest.mark.parametrize("changes", [{}, {"groups": 6, "out_channels": 12}, {"stride": 2, "bias": False}])
def test_every_new_parameter_learns_within_two_steps(type_name: str, changes: dict[str, Any]) -> None:
    layer = make(type_name, plain_conv(**changes)).train()
    before = {name: parameter.detach().clone() for name, parameter in layer.new_parameters()}
    own = {id(parameter): name for name, parameter in layer.named_parameters()}
    assert before
    assert all(own[id(parameter)] == name for name, parameter in layer.new_parameters())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    torch.manual_seed(0)
    x, target = torch.randn(4, 6, 9, 8), None
    seen: dict[str, float] = dict.fromkeys(before, 0.0)
    for _ in range(2):
        y = layer(x)
        target = torch.randn_like(y) if target is None else target
        optimizer.zero_grad()
        (y - target).square().sum().backward()
        optimizer.step()
        for name, parameter in layer.new_parameters():
            seen[name] = max(seen[name], 0.0 if parameter.grad is None else float(parameter.grad.abs().max()))
    still = [name for name, parameter in layer.new_parameters() if torch.equal(parameter, before[name])]
    assert not [name for name, value in seen.items() if value == 0]
    assert not still


@every_type
def test_switched_off_it_is_its_static_convolution(type_name: str) -> None:
    layer = awaken(make(type_name, plain_conv(stride=2, padding=2))).eval()
    x = torch.randn(2, 6, 9, 8)
    adaptive = layer(x)
    layer.adaptive = False
    assert torch.equal(layer(x), layer.static_conv2d(x))
    assert not torch.equal(layer(x), adaptive)
    assert layer.weight.shape[:2] == (8, 6)
    assert torch.equal(layer.weight, layer.static_weight())
    layer(x).sum().backward()  # the static weight is differentiable


@every_type
def test_it_takes_over_what_the_convolution_was(type_name: str) -> None:
    conv = plain_conv(dtype=torch.float64, stride=(2, 1), padding=(1, 2)).eval()
    for trainable in (True, False):
        conv.requires_grad_(trainable)
        layer = make(type_name, conv)
        new = {id(parameter) for _, parameter in layer.new_parameters()}
        assert all(parameter.requires_grad for _, parameter in layer.new_parameters())
        assert all(p.requires_grad is trainable for p in layer.parameters() if id(p) not in new)
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
        assert {p.device for p in layer.parameters()} == {conv.weight.device}
    assert not layer.training
    assert all(not module.training for module in layer.modules())
    assert make(type_name, conv.train()).training
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(conv, name)


@every_type
def test_the_convolution_is_left_alone(type_name: str) -> None:
    conv = plain_conv()
    weight = conv.weight.detach().clone()
    with torch.no_grad():
        for parameter in make(type_name, conv).parameters():
            parameter.zero_()
    assert torch.equal(conv.weight, weight)


@every_type
@pytest.mark.parametrize("shape", [(6, 8), (5, 9, 8), (2, 5, 9, 8), (2, 6, 2, 9)])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_wrong_input_is_one_clear_error(type_name: str, shape: tuple[int, ...], adaptive: bool) -> None:
    layer = make(type_name, plain_conv(padding=0))
    layer.adaptive = adaptive
    said = "too small" if shape == (2, 6, 2, 9) else r"expects an input \(N, 6, H, W\)"
    with pytest.raises(GeometryError, match=said):
        layer(torch.zeros(shape))


@every_type
def test_one_image_needs_no_batch(type_name: str) -> None:
    layer = make(type_name, plain_conv()).eval()
    awaken(layer)
    x = torch.randn(2, 6, 9, 8)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    with observed(nn.Sequential(layer)) as found:
        layer(x[0])
    assert found == [measure("0", layer, x[:1])]


@every_type
def test_an_empty_batch_gives_an_empty_output(type_name: str) -> None:
    layer = make(type_name, plain_conv(stride=2))
    for training in (True, False):
        assert layer.train(training)(torch.zeros(0, 6, 9, 8)).shape == (0, 8, 5, 4)


@every_type
@settings(max_examples=10, deadline=None, derandomize=True)
@given(case=geometries())
def test_declared_macs_are_those_of_the_formula(type_name: str, case: Any) -> None:
    geometry, size = case
    assume(accepts(type_name, geometry))
    layer = make(type_name, random_source(geometry)).eval()
    declared = layer.macs(*size)
    assert declared > 0
    assert declared == counted_macs(layer, *size)
