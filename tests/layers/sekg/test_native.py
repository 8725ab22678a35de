"""The compiled DConv, kernels given or generated: the reference's numbers, the same whatever the threads."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgeon.layers.sekg.operator import DCONV, DCONV_LAYER, dconv, dconv_layer
from tests.support.layers.native import (
    FEW,
    HALF,
    NEEDS_LIBRARY,
    PROPERTY,
    SPOILED,
    Pair,
    check_close,
    check_half,
    check_spread,
    check_threads,
    doubled,
    gradients,
    pairs,
    sizes,
)

pytestmark = NEEDS_LIBRARY


def problem(
    *,
    spare: Pair = (5, 6),
    window: Pair = (3, 3),
    stride: Pair = (1, 1),
    padding: Pair = (1, 1),
    dilation: Pair = (1, 1),
    channels: int = 4,
    kernels: int = 4,
    images: int = 2,
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    size, out = sizes(spare, window, stride, padding, dilation)
    x = torch.randn(images, channels, *size, requires_grad=True)
    given = torch.randn(images, kernels, window[0] * window[1], *out, requires_grad=True)
    return (x, given), {"kernel_size": window, "stride": stride, "padding": padding, "dilation": dilation}


def results(tensors: tuple[Tensor, Tensor], options: dict[str, Any], backend: str) -> list[Tensor]:
    y = dconv(*tensors, **options, backend=backend)
    return [y, *gradients(y, tensors)]


def check(tensors: tuple[Tensor, Tensor], options: dict[str, Any]) -> None:
    """Against the reference in float64."""
    x, kernels = doubled(tensors)
    check_close(results(tensors, options, "native"), results((x, kernels), options, "reference"))


@PROPERTY
@given(
    window=pairs(1, 5),
    stride=pairs(1, 4),
    padding=pairs(0, 3),
    dilation=pairs(1, 3),
    spare=pairs(0, 40),
    shared=st.sampled_from([(1, 1), (4, 1), (6, 3), (5, 5), (2, 6), (1, 3)]),
    images=st.integers(1, 3),
)
def test_native_is_the_reference(shared: Pair, **options: Any) -> None:
    check(*problem(channels=shared[0], kernels=shared[1], **options))


@pytest.mark.parametrize("width", [3, 7, 14])
def test_small_maps_of_any_number_of_vectors(width: int) -> None:
    for height in range(1, 30):  # to more than registers hold
        for window in ((3, 3), (2, 3)):
            size: dict[str, Pair] = {"spare": (height - 1, width - 1), "window": window, "padding": (0, 0)}
            (x, kernels), options = problem(channels=2, kernels=2, images=1, **size)
            assert kernels.shape[-2:] == (height, width)
            found = dconv(x, kernels, **options, backend="native")
            check_close([found], [dconv(*doubled((x, kernels)), **options, backend="reference")])


def test_a_channel_that_is_cut_into_bands() -> None:
    check(*problem(spare=(300, 260), window=(5, 3), dilation=(2, 1), channels=1, kernels=2, images=1))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    tensors, options = problem(spare=(20, 30), channels=12, kernels=6)
    check_threads(lambda: results(tensors, options, "native"), 2, 5)


def test_only_inputs_are_saved_for_backward() -> None:
    tensors, options = problem()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dconv(*tensors, **options, backend="native")
    assert saved
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in tensors}


@pytest.mark.parametrize("missing", [0, 1])
def test_a_gradient_alone_is_that_gradient(missing: int) -> None:
    tensors, options = problem()
    expected = results(tensors, options, "native")[2 - missing]
    alone = tuple(t.detach().requires_grad_(i != missing) for i, t in enumerate(tensors))
    y = dconv(*alone, **options, backend="native")
    assert torch.equal(gradients(y, [alone[1 - missing]])[0], expected)


@HALF
@pytest.mark.parametrize("kernels", [2, 4, 8])
def test_half_precision_is_computed_in_float32(kernels: int, dtype: torch.dtype) -> None:
    tensors, geometry = problem(kernels=kernels, stride=(2, 1))
    check_half(lambda given, backend: results((given[0], given[1]), geometry, backend), tensors, dtype)
    x, given = (t.detach().to(dtype) for t in tensors)
    assert DCONV.choose(x, given, *geometry.values()).name == "native"
    assert DCONV.why_not("native", x, tensors[1], *geometry.values()) == [
        f"its tensors are of different dtypes ({dtype}, torch.float32)"
    ]


@FEW
@given(
    **SPOILED,
    kernels=st.sampled_from([1, 2, 4, 8]),
)
def test_what_is_no_number_spoils_only_what_sees_it(where: float, **options: Any) -> None:
    tensors, geometry = problem(**options)
    backends = ("reference", "native", "torch")
    check_spread(lambda given, backend: results((given[0], given[1]), geometry, backend), tensors, backends, where)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_registration() -> None:
    tensors, options = problem(kernels=2)
    torch.library.opcheck(torch.ops.surgeon.dconv.default, (*tensors, *options.values(), "native"))


def test_any_layout_is_the_same_numbers_and_no_images_give_none() -> None:
    tensors, options = problem()
    x, kernels = (t.detach() for t in tensors)
    expected = dconv(x, kernels, **options, backend="native")
    last = x.contiguous(memory_format=torch.channels_last)
    apart = torch.stack([kernels, kernels], -1)[..., 0]
    assert torch.equal(dconv(last, apart, **options, backend="native"), expected)
    assert dconv(x[:0], kernels[:0], **options, backend="native").shape == (0, *expected.shape[1:])


def test_it_is_the_default_in_float32_and_says_why_not() -> None:
    (x, kernels), options = problem()
    arguments = (x, kernels, *options.values())
    assert DCONV.choose(*arguments).name == "native"
    assert DCONV.why_not("native", x.double(), kernels.double(), *arguments[2:]) == [
        "it computes in float32, not in torch.float64"
    ]


# --- kernels generated --------------------------------------------------------------------------------------------


def layer(
    *,
    spare: Pair = (5, 6),
    window: Pair = (3, 3),
    stride: Pair = (1, 1),
    padding: Pair = (1, 1),
    dilation: Pair = (1, 1),
    channels: int = 4,
    multiplier: int = 1,
    features: int = 3,
    images: int = 2,
    bias: bool = True,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Tensors with a generated kernel for every output channel; no last one without bias."""
    (x, kernels), options = problem(
        spare=spare, window=window, stride=stride, padding=padding, dilation=dilation, channels=channels, images=images
    )
    outputs = channels * multiplier
    shapes = [
        (images, features, *kernels.shape[3:]),
        (outputs * window[0] * window[1], features),
        (outputs, 1, *window),
    ]
    tensors = [x, *(torch.randn(s, requires_grad=True) for s in (*shapes, *([(outputs,)] if bias else [])))]
    del options["kernel_size"]
    return tensors, options


