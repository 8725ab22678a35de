"""FLOP formulas against counting by hand and against the reference implementations."""

from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from surgeon.costs import FlopCounter, UnknownOperatorError, register_formula
from surgeon.costs.build import option_layer
from surgeon.costs.emulate import cuda_dispatch
from surgeon.costs.flops import is_zero
from surgeon.costs.table import Option
from surgeon.costs.trace import Tracker
from surgeon.errors import GeometryError
from surgeon.layers.acda import flops as acda_flops
from surgeon.layers.acda.reference import acda_conv_reference
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.registry import layer_class, layer_types

META = torch.device("meta")


def counted(run: Any, *, backward: bool = False, strict: bool = True) -> tuple[int, int]:
    """FLOPs of what `run` does, forward and (of the sum of its result) backward."""
    tracker = Tracker(nn.Identity(), FlopCounter(strict))
    with tracker, cuda_dispatch(None):
        tracker.begin("forward")
        out = run()
        if backward:
            tracker.begin("backward")
            out.backward(torch.empty_like(out))
    flops = {"forward": 0, "backward": 0}
    for op in tracker.trace.ops:
        flops[op.phase] += op.flops
    return flops["forward"], flops["backward"]


def meta(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=META, requires_grad=grad, dtype=dtype)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]),
    st.integers(1, 2), st.integers(1, 2), st.booleans(),
)  # fmt: skip
@settings(max_examples=25)
def test_convolutions_of_any_grouping_cost_the_same_forward_and_for_each_gradient(
    batch: int, inputs: int, outputs: int, groups: int, kernel: int, stride: int, dilation: int, transposed: bool
) -> None:
    c_in, c_out = inputs * groups, outputs * groups
    x = meta(batch, c_in, 9, 11, grad=True)
    cls: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = cls(c_in, c_out, kernel, stride=stride, dilation=dilation, groups=groups, device=META)
    y = conv(x)
    pixels = prod((x if transposed else y).shape[2:])
    macs = batch * pixels * c_in * c_out // groups * kernel**2
    assert counted(lambda: conv(x), backward=True) == (2 * macs, 4 * macs)


def test_unfold_costs_nothing_and_the_products_after_it_do() -> None:
    x, weight = meta(2, 3, 8, 8, grad=True), meta(2, 27, 36, grad=True)
    forward, backward = counted(lambda: (F.unfold(x, 3) * weight).sum(1), backward=True)
    assert forward == 2 * weight.numel()
    assert backward == 0  # gradients of products are products without a sum


def test_a_product_that_is_not_summed_costs_nothing() -> None:
    a, b = meta(4, 5), meta(4, 5)
    assert counted(lambda: a * b + a) == (0, 0)
    assert counted(lambda: (a * b).sum()) == (2 * 20, 0)
    assert counted(lambda: (a * b)[:, :2].sum()) == (0, 0)


def test_elementwise_sum_of_products_equals_einsum() -> None:
    a, b = meta(2, 6, 7), meta(2, 6, 7)
    assert counted(lambda: (a * b).sum(1)) == counted(lambda: torch.einsum("nkp,nkp->np", a, b)) == (2 * 84, 0)


@pytest.mark.parametrize(("mode", "taps"), [("bilinear", 4), ("nearest", 0), ("bicubic", 20)])
def test_grid_sample_costs_its_taps(mode: str, taps: int) -> None:
    x, grid = meta(2, 3, 8, 8, grad=True), meta(2, 5, 6, 2, grad=True)
    samples = 2 * 3 * 5 * 6
    forward, backward = counted(lambda: F.grid_sample(x, grid, mode=mode, align_corners=False), backward=True)
    assert (forward, backward) == (2 * taps * samples, 6 * taps * samples)


@pytest.mark.parametrize("masked", [False, True])
def test_deformable_convolution_costs_a_convolution_and_its_samples(masked: bool) -> None:
    x, weight, offset = meta(2, 4, 8, 8, grad=True), meta(6, 4, 3, 3, grad=True), meta(2, 18, 8, 8)
    mask = meta(2, 9, 8, 8) if masked else None
    macs, samples = 2 * 64 * weight.numel(), 2 * 64 * 4 * 9
    forward, backward = counted(
        lambda: torchvision.ops.deform_conv2d(x, offset, weight, padding=1, mask=mask), backward=True
    )
    assert forward == 2 * (macs + samples * (5 if masked else 4))
    assert backward == 2 * (2 * macs + samples * (23 if masked else 16))


