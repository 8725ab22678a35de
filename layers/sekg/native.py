"""DConv in C (dconv.h, dconv_layer.h), for the CPU: computed in float32, bit-identical for any number of threads."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from surgeon.layers.ops.native.compiler import library
from surgeon.layers.ops.native.half import by_images, gradients_by_images
from surgeon.layers.ops.native.support import MOVED_MACS, in_parallel, partial_sums, pointer, threads_for

CALLS = 4  # into C for each thread, so that none waits long for the last one

_SIZES = ("h", "w", "oh", "ow", "lh", "lw", "sh", "sw", "ph", "pw", "dh", "dw")
_COUNTS = ("n", "units", "channels", "kernels", "band", "scratch")
_LAYER_COUNTS = ("n", "c", "outputs", "features", "bands", "band", "tile", "chunk", "forward", "backward", "wide")
_LAYER_TENSORS = ("x", "features", "weight", "weight_back", "bias", "y", "grad")
_LAYER_GRADIENTS = ("gx", "gfeatures", "gweight", "gfixed")
_TENSORS = ("x", "kernels", "y", "grad", "gx", "gkernels")


class _Plan(ctypes.Structure):
    """`Dconv` of dconv.h."""

    _fields_ = [(name, ctypes.c_int64) for name in (*_SIZES, *_COUNTS)]


class _Tensors(ctypes.Structure):
    """`DconvTensors` of dconv.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in _TENSORS]


class _LayerPlan(ctypes.Structure):
    """`DconvLayer` of dconv_layer.h."""

    _fields_ = [(name, ctypes.c_int64) for name in (*_SIZES, *_LAYER_COUNTS)]


