"""DConv in C (dconv.h): float32 on the CPU, bit-identical for any number of threads."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from surgeon.layers.ops.native.compiler import library
from surgeon.layers.ops.native.support import in_parallel, pointer

PARTS = 64  # maximum number of parts per call

_SIZES = ("h", "w", "oh", "ow", "lh", "lw", "sh", "sw", "ph", "pw", "dh", "dw")
_COUNTS = ("n", "units", "channels", "kernels", "band", "scratch")
_LAYER_COUNTS = ("n", "c", "outputs", "features", "bands", "band", "chunk", "scratch")
_TENSORS = ("x", "kernels", "y", "grad", "gx", "gkernels")


class _Plan(ctypes.Structure):
    """`Dconv` of dconv.h."""

    _fields_ = [(name, ctypes.c_int64) for name in (*_SIZES, *_COUNTS)]


class _Tensors(ctypes.Structure):
    """`DconvTensors` of dconv.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in _TENSORS]


class _LayerPlan(ctypes.Structure):
    """`DconvLayer` of dconv.h."""

    _fields_ = [(name, ctypes.c_int64) for name in (*_SIZES, *_LAYER_COUNTS)]


class _LayerTensors(ctypes.Structure):
    """`DconvLayerTensors` of dconv.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "features", "weight", "fixed", "bias", "y")]


def _plan(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], geometry: Sequence[Sequence[int]]) -> _Plan:
    units = min(x.shape[1], kernels.shape[1])
    sizes = (*x.shape[2:], *kernels.shape[3:], *kernel_size, *(value for pair in geometry for value in pair))
    plan = _Plan(*sizes, x.shape[0], units, x.shape[1] // units, kernels.shape[1] // units)
    library().dconv_plan(ctypes.byref(plan))
    return plan


def _run(plan: _Plan, *, back: bool, **given: Tensor | None) -> None:
    tensors = _Tensors(**{name: pointer(t) for name, t in given.items()})
    units = plan.n * plan.units
    parts, run = min(PARTS, units), library().dconv_run

    def work(part: int, scratch: Tensor) -> None:
        ends = [ctypes.c_int64(units * p // parts) for p in (part, part + 1)]
        run(ctypes.byref(plan), ctypes.byref(tensors), pointer(scratch), *ends, ctypes.c_int64(back))

    in_parallel(work, parts, plan.scratch)


def forward(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], *geometry: Sequence[int]) -> Tensor:
    """Forward of `dconv`; `geometry` is stride, padding, dilation."""
    x, kernels = x.contiguous(), kernels.contiguous()
    plan = _plan(x, kernels, kernel_size, geometry)
    y = x.new_empty(x.shape[0], max(x.shape[1], kernels.shape[1]), *kernels.shape[3:])
    _run(plan, back=False, x=x, kernels=kernels, y=y)
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    kernel_size: Sequence[int],
    needs: Sequence[bool],
    *geometry: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradients of `dconv` for x and the kernels; empty if not in `needs`."""
    grad, x, kernels = grad.contiguous(), x.contiguous(), kernels.contiguous()
    plan = _plan(x, kernels, kernel_size, geometry)
    gx = torch.zeros_like(x) if needs[0] else None
    gkernels = torch.empty_like(kernels) if needs[1] else None
    _run(plan, back=True, x=x, kernels=kernels, grad=grad, gx=gx, gkernels=gkernels)
    return x.new_empty(0) if gx is None else gx, x.new_empty(0) if gkernels is None else gkernels


def layer_forward(
    x: Tensor, features: Tensor, weight: Tensor, static: Tensor, bias: Tensor | None, *geometry: Sequence[int]
) -> Tensor:
    """Forward of `dconv_layer` if every output channel has a generated kernel; `geometry` is stride, padding, dilation."""
    x, features, static = x.contiguous(), features.contiguous(), static.contiguous()
    bias = None if bias is None else bias.contiguous()
    sizes = (*x.shape[2:], *features.shape[2:], *static.shape[2:], *(value for pair in geometry for value in pair))
    plan = _LayerPlan(*sizes, x.shape[0], x.shape[1], static.shape[0], features.shape[1])
    own = library()
    own.dconv_layer_plan(ctypes.byref(plan))
    weight = weight.contiguous()
    packed = torch.empty_like(weight)
    own.dconv_layer_pack(ctypes.byref(plan), pointer(weight), pointer(packed))
    y = x.new_empty(x.shape[0], static.shape[0], *features.shape[2:])
    given = {"x": x, "features": features, "weight": packed, "fixed": static, "bias": bias, "y": y}
    tensors = _LayerTensors(**{name: pointer(t) for name, t in given.items()})

    def work(task: int, scratch: Tensor) -> None:
        own.dconv_layer_forward(ctypes.byref(plan), ctypes.byref(tensors), pointer(scratch), ctypes.c_int64(task))

    in_parallel(work, plan.n * plan.bands, plan.scratch)
    return y
