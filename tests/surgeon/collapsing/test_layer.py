"""One layer that is folded: what proves that it does not vary, what it becomes, and how much it varies."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import surgeon
from surgeon.collapsing.evidence import Watch, prove, settled
from surgeon.layers import ACDAConv2d, ConvGeometry, DynamicConv2d, PAFUConfig, PAFUConv2d, SEKGConv2d, layer_class
from surgeon.layers.sekg.factors import composes
from surgeon.surgery.rewrite import plain_convolution
from tests.support.layers.constant import VARIANTS, shift_static, vary
from tests.support.layers.contract import (
    awaken,
    geometries,
    make,
    plain_conv,
    random_input,
    random_source,
    relative_error,
    small_config,
)

# --- one layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=lambda v: str(v))
@settings(max_examples=25)
@given(found=geometries(), seed=st.integers(0, 5))
def test_a_layer_that_cannot_vary_folds_exactly(
    kind: str, options: dict[str, Any], found: tuple[ConvGeometry, tuple[int, int]], seed: int
) -> None:
    geometry, size = found
    if options.get("supports") and layer_class(kind).why_not(geometry, small_config(kind, **options)):
        return
    source = random_source(geometry, torch.float64, seed=seed)
    layer = shift_static(make(kind, source, **options).double(), seed=seed).eval()
    evidence = prove(layer)
    assert evidence is not None
    assert (evidence.kind, evidence.variation) == ("parameters", 0)
    if not layer.static_is_exact():
        assert kind == "sekg"
        with pytest.raises(surgeon.SurgeonError, match="differ from one near the borders"):
            plain_convolution(settled(layer, evidence))
        return
    conv = plain_convolution(settled(layer, evidence))
    x = random_input(source, 2, *size)
    with torch.no_grad():
        assert relative_error(conv(x), layer(x)) <= 1e-10


@settings(max_examples=60)
@given(found=geometries(), kernel_size=st.integers(1, 4), bias=st.booleans())
def test_a_dense_sekg_layer_merges_where_its_padding_permits(
    found: tuple[ConvGeometry, tuple[int, int]], kernel_size: int, bias: bool
) -> None:
    geometry, size = found
    source = random_source(geometry, torch.float64)
    layer = shift_static(make("sekg", source, mode="dense", kernel_size=kernel_size).double()).eval()
    x = random_input(source, 1, *size)
    no_bias = layer.bias is None
    assert layer.static_is_exact() == (kernel_size == 1 or (no_bias and composes(geometry)))
    if layer.static_is_exact():
        conv = plain_convolution(layer)
        with torch.no_grad():
            assert relative_error(conv(x), layer(x)) <= 1e-10


def test_which_paddings_permit_to_merge() -> None:
    def geometry(**changes: Any) -> ConvGeometry:
        return ConvGeometry(**({"in_channels": 2, "out_channels": 2, "kernel_size": (3, 3)} | changes))

    assert composes(geometry(kernel_size=(1, 1)))
    assert composes(geometry(kernel_size=(1, 1), stride=(2, 2)))
    assert composes(geometry(padding=(2, 2, 2, 2)))
    assert not composes(geometry(padding=(1, 1, 1, 1)))
    assert not composes(geometry(padding=(2, 2, 2, 2), padding_mode="reflect"))
    assert not composes(geometry(padding="tf_same"))


@settings(max_examples=20)
@given(found=geometries(), seed=st.integers(0, 3))
def test_any_constant_code_folds_exactly(found: tuple[ConvGeometry, tuple[int, int]], seed: int) -> None:
    geometry, size = found
    source = random_source(geometry, torch.float64)
    x = random_input(source, 2, *size)
    for kind, options in (("acda", {}), ("sekg", {"mode": "factorised", "norm": None}), ("pafu", PAFUConfig.paper)):
        layer = make(kind, source, **options).double().eval()
        before = layer.code(x)
        assert before is not None
        code = before.new_zeros(before.shape[1])
        code[seed % len(code)] = 1.0 + (kind != "pafu")
        with torch.no_grad():
            twin = copy.deepcopy(layer)
            twin.fix(code)
            if isinstance(layer, SEKGConv2d):  # the generator gives this code where its features are one
                layer.dconv.generator.spatial.weight.zero_()
                layer.dconv.generator.spatial.bias.fill_(1.0)
                layer.dconv.generator.channel.weight.zero_()
                layer.dconv.generator.weight[:, 0] = code
            else:
                layer.fix(code)
            after = layer.code(x)
            assert after is not None
            assert relative_error(after, code[None, :, None, None].expand_as(after)) < 1e-12
            assert relative_error(plain_convolution(twin)(x), layer(x)) <= 1e-10


def test_the_selection_is_proved_from_a_bound_on_the_logits() -> None:
    layer = make("pafu", plain_conv(), **PAFUConfig.paper)
    assert isinstance(layer, PAFUConv2d)
    with torch.no_grad():
        layer.selector.expand.weight.normal_(std=0.01)
        layer.selector.set_static_output(torch.tensor([0.0, 20.0, 0.0]))
    found = prove(layer)
    assert found is not None
    assert found.code is not None
    assert found.code.argmax() == 1
    with torch.no_grad():
        difference = (layer.selector.expand.weight[1] - layer.selector.expand.weight[0]).abs().sum()
        layer.selector.set_static_output(torch.tensor([0.0, 0.99 * float(difference), -1e3]))
    assert prove(layer) is None  # some hidden map could choose kernel 0


def test_a_layer_whose_dynamic_part_is_off_folds_whatever_its_generator_says() -> None:
    layer = awaken(make("acda", plain_conv()))
    assert prove(layer) is None
    layer.adaptive = False
    found = prove(layer)
    assert found is not None
    assert found.kind == "off"
    x = torch.randn(1, 6, 9, 9)
    with torch.no_grad():
        assert relative_error(plain_convolution(settled(layer, found))(x), layer(x)) < 1e-5


def test_atoms_without_coefficients_do_not_count_as_varying() -> None:
    layer = make("acda", plain_conv())
    assert isinstance(layer, ACDAConv2d)
    with torch.no_grad():
        layer.generator.expand.weight.normal_()
    assert prove(layer) is None
    with torch.no_grad():
        layer.coeff[:, :, : layer.config.atoms] = 0
    assert prove(layer) is not None


# --- variation ----------------------------------------------------------------------------------------------------


def filters(layer: DynamicConv2d, codes: Tensor) -> Tensor:
    """The filter that goes with every row of codes, from the layer's own static filter."""
    found = []
    for code in codes:
        twin = copy.deepcopy(layer)
        twin.fix(code)
        found.append(twin.dconv.static if isinstance(twin, SEKGConv2d) else twin.static_weight())
    return torch.stack([weight.detach().flatten() for weight in found])