class _LayerTensors(ctypes.Structure):
    """`DconvLayerTensors` of dconv_layer.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in (*_LAYER_TENSORS, *_LAYER_GRADIENTS)]


@lru_cache(64)
def _plan(n: int, channels: int, kernels: int, *sizes: int) -> _Plan:
    """The plan for x (n, channels, …), `kernels` per image and the `_SIZES`; read-only."""
    units = min(channels, kernels)
    plan = _Plan(*sizes, n, units, channels // units, kernels // units)
    library().dconv_plan(ctypes.byref(plan))
    return plan


def _plan_for(x: Tensor, kernels: Tensor, *sizes: Sequence[int]) -> _Plan:
    """`sizes` are those of the window, stride, padding, dilation."""
    (n, channels, *image), (_, number, _, *out) = x.shape, kernels.shape
    (a, b), (c, d), (e, f), (g, h) = sizes
    return _plan(n, channels, number, *image, *out, a, b, c, d, e, f, g, h)


def _run(plan: _Plan, *given: Tensor | None) -> None:
    """Run on the tensors of `_Tensors`, in order; those at the end may be missing. Given a gradient, the backward pass."""
    tensors = _Tensors(*(None if t is None else t.data_ptr() for t in given))
    units = plan.n * plan.units
    run, back = library().dconv_run, len(given) > 3
    threads = threads_for(MOVED_MACS * plan.n * plan.units * plan.kernels * plan.lh * plan.lw * plan.oh * plan.ow)
    parts = min(CALLS * threads, units) if threads > 1 else 1

    def work(part: int, scratch: Tensor) -> None:
        first, end = ctypes.c_int64(units * part // parts), ctypes.c_int64(units * (part + 1) // parts)
        run(ctypes.byref(plan), ctypes.byref(tensors), pointer(scratch), first, end, ctypes.c_int64(back))

    in_parallel(work, parts, plan.scratch, threads)


def _by_unit(x: Tensor, kernels: Tensor, *grad: Tensor) -> list[Tensor]:
    """The tensors with every unit as an image of its own: units share nothing."""
    units = min(x.shape[1], kernels.shape[1])
    shapes = [(t.shape[0] * units, t.shape[1] // units, *t.shape[2:]) for t in (x, kernels, *grad)]
    return [t.contiguous().view(shape) for t, shape in zip((x, kernels, *grad), shapes, strict=True)]


def forward(x: Tensor, kernels: Tensor, kernel_size: Sequence[int], *geometry: Sequence[int]) -> Tensor:
    """Forward of `dconv`; `geometry` is stride, padding, dilation."""

    def run(x: Tensor, kernels: Tensor) -> Tensor:
        plan = _plan_for(x, kernels, kernel_size, *geometry)
        y = x.new_empty(plan.n, plan.units * plan.channels * plan.kernels, plan.oh, plan.ow)
        _run(plan, x, kernels, y)
        return y

    if x.dtype == torch.float32:
        return run(x.contiguous(), kernels.contiguous())
    y = by_images(run, x.dtype, *_by_unit(x, kernels))
    return y.view(x.shape[0], max(x.shape[1], kernels.shape[1]), *kernels.shape[3:])


def backward(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    kernel_size: Sequence[int],
    needs: Sequence[bool],
    *geometry: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Gradients of `dconv` for x and the kernels; empty if not in `needs`."""

    def run(x: Tensor, kernels: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        plan = _plan_for(x, kernels, kernel_size, *geometry)
        gx = torch.zeros_like(x) if needs[0] else None
        gkernels = torch.empty_like(kernels) if needs[1] else None
        _run(plan, x, kernels, None, grad, gx, gkernels)
        return x.new_empty(0) if gx is None else gx, x.new_empty(0) if gkernels is None else gkernels

    batched = _by_unit(x, kernels, grad)
    found = gradients_by_images(run, batched, batched[:2], needs)
    gx, gkernels = (g.view(t.shape) if need else g for g, t, need in zip(found, (x, kernels), needs, strict=True))
    return gx, gkernels


class Layer:
    """One call of `dconv_layer` if every output channel has a generated kernel: the plan, and the operands in C's layout."""

    def __init__(
        self, x: Tensor, features: Tensor, weight: Tensor, static: Tensor, bias: Tensor | None, *geometry: Sequence[int]
    ) -> None:
        self.x, self.features = x.contiguous(), features.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.shapes = [None if t is None else t.shape for t in (x, features, weight, static, bias)]
        self.weight = torch.cat([weight, static.reshape(-1, 1)], 1)
        sizes = (*x.shape[2:], *features.shape[2:], *static.shape[2:], *(value for pair in geometry for value in pair))
        self.plan = _LayerPlan(*sizes, x.shape[0], x.shape[1], static.shape[0], features.shape[1])
        self.library = library()
        self.library.dconv_layer_plan(ctypes.byref(self.plan))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass."""
        plan = self.plan
        return int(plan.n * plan.oh * plan.ow * self.weight.numel())

    def packed(self, *, back: bool) -> Tensor:
        """The weight in the order of multiplication."""
        own, others = torch.empty_like(self.weight), None
        order = (others, own) if back else (own, others)
        self.library.dconv_layer_pack(ctypes.byref(self.plan), *map(pointer, (self.weight, *order)))
        return own

    def tensors(self, **more: Tensor | None) -> _LayerTensors:
        given = {"x": self.x, "features": self.features, "bias": self.bias, **more}
        return _LayerTensors(**{name: pointer(t) for name, t in given.items()})

    def forward(self) -> Tensor:
        """The result, (N, O, H', W')."""
        plan = self.plan
        y = self.x.new_empty(plan.n, plan.outputs, plan.oh, plan.ow)
        weight = self.packed(back=False)
        given, run = self.tensors(weight=weight, y=y), self.library.dconv_layer_forward

        def work(task: int, scratch: Tensor) -> None:
            run(ctypes.byref(plan), ctypes.byref(given), pointer(scratch), ctypes.c_int64(task))

        in_parallel(work, plan.n * plan.bands, plan.forward, threads_for(self.macs))
        return y

    def backward(self, grad: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, features, weight, static and bias; empty if not in `needs`."""
        plan, run, tasks = self.plan, self.library.dconv_layer_backward, self.plan.n * self.plan.bands
        rows = self.weight.shape[0]
        shapes = [(rows, plan.wide), (rows, self.library.surgeon_lanes())]
        floats = sum(torch.Size(s).numel() for s, need in zip(shapes, needs[2:4], strict=True) if need)
        parts = partial_sums(tasks, floats)
        sums = [self.x.new_zeros(parts, *s) if need else None for s, need in zip(shapes, needs[2:4], strict=True)]
        gx = torch.zeros_like(self.x) if needs[0] else None
        gfeatures = torch.empty_like(self.features) if needs[1] else None
        grad = grad.contiguous()
        on, back = self.packed(back=False), self.packed(back=True)
        shared = {"weight": on, "weight_back": back, "grad": grad, "gx": gx, "gfeatures": gfeatures}
        for odd in range(min(plan.bands, 2)):

            def work(part: int, scratch: Tensor, odd: int = odd) -> None:
                own = dict(zip(_LAYER_GRADIENTS[2:], (None if s is None else s[part] for s in sums), strict=True))
                given = self.tensors(**shared, **own)
                ends = [ctypes.c_int64(tasks * p // parts) for p in (part, part + 1)]
                run(ctypes.byref(plan), ctypes.byref(given), pointer(scratch), *ends, ctypes.c_int64(odd))

            in_parallel(work, parts, plan.backward, threads_for(2 * self.macs))
        gweight, gstatic = (None if s is None else s.sum(0) for s in sums)
        found = (
            gx,
            gfeatures,
            None if gweight is None else gweight[:, : plan.features].contiguous(),
            None if gstatic is None else gstatic.sum(-1).view(self.shapes[3] or ()),
            grad.sum((0, 2, 3)) if needs[4] else None,
        )
        a, b, c, d, e = (self.x.new_empty(0) if f is None else f for f in found)
        return a, b, c, d, e


def layer_forward(
    x: Tensor, features: Tensor, weight: Tensor, static: Tensor, bias: Tensor | None, *geometry: Sequence[int]
) -> Tensor:
    """Forward of `dconv_layer`; `geometry` is stride, padding, dilation."""
    w, s, b = weight.float(), static.float(), None if bias is None else bias.float()
    return by_images(lambda x, features: Layer(x, features, w, s, b, *geometry).forward(), x.dtype, x, features)


def layer_backward(
    grad: Tensor,
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    static: Tensor,
    bias: Tensor | None,
    needs: Sequence[bool],
    *geometry: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `dconv_layer` for its first five inputs; empty if not in `needs`."""
    w, s, b = weight.float(), static.float(), None if bias is None else bias.float()

    def run(grad: Tensor, x: Tensor, features: Tensor) -> Sequence[Tensor]:
        return Layer(x, features, w, s, b, *geometry).backward(grad, needs)

    inputs = (x, features, weight, static, x.new_empty(0) if bias is None else bias)
    gx, gfeatures, gweight, gstatic, gbias = gradients_by_images(run, (grad, x, features), inputs, needs)
    return gx, gfeatures, gweight, gstatic, gbias