def layer_results(tensors: list[Tensor], options: dict[str, Any], backend: str) -> list[Tensor]:
    y = dconv_layer(*tensors, **options, backend=backend)
    return [y, *gradients(y, tensors)]


@PROPERTY
@given(
    window=pairs(1, 5),
    stride=pairs(1, 4),
    padding=pairs(0, 3),
    dilation=pairs(1, 3),
    spare=pairs(0, 40),
    channels=st.integers(1, 12),
    multiplier=st.integers(1, 3),
    features=st.integers(1, 9),
    images=st.integers(1, 2),
    bias=st.booleans(),
)
def test_the_native_layer_is_the_reference(**options: Any) -> None:
    tensors, geometry = layer(**options)
    exact = layer_results(doubled(tensors), geometry, "reference")
    check_close(layer_results(tensors, geometry, "native"), exact, least=1)  # gradients of a bias may cancel


def test_the_layers_bits_do_not_depend_on_the_number_of_threads() -> None:
    tensors, options = layer(spare=(60, 30), channels=12, features=300)
    check_threads(lambda: layer_results(tensors, options, "native"), 2, 5)


def test_a_layer_that_is_cut_into_bands_and_chunks() -> None:
    tensors, options = layer(spare=(70, 19), window=(5, 3), channels=40, multiplier=2, features=210, images=1)
    exact = layer_results(doubled(tensors), options, "reference")
    check_close(layer_results(tensors, options, "native"), exact)


@pytest.mark.parametrize("wanted", range(5))
def test_a_gradient_of_the_layer_alone_is_that_gradient(wanted: int) -> None:
    tensors, options = layer()
    expected = layer_results(tensors, options, "native")[1 + wanted]
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    y = dconv_layer(*alone, **options, backend="native")
    assert torch.equal(gradients(y, [alone[wanted]])[0], expected)


def test_the_layer_saves_only_its_inputs() -> None:
    tensors, options = layer()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dconv_layer(*tensors, **options, backend="native")
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in tensors}


@HALF
@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_of_the_layer_is_computed_in_float32(bias: bool, dtype: torch.dtype) -> None:
    tensors, geometry = layer(images=3, multiplier=2, bias=bias)
    check_half(lambda given, backend: layer_results(given, geometry, backend), tensors, dtype)


@FEW
@given(
    **SPOILED,
    multiplier=st.integers(1, 2),
    features=st.integers(1, 5),
)
def test_what_is_no_number_spoils_only_what_sees_it_in_the_layer(where: float, **options: Any) -> None:
    tensors, geometry = layer(**options)
    backends = ("reference", "native", "torch")
    check_spread(lambda given, backend: layer_results(given, geometry, backend), tensors, backends, where)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_the_layers_registration() -> None:
    tensors, options = layer()
    torch.library.opcheck(torch.ops.surgeon.dconv_layer.default, (*tensors, *options.values(), "native"))


def test_the_layer_is_the_default_and_says_why_not() -> None:
    (x, features, weight, static, bias), options = layer()
    rest = (static, bias, *options.values())
    assert DCONV_LAYER.choose(x, features, weight, *rest).name == "native"
    shared = (x, features, weight[:18], *rest)
    assert DCONV_LAYER.why_not("native", *shared) == ["several output channels share a generated kernel"]
    last = x.contiguous(memory_format=torch.channels_last)
    assert DCONV_LAYER.why_not("native", last, features, weight, *rest) == [
        "the input is channels last, so the result must be, too"
    ]
    for arguments in (shared, (last, features, weight, *rest)):
        assert DCONV_LAYER.choose(*arguments).name == "torch"
