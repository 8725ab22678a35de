"""The ACDA operator: registration, gradient, and backends (plain torch, C, Triton)."""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from surgeon.errors import GeometryError
from surgeon.layers.acda import flops, native
from surgeon.layers.acda.lean import LeanProblem, lean_gradients
from surgeon.layers.acda.reference import acda_conv_reference
from surgeon.layers.ops.dispatch import NATIVE, PORTABLE, Operator
from surgeon.layers.ops.inputs import check_window, floating
from surgeon.layers.ops.library import autocast_dtype, define, differentiable_once, memory_format_of, shapes_of
from surgeon.layers.ops.native.support import reasons_against as native_reasons_against
from surgeon.layers.ops.portable import acda_conv_portable
from surgeon.layers.ops.triton.support import reasons_against

ACDA_CONV = Operator("acda_conv")


@define("surgeon::acda_conv")
def _acda_conv(
    x: Tensor,
    alpha: Tensor,
    psi: Tensor,
    static: Tensor,
    coeff: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str = "torch",
) -> Tensor:
    if backend == "triton":
        y: Tensor = _on_cuda().forward(x, alpha, psi, static, coeff, stride, padding, dilation, groups)
        return y
    if backend == NATIVE:
        return native.forward(x, alpha, psi, static, coeff, stride, padding, dilation, groups)
    return LeanProblem(x, alpha, psi, static, coeff, stride, padding, dilation, groups).run()


@shapes_of("surgeon::acda_conv")
def _shape(
    x: Tensor,
    alpha: Tensor,
    psi: Tensor,
    static: Tensor,
    coeff: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str = "torch",
) -> Tensor:
    shape = (x.shape[0], coeff.shape[0], alpha.shape[2], alpha.shape[3])
    kept = memory_format_of(x) if backend == "triton" else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=kept)


@define("surgeon::acda_conv_backward")
def _acda_conv_backward(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    psi: Tensor,
    static: Tensor,
    coeff: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
    backend: str = "torch",
) -> list[Tensor]:
    if backend == "triton":
        found: list[Tensor] = _on_cuda().backward(
            grad, x, alpha, psi, static, coeff, stride, padding, dilation, groups, needs
        )
        return found
    if backend == NATIVE:
        return native.backward(grad, x, alpha, psi, static, coeff, stride, padding, dilation, groups, needs)
    return lean_gradients(grad, (x, alpha, psi, static, coeff), (stride, padding, dilation, groups), needs)


@shapes_of("surgeon::acda_conv_backward")
def _backward_shapes(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    psi: Tensor,
    static: Tensor,
    coeff: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
    backend: str = "torch",
) -> list[Tensor]:
    empty = [
        t.new_empty(t.shape if need else (0,)) for t, need in zip((x, alpha, psi, static, coeff), needs, strict=True)
    ]
    if backend == "triton":
        empty[:2] = [
            torch.empty_like(t) if need else e for t, need, e in zip((x, alpha), needs[:2], empty[:2], strict=True)
        ]
    return empty


def _on_cuda() -> ModuleType:
    from surgeon.layers.acda import triton as acda  # Triton is not everywhere

    return acda


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.geometry = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    *geometry, backend = ctx.geometry
    grads = _acda_conv_backward(grad, *ctx.saved_tensors, *geometry, needs, backend)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None, None)


torch.library.register_autograd("surgeon::acda_conv", _backward, setup_context=_setup_context)
differentiable_once("surgeon::acda_conv_backward")
register_flop_formula(torch.ops.surgeon.acda_conv)(flops.acda_flops)
register_flop_formula(torch.ops.surgeon.acda_conv_backward)(flops.acda_backward_flops)


def _why_not_triton(
    x: Tensor, alpha: Tensor, psi: Tensor, static: Tensor, coeff: Tensor, *geometry: Any
) -> Iterator[str]:
    return reasons_against([x, alpha, psi, static, coeff])


@ACDA_CONV.backend("triton", why_not=_why_not_triton)
def _run_triton(*args: Any) -> Tensor:
    y: Tensor = _acda_conv(*args, "triton")
    return y


def _why_not_native(x: Tensor, alpha: Tensor, psi: Tensor, static: Tensor, coeff: Tensor, *geometry: Any) -> list[str]:
    return native_reasons_against([x, alpha, psi, static, coeff])


@ACDA_CONV.backend(NATIVE, why_not=_why_not_native)
def _run_native(*args: Any) -> Tensor:
    y: Tensor = _acda_conv(*args, NATIVE)
    return y


ACDA_CONV.backend("torch", why_not=floating)(_acda_conv)
ACDA_CONV.backend(PORTABLE, why_not=floating)(acda_conv_portable)
ACDA_CONV.backend("reference", why_not=floating)(acda_conv_reference)


def acda_conv(
    x: Tensor,
    alpha: Tensor,
    psi: Tensor,
    static: Tensor,
    coeff: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolve x (N, C, H, W) with the filters coeff · [alpha·psi; static] of each pixel (ACDA Eq. 4-6).

    alpha (N, m·K, H', W'), psi (K, l_h, l_w), static (r, l_h, l_w) with r >= 0, coeff (C_out, C/g, m + r); stride, padding and
    dilation are (vertical, horizontal); padding is with zeros. Returns (N, C_out, H', W') in the dtype of x. Operands may have
    different floating dtypes; computation is in float32, or float64 for float64. Under autocast, x is cast to autocast's dtype
    as by a convolution. Raises `GeometryError` if shapes do not fit, `BackendError` if no backend can run it.
    """
    _check_shapes(x, alpha, psi, static, coeff, stride, padding, dilation, groups)
    device = x.device.type
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    dtype = autocast_dtype(x)
    if dtype is None:
        return ACDA_CONV(x, alpha, psi, static, coeff, *geometry, backend=backend)
    if x.dtype != torch.float64:
        x = x.to(dtype)
    with torch.autocast(device, enabled=False):
        return ACDA_CONV(x, alpha, psi, static, coeff, *geometry, backend=backend)


def _check_shapes(
    x: Tensor,
    alpha: Tensor,
    psi: Tensor,
    static: Tensor,
    coeff: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    wrong: list[str] = []
    if x.dim() != 4 or alpha.dim() != 4 or psi.dim() != 3 or static.dim() != 3 or coeff.dim() != 3:
        wrong.append("x and alpha must have 4 dimensions, psi, static and coeff 3")
    else:
        out = check_window("acda_conv", x, psi.shape[1:], stride, padding, dilation, groups)
        atoms = alpha.shape[1] // max(psi.shape[0], 1)
        expected = {
            "alpha": (alpha.shape, (x.shape[0], max(atoms, 1) * psi.shape[0], *out)),
            "static": (static.shape, (static.shape[0], *psi.shape[1:])),
            "coeff": (coeff.shape, (coeff.shape[0], x.shape[1] // groups, atoms + static.shape[0])),
        }
        wrong += [
            f"{name} must be {want}, got {tuple(got)}" for name, (got, want) in expected.items() if tuple(got) != want
        ]
        if x.shape[1] % groups or coeff.shape[0] % groups:
            wrong.append(f"channels {x.shape[1]} and {coeff.shape[0]} must be multiples of groups {groups}")
    if wrong:
        raise GeometryError(f"acda_conv: x {tuple(x.shape)}, psi {tuple(psi.shape)}: {'; '.join(wrong)}")
