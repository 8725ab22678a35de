"""DConv operators: the lean version against the definition, and everything `torch.library` promises."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from surgeon.errors import BackendError, GeometryError
from surgeon.layers.ops import tiles as dconv_tiles
from surgeon.layers.sekg.operator import DCONV, dconv, dconv_layer
from tests.support.layers.sekg import layer_tensors, random, small, small_kernels

FEW = settings(max_examples=25, deadline=None, derandomize=True)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@pytest.fixture(params=["one piece", "many pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many pieces":
        monkeypatch.setitem(dconv_tiles.PIECE_BYTES, "cpu", 1500)
        monkeypatch.setattr(dconv_tiles, "BAND_BYTES", 1500)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of a call that fit together: images, channels, multiplier, kernel groups, geometry, input size."""
    channels, multiplier = draw(st.sampled_from([1, 2, 4, 6])), draw(st.sampled_from([1, 2, 6]))
    outputs = channels * multiplier
    groups = [g for g in range(1, outputs + 1) if channels % g == 0 or (g % channels == 0 and outputs % g == 0)]
    kernel, dilation, stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), draw(pairs), draw(pairs)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    size = [d * (k - 1) + 1 + draw(st.integers(0, 6)) for k, d in zip(kernel, dilation, strict=True)]
    out = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    return {
        "x": (draw(st.integers(0, 2)), channels, *size),
        "out": tuple(out),
        "outputs": outputs,
        "groups": draw(st.sampled_from(groups)),
        "features": draw(st.integers(1, 4)),
        "kernel": kernel,
        "geometry": {"stride": stride, "padding": padding, "dilation": dilation},
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def result_and_gradients(
    call: Callable[..., Tensor], tensors: list[Tensor | None], backend: str | None
) -> list[Tensor]:
    y = call(*tensors, backend=backend)
    weights = (torch.arange(y.numel()) % 7 - 3).view(y.shape).to(y.dtype)  # the same in every dtype, on every CPU
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t is not None], weights)]


def assert_backends_agree(call: Callable[..., Tensor], tensors: list[Tensor | None]) -> None:
    lean, reference = (result_and_gradients(call, tensors, backend) for backend in ("torch", "reference"))
    for ours, theirs in zip(lean, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("pieces")
class TestEqualsReference:
    # hypothesis draws many cases for one set-up of the fixture, which holds for all of them
    @FEW
    @given(case=cases())
    def test_layer(self, case: dict[str, Any]) -> None:
        assert_backends_agree(
            lambda *tensors, backend: dconv_layer(*tensors, **case["geometry"], backend=backend), layer_tensors(case)
        )

    @FEW
    @given(case=cases())
    def test_apply(self, case: dict[str, Any]) -> None:
        torch.manual_seed(case["seed"])
        groups = case["groups"]
        kernels = random(case["x"][0], groups, case["kernel"][0] * case["kernel"][1], *case["out"])
        assert_backends_agree(
            lambda x, kernels, backend: dconv(x, kernels, case["kernel"], **case["geometry"], backend=backend),
            [random(*case["x"]), kernels],
        )


def test_equals_a_convolution_where_the_kernels_are_the_same_everywhere() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 9, 8), torch.randn(4, 1, 3, 2)
    expected = F.conv2d(x, weight, None, (2, 1), (1, 1), (1, 2), 4)
    kernels = weight.view(1, 4, 6, 1, 1).expand(2, 4, 6, *expected.shape[-2:])
    ours = dconv(x, kernels, (3, 2), stride=(2, 1), padding=(1, 1), dilation=(1, 2))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("groups", "outputs"), [(2, 2), (1, 4), (4, 4)])
def test_gradcheck_layer(groups: int, outputs: int) -> None:
    case = {"x": (1, 2, 3, 4), "out": (2, 4), "outputs": outputs, "groups": groups, "features": 2, "kernel": (2, 3)}
    tensors = layer_tensors({**case, "bias": True, "seed": 0})
    assert torch.autograd.gradcheck(lambda *t: dconv_layer(*t, padding=(0, 1)), tensors)


