"""The lean ACDA operator against its reference: outputs, all gradients, saved tensors, registration, dtypes, errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgeon.errors import BackendError, GeometryError
from surgeon.layers.acda import lean as acda_lean
from surgeon.layers.acda.operator import ACDA_CONV, acda_conv
from surgeon.layers.acda.reference import acda_macs
from tests.support.layers.acda import problem
from tests.support.layers.native import pairs

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)


def gradients(operands: tuple[Tensor, ...], geometry: tuple[Any, ...], backend: str) -> list[Tensor]:
    """Output and the gradients of all operands for one fixed gradient of the output."""
    y = acda_conv(*operands, *geometry, backend=backend)
    weight = (torch.arange(y.numel()) % 7 - 3).view(y.shape).to(y.dtype)  # exact in every dtype
    return [y, *torch.autograd.grad((y * weight).sum(), operands)]


def check_against_reference(operands: tuple[Tensor, ...], geometry: tuple[Any, ...]) -> None:
    got, expected = (gradients(operands, geometry, backend) for backend in ("torch", "reference"))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@PROPERTY
@given(
    window=pairs(1, 5),
    stride=pairs(1, 4),
    padding=pairs(0, 3),
    dilation=pairs(1, 3),
    spare=pairs(0, 6),
    groups=st.sampled_from([1, 2, 4]),
    multiplier=st.integers(1, 2),
    images=st.integers(1, 3),
    atoms=st.integers(1, 3),
    static=st.integers(0, 2),
    chunk_bytes=st.sampled_from([1, 20_000, 1 << 22]),
)
def test_lean_is_the_reference(
    window: tuple[int, int], dilation: tuple[int, int], spare: tuple[int, int], chunk_bytes: int, **options: Any
) -> None:
    size = tuple(d * (k - 1) + 1 + more for k, d, more in zip(window, dilation, spare, strict=True))
    operands, geometry = problem(size=(size[0], size[1]), window=window, dilation=dilation, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(acda_lean.CHUNK_BYTES, "cpu", chunk_bytes)
        check_against_reference(operands, geometry)


def test_the_reference_is_the_papers_equation_at_a_pixel() -> None:
    (x, alpha, psi, static, coeff), geometry = problem(stride=(2, 1), static=0)
    y = acda_conv(x, alpha, psi, static, coeff, *geometry, backend="reference")
    n, i, j = 1, 2, 3
    atoms = torch.einsum("ak,khw->ahw", alpha[n, :, i, j].view(2, 3), psi)  # D = alpha psi
    kernel = torch.einsum("oca,ahw->ochw", coeff, atoms)  # K = A D, Eq. 3-4
    patch = F.pad(x, (1, 1, 1, 1))[n, :, 2 * i : 2 * i + 3, j : j + 3]
    torch.testing.assert_close(y[n, :, i, j], torch.einsum("ochw,chw->o", kernel, patch))


def test_constant_alpha_is_a_plain_convolution() -> None:
    (x, _, psi, static, coeff), geometry = problem(groups=2, stride=(2, 3), padding=(3, 0))
    alpha = torch.randn(2, 3, dtype=x.dtype)
    y_size = ((7 + 6 - 3) // 2 + 1, (8 - 3) // 3 + 1)
    field = alpha.view(1, 6, 1, 1).expand(2, 6, *y_size)
    weight = torch.einsum("oca,ahw->ochw", coeff, torch.cat([torch.einsum("ak,khw->ahw", alpha, psi), static]))
    expected = F.conv2d(x, weight, None, *geometry[:3], 2)
    torch.testing.assert_close(acda_conv(x, field, psi, static, coeff, *geometry), expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_gradcheck(groups: int) -> None:
    operands, geometry = problem(
        size=(4, 5), channels=4, multiplier=1, images=1, groups=groups, dilation=(1, 2), stride=(2, 1)
    )
    assert torch.autograd.gradcheck(lambda *t: acda_conv(*t, *geometry), operands)


@pytest.mark.parametrize("wanted", range(5))
def test_a_gradient_alone_is_that_gradient(wanted: int) -> None:
    operands, geometry = problem()
    expected = gradients(operands, geometry, "reference")[1 + wanted]
    alone = tuple(t.detach().requires_grad_(i == wanted) for i, t in enumerate(operands))
    y = acda_conv(*alone, *geometry)
    weight = (torch.arange(y.numel()) % 7 - 3).view(y.shape).to(y.dtype)  # exact in every dtype
    torch.testing.assert_close(torch.autograd.grad((y * weight).sum(), alone[wanted])[0], expected)


def test_only_inputs_are_saved_for_backward() -> None:
    operands, geometry = problem()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        acda_conv(*operands, *geometry)
    inputs = {t.data_ptr() for t in operands}
    assert saved
    assert all(t.data_ptr() in inputs for t in saved)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_registration() -> None:
    for options in ({}, {"groups": 2, "stride": (2, 1)}, {"static": 0, "images": 0}):
        operands, geometry = problem(size=(5, 6), **options)
        torch.library.opcheck(torch.ops.surgeon.acda_conv.default, (*operands, *geometry))
    operands, geometry = problem(size=(5, 6))
    grad = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    needs = [True, True, False, True, False]
    detached = [t.detach() for t in operands]
    torch.library.opcheck(torch.ops.surgeon.acda_conv_backward.default, (grad, *detached, *geometry, needs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    operands, geometry = problem(dtype=dtype)
    got = gradients(operands, geometry, "torch")
    exact = gradients(tuple(t.detach().double().requires_grad_() for t in operands), geometry, "reference")
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
    torch.testing.assert_close(got[0], gradients(operands, geometry, "reference")[0])


def test_operands_of_different_precision_keep_theirs() -> None:
    (x, *others), geometry = problem(dtype=torch.float32)
    half = x.detach().bfloat16().requires_grad_()
    y, gx, *grads = gradients((half, *others), geometry, "torch")
    assert (y.dtype, gx.dtype) == (torch.bfloat16, torch.bfloat16)
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_casts_the_input_as_for_a_convolution(backend: str) -> None:
    operands, geometry = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = acda_conv(*operands, *geometry, backend=backend)
        double = acda_conv(*(t.double() for t in operands), *geometry, backend=backend)
    assert y.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    expected = acda_conv(*operands, *geometry)
    assert (y.float() - expected).abs().max() <= 0.01 * expected.abs().max()
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in operands)


def test_channels_last_and_sliced_inputs() -> None:
    operands, geometry = problem()
    x, alpha, *rest = operands
    expected = acda_conv(*operands, *geometry)
    last = x.detach().contiguous(memory_format=torch.channels_last)
    wide = torch.randn(2, 12, 7, 8, dtype=x.dtype)
    wide[:, ::2] = alpha.detach()
    torch.testing.assert_close(acda_conv(last, wide[:, ::2], *rest, *geometry), expected)


def test_no_images_give_no_output() -> None:
    operands, geometry = problem(images=0)
    for backend in ("torch", "reference"):
        y, *grads = gradients(operands, geometry, backend)
        assert tuple(y.shape) == (0, 8, 7, 8)
        assert all(not g.any() for g in grads)


def test_compiled_is_one_graph() -> None:
    operands, geometry = problem(size=(5, 6))
    compiled = torch.compile(lambda *t: acda_conv(*t, *geometry).sin(), fullgraph=True, backend="aot_eager")
    got, expected = compiled(*operands), acda_conv(*operands, *geometry).sin()
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got.sum(), operands), torch.autograd.grad(expected.sum(), operands), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda t: t[:, :3], "coeff must be"),
        (1, lambda t: t[:, :, :-1], "alpha must be"),
        (2, lambda t: t[:, :2], "static must be"),
        (3, lambda t: t[0], "4 dimensions"),
        (4, lambda t: t[:, :, :1], "coeff must be"),
    ],
)
def test_shapes_that_do_not_fit_are_named(which: int, change: Any, message: str) -> None:
    operands, geometry = problem()
    wrong = [change(t) if i == which else t for i, t in enumerate(operands)]
    with pytest.raises(GeometryError, match=message):
        acda_conv(*wrong, *geometry)


def test_backends_say_why_not() -> None:
    operands, geometry = problem()
    assert ACDA_CONV.choose(*operands, *geometry).name == "torch"
    integers = [t.long() for t in operands]
    assert ACDA_CONV.why_not("torch", *integers, *geometry) == ["needs a floating-point input, got torch.int64"]
    with pytest.raises(BackendError, match="floating-point"):
        acda_conv(*integers, *geometry, backend="torch")
    with pytest.raises(BackendError, match="no backend 'cuda'"):
        acda_conv(*operands, *geometry, backend="cuda")


def test_macs_are_the_papers_table_6() -> None:
    # Table 6, "ACDA (conv only)", less the one addition an output element for the bias: 256 channels, 100×100, m = 6.
    for window, published in ((3, 4073.0e6), (5, 4318.7e6), (7, 4687.4e6)):
        options = {
            "channels": 256,
            "out_channels": 256,
            "groups": 1,
            "static": 0,
            "window": window**2,
            "pixels": 100 * 100,
        }
        convolutions = acda_macs(**options, atoms=6, elements=0)
        assert abs(convolutions + 256 * 100 * 100 - published) < 0.06e6
        assert acda_macs(**options, atoms=6, elements=18) - convolutions == 6 * 18 * window**2 * 100 * 100
