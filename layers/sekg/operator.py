"""DConv as operators: `dconv` applies given kernels, `dconv_layer` generates them from features and applies them at once.

Both are opaque nodes to `torch.compile` and `torch.export`, save only their arguments for the backward pass, and are
once differentiable. Under autocast they run in its dtype; sums are in at least float32.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from surgeon.errors import GeometryError
from surgeon.layers.geometry import Pair
from surgeon.layers.ops.dispatch import NATIVE, PORTABLE, Operator
from surgeon.layers.ops.inputs import check_window, one_dtype
from surgeon.layers.ops.library import autocast_dtype, define, differentiable_once, memory_format_of, shapes_of
from surgeon.layers.ops.native.support import reasons_against as native_reasons_against
from surgeon.layers.ops.portable import dconv_layer_portable, dconv_portable
from surgeon.layers.ops.triton.support import reasons_against
from surgeon.layers.sekg import flops, lean, native
from surgeon.layers.sekg.reference import dconv_layer_reference, dconv_reference

DCONV = Operator("dconv")
DCONV_LAYER = Operator("dconv_layer")

ONE: Pair = (1, 1)
NONE: Pair = (0, 0)


def dconv(
    x: Tensor,
    kernels: Tensor,
    kernel_size: Pair,
    *,
    stride: Pair = ONE,
    padding: Pair = NONE,
    dilation: Pair = ONE,
    backend: str | None = None,
) -> Tensor:
    """Filter every channel with its own kernel at every pixel: y[n, o, p] = Σ_t kernels[n, group(o), t, p] · x[n, c(o), p + t].

    `x` (N, C, H, W); `kernels` (N, G, k_h·k_w, H', W'), where G divides C or is a multiple of it; zero padding. Returns
    (N, max(C, G), H', W'), output channels in the order of the input channels. Raises `GeometryError` if shapes do not
    fit. Definition: `dconv_reference`.
    """
    if x.dim() != 4 or kernels.dim() != 5 or kernels.shape[2] != kernel_size[0] * kernel_size[1]:
        raise GeometryError(
            f"dconv expects an input (N, C, H, W) and kernels (N, G, {kernel_size[0] * kernel_size[1]}, H', W'), "
            f"got {tuple(x.shape)} and {tuple(kernels.shape)}"
        )
    size = check_window("dconv", x, kernel_size, stride, padding, dilation)
    _check_channels(x.shape[1], kernels.shape[1], max(x.shape[1], kernels.shape[1]))
    _check_map("kernels", kernels, x, size)
    x, kernels = _autocast(x, kernels)
    return DCONV(x, kernels, kernel_size, stride, padding, dilation, backend=backend)


def dconv_layer(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    static: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = ONE,
    padding: Pair = NONE,
    dilation: Pair = ONE,
    backend: str | None = None,
) -> Tensor:
    """`dconv` with the kernels `weight` · `features` + `static`, generated, applied and discarded tile by tile.

    `x` (N, C, H, W); `features` (N, Cf, H', W'); `weight` (G·k_h·k_w, Cf), a 1×1 convolution to G kernels; `static`
    (O, 1, k_h, k_w), one kernel per output channel, with O a multiple of C and of G; `bias` (O). Returns (N, O, H', W').
    Raises `GeometryError` if shapes do not fit. Definition: `dconv_layer_reference`.
    """
    if x.dim() != 4 or static.dim() != 4 or static.shape[1] != 1:
        raise GeometryError(
            f"dconv_layer expects an input (N, C, H, W) and static kernels (O, 1, k_h, k_w), "
            f"got {tuple(x.shape)} and {tuple(static.shape)}"
        )
    kernel_size = (static.shape[2], static.shape[3])
    taps = kernel_size[0] * kernel_size[1]
    if (
        taps == 0
        or features.dim() != 4
        or weight.dim() != 2
        or weight.shape[1] != features.shape[1]
        or weight.shape[0] % taps
    ):
        raise GeometryError(
            f"dconv_layer expects features (N, Cf, H', W') and a weight (G*{taps}, Cf), "
            f"got {tuple(features.shape)} and {tuple(weight.shape)}"
        )
    size = check_window("dconv_layer", x, kernel_size, stride, padding, dilation)
    _check_channels(x.shape[1], weight.shape[0] // taps, static.shape[0])
    _check_map("features", features, x, size)
    if bias is not None and bias.shape != static.shape[:1]:
        raise GeometryError(f"dconv_layer expects a bias ({static.shape[0]}), got {tuple(bias.shape)}")
    x, features, weight, static = _autocast(x, features, weight, static)
    if bias is not None:
        (bias,) = _autocast(bias)
    return DCONV_LAYER(x, features, weight, static, bias, stride, padding, dilation, backend=backend)


def channels_fit(channels: int, groups: int, outputs: int) -> bool:
    """Whether G kernels can serve C input channels with O output channels: G divides C, or C divides G and G divides O."""
    return outputs % channels == 0 and (channels % groups == 0 or (groups % channels == 0 and outputs % groups == 0))


def _check_channels(channels: int, groups: int, outputs: int) -> None:
    if groups < 1 or not channels_fit(channels, groups, outputs):
        raise GeometryError(
            f"{groups} kernels do not fit {channels} input and {outputs} output channels: "
            f"their number must divide {channels}, or be a multiple of it that divides {outputs}"
        )


def _check_map(name: str, given: Tensor, x: Tensor, size: Pair) -> None:
    if given.shape[0] != x.shape[0] or (given.shape[-2], given.shape[-1]) != size:
        raise GeometryError(
            f"{name} of {tuple(given.shape)} do not fit an input of {tuple(x.shape)}: "
            f"expected {x.shape[0]} images of {size[0]}x{size[1]} pixels"
        )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of the active autocast region, if any; float64 is unchanged, as under autocast."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _why_not_triton(*args: Any) -> Iterator[str]:
    yield from reasons_against([a for a in args if isinstance(a, Tensor)])
    yield from one_dtype(*args)


@DCONV.backend("triton", why_not=_why_not_triton)
def _triton_apply(x: Tensor, kernels: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    y: Tensor = _dconv(x, kernels, kernel_size, stride, padding, dilation, "triton")
    return y


def _why_not_native(x: Tensor, kernels: Tensor, *geometry: Any) -> list[str]:
    return one_dtype(x, kernels) or native_reasons_against([x, kernels])


@DCONV.backend(NATIVE, why_not=_why_not_native)
def _native_apply(x: Tensor, kernels: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    y: Tensor = _dconv(x, kernels, kernel_size, stride, padding, dilation, NATIVE)
    return y


@DCONV_LAYER.backend("triton", why_not=_why_not_triton)
def _triton_layer(*args: Any) -> Tensor:
    y: Tensor = _dconv_layer(*args, "triton")
    return y


def _why_not_native_layer(
    x: Tensor, features: Tensor, weight: Tensor, static: Tensor, bias: Tensor | None, *geometry: Any
) -> list[str]:
    operands = (x, features, weight, static, bias)
    reasons = one_dtype(*operands) or native_reasons_against(operands)
    if weight.shape[0] != static.numel():
        reasons.append("several output channels share a generated kernel")
    if memory_format_of(x) != torch.contiguous_format:
        reasons.append("the input is channels last, so the result must be, too")
    return reasons


@DCONV_LAYER.backend(NATIVE, why_not=_why_not_native_layer)
def _native_layer(*args: Any) -> Tensor:
    y: Tensor = _dconv_layer(*args, NATIVE)
    return y


@DCONV.backend("torch", why_not=one_dtype)
def _lean_apply(x: Tensor, kernels: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    y: Tensor = _dconv(x, kernels, kernel_size, stride, padding, dilation)
    return y


@DCONV_LAYER.backend("torch", why_not=one_dtype)
def _lean_layer(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    static: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    y: Tensor = _dconv_layer(x, features, weight, static, bias, stride, padding, dilation)
    return y


DCONV.backend(PORTABLE, why_not=one_dtype)(dconv_portable)
DCONV_LAYER.backend(PORTABLE, why_not=one_dtype)(dconv_layer_portable)
DCONV.backend("reference", why_not=one_dtype)(dconv_reference)
DCONV_LAYER.backend("reference", why_not=one_dtype)(dconv_layer_reference)


# --- surgeon::dconv -----------------------------------------------------------------------------------------------


@define("surgeon::dconv")
def _dconv(
    x: Tensor,
    kernels: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str = "torch",
) -> Tensor:
    if backend == "triton":
        from surgeon.layers.sekg import triton as on_cuda  # Triton is not everywhere

        return on_cuda.forward(x, kernels, kernel_size, stride, padding, dilation)
    if backend == NATIVE:
        return native.forward(x, kernels, kernel_size, stride, padding, dilation)
    return lean.apply_forward(x, kernels, kernel_size, stride, padding, dilation)


@shapes_of("surgeon::dconv")
def _(
    x: Tensor, kernels: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, backend: str = "torch"
) -> Tensor:
    shape = (x.shape[0], max(x.shape[1], kernels.shape[1]), kernels.shape[-2], kernels.shape[-1])
    kept = memory_format_of(x) if backend == "triton" else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=kept)


@define("surgeon::dconv_backward")
def _dconv_backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    kernel_size: Sequence[int],
    needs: Sequence[bool],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from surgeon.layers.sekg import triton as on_cuda  # Triton is not everywhere

        return on_cuda.backward(grad, x, kernels, kernel_size, needs, stride, padding, dilation)
    if backend == NATIVE:
        return native.backward(grad, x, kernels, kernel_size, needs, stride, padding, dilation)
    return lean.apply_backward(grad, x, kernels, kernel_size, needs, stride, padding, dilation)


@shapes_of("surgeon::dconv_backward")
def _(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    kernel_size: Any,
    needs: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        like_x, like_kernels = (
            torch.empty_like(t) if need else t.new_empty(0) for t, need in zip((x, kernels), needs, strict=True)
        )
        return like_x, like_kernels
    return x.new_empty(x.shape if needs[0] else 0), kernels.new_empty(kernels.shape if needs[1] else 0)


def _dconv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, kernels, ctx.kernel_size, *ctx.settings = inputs
    ctx.save_for_backward(x, kernels)


def _dconv_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    found = _dconv_backward(grad, *ctx.saved_tensors, ctx.kernel_size, needs, *ctx.settings)
    return (*_wanted(found, needs), None, None, None, None, None)


torch.library.register_autograd("surgeon::dconv", _dconv_grad, setup_context=_dconv_setup)
differentiable_once("surgeon::dconv_backward")


def _wanted(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(found, needs, strict=True)]


# --- surgeon::dconv_layer -----------------------------------------------------------------------------------------


@define("surgeon::dconv_layer")
def _dconv_layer(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    static: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str = "torch",
) -> Tensor:
    given = lean.LayerInputs(x, features, weight, static, bias, stride, padding, dilation)
    if backend == "triton":
        from surgeon.layers.sekg import triton_layer as on_cuda  # Triton is not everywhere

        return on_cuda.forward(given)
    if backend == NATIVE:
        return native.layer_forward(x, features, weight, static, bias, stride, padding, dilation)
    return lean.layer_forward(given)


@shapes_of("surgeon::dconv_layer")
def _(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    static: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    backend: str = "torch",
) -> Tensor:
    return lean.LayerInputs(x, features, weight, static, bias, stride, padding, dilation).static_conv2d()


@define("surgeon::dconv_layer_backward")
def _dconv_layer_backward(
    grad: Tensor,
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    static: Tensor,
    bias: Tensor | None,
    needs: Sequence[bool],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str = "torch",
) -> lean.LayerGradients:
    given = lean.LayerInputs(x, features, weight, static, bias, stride, padding, dilation)
    if backend == "triton":
        from surgeon.layers.sekg import triton_layer as on_cuda  # Triton is not everywhere

        return on_cuda.backward(grad, given, needs)
    if backend == NATIVE:
        return native.layer_backward(grad, x, features, weight, static, bias, needs, stride, padding, dilation)
    return lean.layer_backward(grad, given, needs)


@shapes_of("surgeon::dconv_layer_backward")
def _(
    grad: Tensor,
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    static: Tensor,
    bias: Tensor | None,
    needs: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    backend: str = "torch",
) -> lean.LayerGradients:
    given = lean.LayerInputs(x, features, weight, static, bias, stride, padding, dilation)
    grad_x, grad_static, grad_bias = given.static_gradients(grad, needs)
    grad_features = torch.empty_like(features) if needs[1] else None
    grad_weight = torch.empty_like(weight) if needs[2] else None
    found = lean.filled(x, grad_x), lean.filled(x, grad_features), lean.filled(x, grad_weight)
    return (*found, lean.filled(x, grad_static), lean.filled(x, grad_bias))


def _layer_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _layer_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:5])
    found = _dconv_layer_backward(grad, *ctx.saved_tensors, needs, *ctx.settings)
    return (*_wanted(found, needs), None, None, None, None)


torch.library.register_autograd("surgeon::dconv_layer", _layer_grad, setup_context=_layer_setup)
differentiable_once("surgeon::dconv_layer_backward")


# --- FLOPs --------------------------------------------------------------------------------------------------------

register_flop_formula(torch.ops.surgeon.dconv)(flops.apply_flops)
register_flop_formula(torch.ops.surgeon.dconv_backward)(flops.apply_backward_flops)
register_flop_formula(torch.ops.surgeon.dconv_layer)(flops.layer_flops)
register_flop_formula(torch.ops.surgeon.dconv_layer_backward)(flops.layer_backward_flops)
