"""The portable operators are what is exported, and compute what the references compute: outputs, gradients, any geometry."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, nn

from surgeon.layers import layer_types
from surgeon.layers.acda.operator import ACDA_CONV
from surgeon.layers.examples import example, operators
from surgeon.layers.ops.dispatch import Operator
from surgeon.layers.pafu.operator import PAFU_CONV
from surgeon.layers.sekg.blocks import MDCB
from surgeon.layers.sekg.operator import DCONV, DCONV_LAYER
from tests.support.layers.contract import (
    awaken,
    class_of,
    geometries,
    make,
    plain_conv,
    random_input,
    random_source,
    relative_error,
    small_config,
)

FREE = torch.export.Dim.DYNAMIC


def exported(module: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """With batch and image size free; fails where either becomes fixed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, (x,), dynamic_shapes=({0: FREE, 2: FREE, 3: FREE},), strict=False)


def test_every_operator_has_an_example_and_a_portable_backend() -> None:
    assert {o.name for o in operators()} == {"acda_conv", "dconv", "dconv_layer", "pafu_conv"}
    assert all("portable" in operator.backends for operator in operators())


@pytest.mark.parametrize("operator", operators(), ids=lambda o: o.name)
def test_it_is_differentiable_as_the_reference(operator: Operator) -> None:
    args = example(operator, "cpu", torch.float64)
    tensors = [a.requires_grad_() for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    found = [
        torch.autograd.grad(operator(*args, backend=backend).square().sum(), tensors)
        for backend in ("portable", "reference")
    ]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_straight_through_gradient_is_that_of_the_reference() -> None:
    args = list(example(PAFU_CONV, "cpu", torch.float64))
    n, size = args[0].shape[0], args[3].shape[1:]
    args[4] = torch.randn(n, 1 + len(args[2]), *size, dtype=torch.float64).softmax(1).requires_grad_()
    tensors = [args[4], args[0].requires_grad_()]
    found = [torch.autograd.grad(PAFU_CONV(*args, backend=b).sin().sum(), tensors) for b in ("portable", "reference")]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", layer_types())
@settings(max_examples=25)
@given(case=geometries())
def test_layers_compute_the_same_with_it(kind: str, case: Any) -> None:
    geometry, size = case
    assume(not class_of(kind).why_not(geometry, small_config(kind)))
    source = random_source(geometry)
    layer, x = awaken(make(kind, source)).eval(), random_input(source, 2, *size)
    expected = layer(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgeon.layers.ops.dispatch.exporting", lambda: True)
        assert relative_error(layer(x), expected) <= 2e-5


@pytest.mark.parametrize(
    ("operator", "groups"), [(DCONV, (2, 16, 32)), (DCONV_LAYER, (2, 16))], ids=lambda v: getattr(v, "name", "")
)
def test_kernels_may_be_shared_or_several(operator: Operator, groups: tuple[int, ...]) -> None:
    args = list(example(operator, "cpu", torch.float64))
    for count in groups:
        if operator is DCONV:
            args[1] = torch.randn(2, count, 9, 12, 12, dtype=torch.float64)
        else:  # three output channels for each input channel
            args[2], args[3] = torch.randn(9 * count, 16, dtype=torch.float64), torch.randn(48, 1, 3, 3).double()
            args[4] = torch.randn(48, dtype=torch.float64)
        torch.testing.assert_close(operator(*args, backend="portable"), operator(*args, backend="reference"))


def test_outside_of_an_export_it_is_not_chosen() -> None:
    for operator in operators():
        assert operator.choose(*example(operator, "cpu", torch.float32)).name in ("native", "torch")


GEOMETRIES: list[dict[str, Any]] = [{}, {"groups": 6, "out_channels": 12, "stride": 2}, {"padding_mode": "reflect"}]


@pytest.mark.parametrize("changes", GEOMETRIES, ids=["plain", "depthwise-strided", "reflect"])
@pytest.mark.parametrize("kind", layer_types())
def test_exported_programs_are_ordinary_torch_with_free_sizes(kind: str, changes: dict[str, Any]) -> None:
    layer = awaken(make(kind, plain_conv(**changes))).eval()
    program = exported(layer, torch.randn(2, 6, 16, 18))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [name for name in called if "surgeon" in name]
    for shape in ((1, 6, 16, 18), (3, 6, 13, 21)):
        x = torch.randn(shape)
        assert relative_error(program.module()(x), layer(x)) <= 1e-5


def test_a_block_of_adfnet_exports_with_free_sizes() -> None:
    block = MDCB(16, 8).eval()
    with torch.no_grad():
        block.kernels.generator.weight.normal_(std=0.1)
    program = exported(block, torch.randn(2, 16, 12, 14))
    x = torch.randn(3, 16, 9, 11)
    assert relative_error(program.module()(x), block(x)) <= 1e-5


# --- torch.func ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(layer_types()))
def test_vmap_and_gradients_of_every_sample(kind: str) -> None:
    layer = awaken(make(kind, plain_conv())).double().eval()
    parameters = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (image[None],)).square().sum()

    torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], layer(x))
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, image in enumerate(x):
        layer.zero_grad()
        layer(image[None]).square().sum().backward()
        for name, gradient in found.items():
            expected = layer.get_parameter(name).grad
            expected = torch.zeros_like(gradient[i]) if expected is None else expected  # a selector in eval mode
            torch.testing.assert_close(gradient[i], expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, in jvp
@pytest.mark.parametrize("operator", operators(), ids=lambda o: o.name)
def test_a_hessian_vector_product(operator: Operator) -> None:
    """Forward over reverse, against differences of the gradient."""
    args = example(operator, "cpu", torch.float64)
    x, direction = args[0], torch.randn_like(args[0])

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: operator(x, *args[1:]).pow(3).sum())(x)

    _, product = torch.func.jvp(gradient, (x,), (direction,))
    by_difference = (gradient(x + 1e-6 * direction) - gradient(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(product, by_difference, rtol=1e-5, atol=1e-5)


def test_acda_in_half_precision_stays_close() -> None:
    args = example(ACDA_CONV, "cpu", torch.bfloat16)
    expected = ACDA_CONV(*args, backend="reference")
    found = ACDA_CONV(*args, backend="portable")
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) <= 1e-2