def test_gradcheck_apply() -> None:
    torch.manual_seed(0)
    x, kernels = random(1, 2, 3, 4), random(1, 1, 6, 2, 4)
    assert torch.autograd.gradcheck(lambda x, k: dconv(x, k, (2, 3), padding=(0, 1)), (x, kernels))


@pytest.mark.parametrize("missing", range(5))
def test_a_tensor_without_gradient_leaves_the_others_alone(missing: int) -> None:
    tensors = small()
    full = result_and_gradients(partial(dconv_layer, padding=(1, 1)), tensors, "torch")[1:]
    tensors[missing] = tensors[missing].detach()
    y = dconv_layer(*tensors, padding=(1, 1))
    y.backward((torch.arange(y.numel()) % 7 - 3).view(y.shape).to(y.dtype))
    for index, (tensor, expected) in enumerate(zip(tensors, full, strict=True)):
        assert tensor is not None
        if index == missing:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    def formatted(tensor: Tensor) -> Tensor:
        return tensor.detach().to(memory_format=memory_format).requires_grad_()

    x, features, *rest = small(dtype)
    assert x is not None
    assert features is not None
    arguments = (formatted(x), formatted(features), *rest, [1, 1], [1, 1], [1, 1])
    torch.library.opcheck(torch.ops.surgeon.dconv_layer.default, arguments)
    x, kernels = small_kernels(dtype)
    arguments = (formatted(x), kernels, [3, 3], [1, 1], [1, 1], [1, 1])
    torch.library.opcheck(torch.ops.surgeon.dconv.default, arguments)


def test_compiles_whole() -> None:
    def call(*tensors: Tensor) -> Tensor:
        return torch.tanh(dconv_layer(*tensors, padding=(1, 1)))

    tensors = small(torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors))
    got = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    expected = torch.autograd.grad(call(*tensors).sum(), tensors)
    torch.testing.assert_close(got, expected)


def test_saves_only_its_inputs() -> None:
    def saved(call: Callable[[], Tensor]) -> set[int]:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            call()
        return {t.untyped_storage().data_ptr() for t in kept}

    tensors = [t for t in small(torch.float32) if t is not None]
    assert saved(lambda: dconv_layer(*tensors, padding=(1, 1))) == {t.untyped_storage().data_ptr() for t in tensors}
    x, kernels = small_kernels(torch.float32)
    expected = {t.untyped_storage().data_ptr() for t in (x, kernels)}
    assert saved(lambda: dconv(x, kernels, (3, 3), padding=(1, 1))) == expected


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype: torch.dtype, backend: str | None) -> None:
    tensors = small(torch.float32)
    half = [t.detach().to(dtype).requires_grad_() for t in tensors if t is not None]
    exact = [t.detach().float().requires_grad_() for t in half]
    ours = result_and_gradients(partial(dconv_layer, padding=(1, 1)), [*half], backend)
    theirs = result_and_gradients(partial(dconv_layer, padding=(1, 1)), [*exact], "reference")
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == dtype
        error = (got.float() - expected).abs().max() / expected.abs().max()
        assert error < 3 * torch.finfo(dtype).eps


def test_half_precision_apply() -> None:
    x, kernels = small_kernels(torch.float32)
    ours = dconv(x.bfloat16(), kernels.bfloat16(), (3, 3), padding=(1, 1))
    exact = dconv(x.bfloat16().float(), kernels.bfloat16().float(), (3, 3), padding=(1, 1), backend="reference")
    torch.testing.assert_close(ours, exact.bfloat16(), rtol=0.01, atol=0.01)