@pytest.mark.parametrize(
    ("kind", "options"), [("acda", {}), ("pafu", {}), ("sekg", {}), ("sekg", {"kernel_groups": 2})], ids=str
)
def test_the_variation_is_that_of_the_filters(kind: str, options: dict[str, Any]) -> None:
    layer = vary(make(kind, plain_conv().double(), **options), 0.05).eval()
    x = torch.randn(2, 6, 6, 6, dtype=torch.float64)
    watch = Watch(layer)
    watch.look(x[:1])
    watch.look(x[1:])
    found = watch.evidence()
    assert found is not None
    assert found.code is not None
    code = layer.code(x)
    assert code is not None
    rows = code.detach().flatten(2).transpose(1, 2).flatten(0, 1)
    every, at = filters(layer, rows), filters(layer, found.code[None])
    expected = (every - at).square().sum(1).mean().sqrt() / at.norm()
    assert found.variation == pytest.approx(float(expected), rel=1e-9)
    assert found.pixels == len(rows)
    assert found.variation > 0


def test_a_layer_that_moves_by_a_hair_is_not_constant() -> None:
    layer = make("acda", plain_conv().double()).eval()
    assert isinstance(layer, ACDAConv2d)
    with torch.no_grad():
        layer.generator.expand.weight.fill_(1e-170)
    watch = Watch(layer)
    watch.look(torch.randn(1, 6, 6, 6, dtype=torch.float64))
    found = watch.evidence()
    assert found is not None
    assert 0 <= found.variation < 1e-100
    assert (found.variation == 0) == (not watch.moved)
