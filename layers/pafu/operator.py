"""PAFU's operator: every output pixel is filtered with the kernel selected there.

On the CPU it runs in C (`native/pafu.h`) if possible, on GPUs in Triton; torch has three exact methods, of which
`choose_method` takes the cheapest:

- **grouped**: pixels sorted by selected kernel, one product per kernel; the cost does not depend on n.
- **taps**, for depthwise convolutions: tap by tap, the selected kernel's weight is looked up for every pixel.
- **dense**: one plain convolution per kernel that is selected anywhere.

Only inputs are saved for the backward pass, which recomputes everything else. Temporaries stay below 32 MB.
Legend: N batch, C channels, H W input size, P Q output size, n kernels per group, O output channels, k l kernel size, G groups.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from surgeon.errors import GeometryError
from surgeon.layers.geometry import Pair
from surgeon.layers.ops.dispatch import NATIVE, PORTABLE, Operator
from surgeon.layers.ops.inputs import check_window, one_dtype
from surgeon.layers.ops.library import autocast_dtype, define, differentiable_once, memory_format_of, shapes_of
from surgeon.layers.ops.native.support import reasons_against as native_reasons_against
from surgeon.layers.ops.portable import pafu_conv_portable
from surgeon.layers.ops.triton.support import reasons_against
from surgeon.layers.pafu import dense as pafu_dense
from surgeon.layers.pafu import grouped as pafu_grouped
from surgeon.layers.pafu import native
from surgeon.layers.pafu import taps as pafu_taps
from surgeon.layers.pafu.flops import pafu_backward_flops, pafu_flops
from surgeon.layers.pafu.frames import FrameProblem, Grads, Window
from surgeon.layers.pafu.reference import pafu_conv_reference

METHODS: dict[str, ModuleType] = {"grouped": pafu_grouped, "taps": pafu_taps, "dense": pafu_dense}
IN_C: dict[str, ModuleType] = {NATIVE: native}

PAFU_CONV = Operator("pafu_conv")


def pafu_conv(
    x: Tensor,
    kernel: Tensor,
    further: Tensor,
    index: Tensor,
    soft: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Filter every pixel with its selected kernel (PAFU, eq. 2): y[p] = K_index[p] * x at p.

    x (N, C, H, W); kernel 0 (O, C/G, k, l); further, kernels 1.. (n - 1, O, C/G, k, l), fastest with channels last in memory;
    index (N, P, Q) int64 in 0..n-1; soft (N, n, P, Q) or None. Returns (N, O, P, Q) in the memory format of x.

    With `soft`, the gradient is the exact straight-through one: d/d soft_i = <g, K_i * x> for all i; the gradients of x and of the
    kernels go through the selection `index`. Under autocast, products are in its dtype. Raises `GeometryError` if shapes do not
    fit, `BackendError` if the named backend ("triton", "native", "torch", "portable", "reference") cannot run.
    """
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x, kernel, further = x.to(dtype), kernel.to(dtype), further.to(dtype)
    _check(x, kernel, further, index, soft, Window.of(kernel, stride, padding, dilation, groups))
    return PAFU_CONV(x, kernel, further, index, soft, stride, padding, dilation, groups, backend=backend)


def _check(x: Tensor, kernel: Tensor, further: Tensor, index: Tensor, soft: Tensor | None, window: Window) -> None:
    if (
        x.dim() != 4
        or kernel.dim() != 4
        or kernel.shape[0] % max(window.groups, 1)
        or x.shape[1] != kernel.shape[1] * window.groups
    ):
        raise GeometryError(
            f"pafu_conv: x {tuple(x.shape)} and kernel {tuple(kernel.shape)} do not fit for {window.groups} groups"
        )
    check_window("pafu_conv", x, window.size, window.stride, window.padding, window.dilation, window.groups)
    if index.dtype != torch.int64:
        raise GeometryError(f"pafu_conv: index must be int64, got {index.dtype}")
    if further.shape[1:] != kernel.shape:
        raise GeometryError(
            f"pafu_conv: further kernels {tuple(further.shape)} should be (n - 1, {', '.join(map(str, kernel.shape))})"
        )
    expected = (x.shape[0], *window.output_size(x.shape[2], x.shape[3]))
    if index.shape != expected:
        raise GeometryError(f"pafu_conv: index {tuple(index.shape)} should be {expected}")
    if soft is not None and soft.shape != (expected[0], 1 + len(further), *expected[1:]):
        raise GeometryError(f"pafu_conv: soft {tuple(soft.shape)} should be (N, n, P, Q) for index {expected}")