def test_autocast_runs_in_its_dtype() -> None:
    tensors = small(torch.float32)
    plain = dconv_layer(*tensors, padding=(1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        cast = dconv_layer(*tensors, padding=(1, 1))
        wide = dconv_layer(*small(torch.float64), padding=(1, 1))
    assert cast.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    torch.testing.assert_close(cast.float(), plain, rtol=0.1, atol=0.1)
    cast.float().sum().backward()
    assert all(t is not None and t.grad is not None and t.grad.dtype == torch.float32 for t in tensors)


def test_noncontiguous_inputs() -> None:
    x, features, *rest = small(torch.float32)
    assert x is not None
    assert features is not None
    expected = dconv_layer(x, features, *rest, padding=(1, 1))
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    wide = features.repeat(1, 1, 1, 2)[..., : features.shape[-1]]
    torch.testing.assert_close(dconv_layer(transposed, wide, *rest, padding=(1, 1)), expected)


def test_flops_are_counted() -> None:
    tensors = small(torch.float32)
    pixels, generate, apply = 2 * 6 * 5, 4 * 9 * 3, 4 * 9
    with FlopCounterMode(display=False) as counter:
        y = dconv_layer(*tensors, padding=(1, 1))
    assert counter.get_total_flops() == 2 * pixels * (generate + apply)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * pixels * (3 * generate + 2 * apply)
    x, kernels = small_kernels()
    with FlopCounterMode(display=False) as counter:
        dconv(x, kernels, (3, 3), padding=(1, 1)).sum().backward()
    assert counter.get_total_flops() == 2 * pixels * 3 * apply


def test_meta_device_gives_shapes() -> None:
    tensors = [t.to("meta") for t in small(torch.float32, outputs=8) if t is not None]
    assert dconv_layer(*tensors, padding=(1, 1)).shape == (2, 8, 6, 5)


class TestErrors:
    def test_shapes_are_named(self) -> None:
        x, kernels = small_kernels()
        with pytest.raises(GeometryError, match=r"expected 2 images of 4x3 pixels"):
            dconv(x, kernels, (3, 3))
        with pytest.raises(GeometryError, match=r"kernels \(N, G, 4, H', W'\), got"):
            dconv(x, kernels, (2, 2))
        with pytest.raises(GeometryError, match="3 kernels do not fit 4 input and 4 output channels"):
            dconv(x, torch.zeros(2, 3, 9, 6, 5), (3, 3), padding=(1, 1))
        x, features, weight, static, _ = small()
        with pytest.raises(GeometryError, match=r"static kernels \(O, 1, k_h, k_w\)"):
            dconv_layer(x, features, weight, static[:, 0])
        with pytest.raises(GeometryError, match=r"a weight \(G\*9, Cf\)"):
            dconv_layer(x, features, weight[:-1], static)

    def test_mixed_dtypes_and_unknown_backends_have_reasons(self) -> None:
        x, kernels = small_kernels()
        reasons = DCONV.why_not("torch", x, kernels.float(), (3, 3), (1, 1), (1, 1), (1, 1))
        assert reasons == ["its tensors are of different dtypes (torch.float32, torch.float64)"]
        with pytest.raises(BackendError, match="different dtypes"):
            dconv(x, kernels.float(), (3, 3), padding=(1, 1))
        with pytest.raises(BackendError, match="no backend 'cuda'; it has triton, native, torch, portable, reference"):
            dconv(x, kernels, (3, 3), padding=(1, 1), backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "outputs"), [(4, 4), (2, 8), (8, 8)])
def test_cuda_equals_cpu(groups: int, outputs: int) -> None:
    tensors = small(groups=groups, outputs=outputs)
    on_cuda = [None if t is None else t.detach().cuda().requires_grad_() for t in tensors]

    def both(call_on: list[Tensor | None]) -> list[Tensor]:
        y = dconv_layer(*call_on, padding=(1, 1))
        return [y, *torch.autograd.grad(y.square().sum(), [t for t in call_on if t is not None])]

    for ours, expected in zip(both(on_cuda), both(tensors), strict=True):
        torch.testing.assert_close(ours.cpu(), expected)