def test_an_unknown_operator_is_listed_or_an_error() -> None:
    name = "surgeon_test::mystery"
    mystery = torch.library.custom_op(name, lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor")
    mystery.register_fake(torch.empty_like)
    counter, x = FlopCounter(), meta(3, 4)
    with Tracker(nn.Identity(), counter) as tracker:
        tracker.begin("forward")
        torch.ops.surgeon_test.mystery(x)
        torch.ops.surgeon_test.mystery(x)
    assert counter.unknown == {name: 2}
    with pytest.raises(UnknownOperatorError, match="surgeon_test::mystery"):
        counted(lambda: torch.ops.surgeon_test.mystery(x))
    register_formula(name)(lambda out, x: 7 * x.numel())
    assert counted(lambda: torch.ops.surgeon_test.mystery(x)) == (84, 0)


# --- our own operators and layers -----------------------------------------------------------------------------------


@given(
    st.integers(2, 3), st.integers(1, 3), st.sampled_from([1, 3]), st.integers(2, 4), st.integers(0, 2), st.integers(2, 5),
    st.sampled_from([3, 5]), st.integers(1, 2),
)  # fmt: skip
@settings(max_examples=25)
def test_acda_formula_is_what_its_reference_does(
    inputs: int, outputs: int, groups: int, atoms: int, static: int, elements: int, window: int, stride: int
) -> None:
    # Sums have at least two terms: einsum computes those of one term by a product, which is no multiply-accumulate.
    x = meta(2, inputs * groups, 9, 10)
    out = [(size - 1) // stride + 1 for size in (9, 10)]
    tensors = (
        meta(2, atoms * elements, *out),
        meta(elements, window, window),
        meta(static, window, window),
        meta(outputs * groups, inputs, atoms + static),
    )
    geometry = ([stride] * 2, [window // 2] * 2, [1, 1], groups)
    reference = counted(lambda: acda_conv_reference(x, *tensors, *geometry))
    assert counted(lambda: torch.ops.surgeon.acda_conv(x, *tensors, *geometry)) == reference


geometries = st.builds(
    lambda c_in, c_out, groups, kernel, stride, dilation, pad, bias: ConvGeometry(
        in_channels=c_in * groups,
        out_channels=c_out * groups,
        kernel_size=kernel,
        stride=(stride, stride),
        padding=(pad, pad, pad, pad),
        dilation=(dilation, dilation),
        groups=groups,
        bias=bias,
    ),
    st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 2, 4]),
    st.sampled_from([(1, 1), (3, 3), (5, 5), (3, 1), (2, 2)]), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2),
    st.booleans(),
)  # fmt: skip


@pytest.mark.parametrize("kind", layer_types())
@given(geometry=geometries)
@settings(max_examples=12)
def test_declared_macs_are_what_a_layer_does(kind: str, geometry: ConvGeometry) -> None:
    if layer_class(kind).why_not(geometry, layer_class(kind).Config()):
        return
    layer = option_layer(geometry, Option(kind, {}), {}).eval()
    x = meta(1, geometry.in_channels, 9, 12)
    try:
        declared = layer.macs(9, 12)
    except GeometryError:
        return
    # ACDA may fold its static atoms into one weight, once a call whatever the image: declared MACs, for one image, leave it out.
    folding = prod(geometry.weight_shape) * len(layer.static_atoms) if getattr(layer, "folds_static", False) else 0
    assert counted(lambda: layer(x))[0] == 2 * (declared + folding)


@pytest.mark.parametrize("kind", layer_types())
def test_torch_counts_a_layer_as_the_cost_model_does(kind: str) -> None:
    """`FlopCounterMode` has the formulas of our operators. Its backward pass of grouped convolutions counts too much."""
    geometry = ConvGeometry(in_channels=8, out_channels=8, kernel_size=(3, 3), padding=(1, 1, 1, 1))
    layer = option_layer(geometry, Option(kind, {}), {}).train()
    x = meta(2, 8, 9, 12)
    tracker = Tracker(nn.Identity(), FlopCounter(strict=True))
    with tracker, cuda_dispatch(None):
        tracker.begin("forward")
        out = layer(x)
        tracker.begin("backward")
        out.backward(torch.empty_like(out))
    ops = tracker.trace.ops
    with FlopCounterMode(display=False) as theirs:
        y = layer(x)
    assert theirs.get_total_flops() == sum(op.flops for op in ops if op.phase == "forward") > 0
    with FlopCounterMode(display=False) as theirs:
        y.backward(torch.empty_like(y))
    counts = theirs.get_flop_counts()["Global"].items()
    own = sum(op.flops for op in ops if op.phase == "backward" and op.name.startswith("surgeon::"))
    assert sum(flops for op, flops in counts if str(op).startswith("surgeon.")) == own > 0


@pytest.mark.parametrize(("size", "conv", "acda"), [(3, 5900.8, 4073.0), (5, 16386.6, 4318.7), (7, 32115.2, 4687.4)])
def test_table_6_of_the_acda_paper(size: int, conv: float, acda: float) -> None:
    """MACs in millions plus one addition an output element for the bias; 256 channels, 100×100, m = 6 atoms."""
    x, layer = meta(1, 256, 100, 100), nn.Conv2d(256, 256, size, padding=size // 2, device=META)
    bias = 256 * 100 * 100
    assert round((counted(lambda: layer(x))[0] / 2 + bias) / 1e6, 1) == conv
    tensors = (meta(1, 6 * 6, 100, 100), meta(6, size, size), meta(0, size, size), meta(256, 256, 6))
    _, filtering, mixing = acda_flops._macs(*(t.shape for t in (x, *tensors)))
    assert round((filtering + mixing + bias) / 1e6, 1) == acda
    whole = counted(lambda: torch.ops.surgeon.acda_conv(x, *tensors, [1, 1], [size // 2] * 2, [1, 1], 1))[0]
    assert whole == 2 * (filtering + mixing + 100 * 100 * 6 * 6 * size**2)


@pytest.mark.parametrize(
    "name", ["relu6", "hardswish", "mish", "gelu", "rrelu", "threshold", "abs", "add", "floor_divide"]
)
def test_pointwise_operators_are_known_in_place_too(name: str) -> None:
    for form in (name, f"{name}_"):
        packet = getattr(torch.ops.aten, form)
        tensor_forms = [o for o in packet.overloads() if "Tensor" in str(getattr(packet, o)._schema).split(")")[0]]
        assert tensor_forms
        assert all(is_zero(getattr(packet, o)) for o in tensor_forms if "out" not in o)


def test_regions_are_four_taps_a_sample() -> None:
    x, rois = torch.empty(1, 5, 16, 16, device=META), torch.empty(3, 5, device=META)
    x.requires_grad_()
    forward, backward = counted(lambda: torchvision.ops.roi_align(x, rois, (7, 6), sampling_ratio=3), backward=True)
    assert forward == backward == 2 * 4 * (3 * 5 * 7 * 6) * 9