def choose_method(problem: FrameProblem) -> str:
    """The cheapest method, a key of `METHODS`. The thresholds were measured on one CPU core."""
    kernels = len(problem.present)
    if problem.is_depthwise:
        return "taps" if kernels > 2 else "dense"
    # With few channels per group, the products are too small to be fast.
    return "dense" if kernels <= max(1, problem.window.groups // 6) else "grouped"


def _plain(problem: FrameProblem, i: int) -> Tensor:
    """The convolution with kernel i alone."""
    dtype, window, memory_format = problem.compute_dtype, problem.window, memory_format_of(problem.x)
    kernel = (problem.kernel if i == 0 else problem.further[i - 1]).to(dtype).contiguous(memory_format=memory_format)
    settings = (window.stride, window.padding, window.dilation, window.groups)
    y = F.conv2d(problem.x.to(dtype), kernel, None, *settings)
    return y.to(problem.x.dtype).contiguous(memory_format=memory_format)


# --- as graph nodes: opaque to torch.compile, with shapes and gradients ----------------------------------------------


@define("surgeon::pafu_conv", torch.Tag.cudagraph_unsafe)
def _conv(
    x: Tensor,
    kernel: Tensor,
    further: Tensor,
    index: Tensor,
    soft: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    method: str,
) -> Tensor:
    window, out = Window.of(kernel, stride, padding, dilation, groups), _empty_output(x, kernel, index)
    problem = _problem(x, kernel, further, index, window, method)
    if method == "triton":
        if out.numel():
            _on_cuda().forward(problem, out)
        return out
    if method == "auto" and len(problem.present) == 1:
        return _plain(problem, problem.present[0])
    if out.numel():
        (METHODS | IN_C)[choose_method(problem) if method == "auto" else method].forward(problem, out)
    return out


def _problem(x: Tensor, kernel: Tensor, further: Tensor, index: Tensor, window: Window, method: str) -> FrameProblem:
    """The problem for a method, without the kernels `present` if it counts them itself.

    Triton does so on the device, where asking would wait for it.
    """
    if method == "triton" or (method == NATIVE and native.in_range(index, 1 + further.shape[0])):
        return FrameProblem(x, kernel, further, index, window, [])
    return FrameProblem.of(x, kernel, further, index, window)


def _on_cuda() -> ModuleType:
    from surgeon.layers.pafu import triton as pafu  # Triton is not everywhere

    return pafu


def _empty_output(x: Tensor, kernel: Tensor, index: Tensor) -> Tensor:
    shape = (x.shape[0], kernel.shape[0], index.shape[1], index.shape[2])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


@shapes_of("surgeon::pafu_conv")
def _conv_fake(x: Tensor, kernel: Tensor, further: Tensor, index: Tensor, *_: Any) -> Tensor:
    return _empty_output(x, kernel, index)


@define("surgeon::pafu_conv_backward", torch.Tag.cudagraph_unsafe)
def _conv_backward(
    grad: Tensor,
    x: Tensor,
    kernel: Tensor,
    further: Tensor,
    index: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    method: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, kernel, further and soft; `wanted` covers (x, kernels, soft), and unwanted ones are returned empty."""
    window = Window.of(kernel, stride, padding, dilation, groups)
    problem = _problem(x, kernel, further, index, window, method)
    grad_x, first, rest, scores = _empty_gradients(x, kernel, further, index, wanted, problem.sum_dtype)
    for each in (grad_x, first, rest, scores):
        each.zero_()
    want_x, want_kernels, want_soft = wanted
    grads = Grads(
        grad_x if want_x else None, [first, *rest.unbind()] if want_kernels else None, scores if want_soft else None
    )
    if grad.numel():
        method = choose_method(problem) if method == "auto" else method
        (_on_cuda() if method == "triton" else (METHODS | IN_C)[method]).backward(problem, grad, grads)
    return _as_gradients(grad_x, first, rest, scores, x.dtype)


@shapes_of("surgeon::pafu_conv_backward")
def _conv_backward_fake(
    grad: Tensor, x: Tensor, kernel: Tensor, further: Tensor, index: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    return _as_gradients(*_empty_gradients(x, kernel, further, index, settings[-1], dtype), x.dtype)


def _empty_gradients(
    x: Tensor, kernel: Tensor, further: Tensor, index: Tensor, wanted: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty sums: (N, C, H, W) as x, (O, k, l, C/G), (n - 1, O, k, l, C/G), (N, P, Q, n); without elements if not wanted."""
    want_x, want_kernels, want_soft = wanted
    n, (outputs, inputs, *size) = 1 + further.shape[0], kernel.shape
    like_x = torch.empty(
        x.shape if want_x else [0] * 4, dtype=dtype, device=x.device, memory_format=memory_format_of(x)
    )
    first = x.new_empty((outputs, *size, inputs) if want_kernels else [0] * 4, dtype=dtype)
    rest = x.new_empty((n - 1, outputs, *size, inputs) if want_kernels else [0] * 5, dtype=dtype)
    scores = x.new_empty((*index.shape, n) if want_soft else [0] * 4, dtype=dtype)
    return like_x, first, rest, scores


def _as_gradients(
    grad_x: Tensor, first: Tensor, rest: Tensor, scores: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums in the dimension order and dtype of the inputs; `further` keeps its channels last."""
    return grad_x.to(dtype), first.movedim(-1, 1).to(dtype), rest.movedim(-1, 2).to(dtype), scores.movedim(-1, 1)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, kernel, further, index, soft, *settings = inputs
    ctx.save_for_backward(x, kernel, further, index)
    ctx.soft_dtype = None if soft is None else soft.dtype
    ctx.settings = settings


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, kernel, further, index = ctx.saved_tensors
    need_x, need_kernel, need_further, _, need_soft = ctx.needs_input_grad[:5]
    wanted = [need_x, need_kernel or need_further, need_soft]
    grads = _conv_backward(grad, x, kernel, further, index, *ctx.settings, wanted)
    grad_soft = grads[3].to(ctx.soft_dtype) if need_soft else None
    asked = (need_x, need_kernel, need_further)
    by_input = [g if need else None for g, need in zip(grads, asked, strict=False)]
    return (*by_input, None, grad_soft, *(None for _ in ctx.settings))


torch.library.register_autograd("surgeon::pafu_conv", _differentiate, setup_context=_save_inputs)
differentiable_once("surgeon::pafu_conv_backward")
register_flop_formula(torch.ops.surgeon.pafu_conv)(pafu_flops)
register_flop_formula(torch.ops.surgeon.pafu_conv_backward)(pafu_backward_flops)


# --- backends ------------------------------------------------------------------------------------------------------


def _why_not_triton(x: Tensor, kernel: Tensor, further: Tensor, index: Tensor, *rest: Any) -> Iterator[str]:
    yield from reasons_against([x, kernel, further])
    yield from one_dtype(x, kernel, further)
    if kernel.shape[1] == 1 and rest[-1] > 1:
        yield "it multiplies matrices, and a depthwise convolution has none"


@PAFU_CONV.backend("triton", why_not=_why_not_triton)
def _run_triton(*args: Any) -> Tensor:
    y: Tensor = _conv(*args, "triton")
    return y


def _why_not_native(x: Tensor, kernel: Tensor, further: Tensor, index: Tensor, *rest: Any) -> list[str]:
    if rest[-1] > 1 and kernel.shape[1] < native.FEWEST:
        return [f"torch is faster with fewer than {native.FEWEST} channels per group"]
    return one_dtype(x, kernel, further) or native_reasons_against([x, kernel, further])


@PAFU_CONV.backend(NATIVE, why_not=_why_not_native)
def _run_native(*args: Any) -> Tensor:
    y: Tensor = _conv(*args, NATIVE)
    return y


def _one_dtype(x: Tensor, kernel: Tensor, further: Tensor, *rest: Any) -> list[str]:
    return one_dtype(x, kernel, further)


def _why_not_lean(x: Tensor, kernel: Tensor, further: Tensor, *rest: Any) -> list[str]:
    if x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        return ["it counts the selected kernels on the host, which a CUDA graph cannot record"]
    return one_dtype(x, kernel, further)


@PAFU_CONV.backend("torch", why_not=_why_not_lean)
def _run_lean(*args: Any) -> Tensor:
    y: Tensor = _conv(*args, "auto")
    return y


PAFU_CONV.backend(PORTABLE, why_not=_one_dtype)(pafu_conv_portable)
PAFU_CONV.backend("reference", why_not=_one_dtype)(pafu_conv_reference)
