"""The ACDA operator: the registered lean version, its gradient, and the choice among backends."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.layers.kernels.acda_lean import Gradients, Problem
from surgeon.layers.kernels.dispatch import Operator

ACDA_CONV = Operator("acda_conv")


@torch.library.custom_op("surgeon::acda_conv", mutates_args=())
def _lean(
    x: Tensor,
    alpha: Tensor,
    psi: Tensor,
    static: Tensor,
    coeff: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return Problem(x, alpha, psi, static, coeff, stride, padding, dilation, groups).run()


@_lean.register_fake
def _(
    x: Tensor,
    alpha: Tensor,
    psi: Tensor,
    static: Tensor,
    coeff: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return x.new_empty(x.shape[0], coeff.shape[0], alpha.shape[2], alpha.shape[3])


@torch.library.custom_op("surgeon::acda_conv_backward", mutates_args=())
def _lean_backward(
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
) -> list[Tensor]:
    problem = Problem(x, alpha, psi, static, coeff, stride, padding, dilation, groups)
    grads = Gradients(problem, needs)
    for chunk in problem.chunks():
        grads.add(grad, chunk)
    return grads.results(psi, static, coeff)


@_lean_backward.register_fake
def _(
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
) -> list[Tensor]:
    return [
        t.new_empty(t.shape if need else (0,)) for t, need in zip((x, alpha, psi, static, coeff), needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.geometry = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    grads = torch.ops.surgeon.acda_conv_backward(grad, *ctx.saved_tensors, *ctx.geometry, needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None)


_lean.register_autograd(_backward, setup_context=_setup_context)
