"""The ACDA operator in C (acda.h), for the CPU: computed in float32, bit-identical for any number of threads."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.layers.acda.lean import lean_gradients
from surgeon.layers.ops.native.compiler import library
from surgeon.layers.ops.native.half import by_images, gradients_by_images
from surgeon.layers.ops.native.support import in_parallel, partial_sums, pointer, threads_for

# Per group: the gradients of more are summed up faster by torch, over several images at once.
MOST_COEFFICIENTS = 1 << 20

_SIZES = ("h", "w", "oh", "ow", "lh", "lw", "sh", "sw", "ph", "pw", "dh", "dw")
_COUNTS = ("n", "c", "k", "c_out", "c_group", "m", "m_all", "groups", "taps")
_PLANNED = ("bands", "band", "tile", "forward", "backward", "features")
_TENSORS = ("x", "alpha", "psi", "static", "coeff", "y", "grad", "psi_back", "coeff_back")
_GRADIENTS = ("gx", "galpha", "gpsi", "gstatic", "gcoeff")


class _Plan(ctypes.Structure):
    """`Acda` of acda.h."""

    _fields_ = [(name, ctypes.c_int64) for name in (*_SIZES, *_COUNTS, *_PLANNED)]


class _Tensors(ctypes.Structure):
    """`AcdaTensors` of acda.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in (*_TENSORS, *_GRADIENTS)]


class NativeProblem:
    """One call: the plan, and the operands in the layout of the C functions."""

    def __init__(
        self,
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
        self.x, self.alpha, self.static = x.contiguous(), alpha.contiguous(), static.contiguous()
        self.psi, self.coeff = psi.contiguous(), coeff.contiguous()
        self.library = library()
        k, c_out, c_group, m_all = psi.shape[0], *coeff.shape
        sizes = (*x.shape[2:], *alpha.shape[2:], *psi.shape[1:], *stride, *padding, *dilation)
        counts = (x.shape[0], x.shape[1], k, c_out, c_group, alpha.shape[1] // k, m_all, groups, 0)
        self.plan = _Plan(*sizes, *counts)
        self.library.acda_plan(ctypes.byref(self.plan))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass: filtering with the atoms, and the coefficients."""
        plan = self.plan
        pixel = plan.m_all * (plan.c * plan.lh * plan.lw + plan.c_out * plan.c_group)
        return int(plan.n * plan.oh * plan.ow * pixel)

    def packed(self, *, back: bool) -> tuple[Tensor, Tensor]:
        """The basis and the coefficients in the order of multiplication."""
        psi, coeff = torch.empty_like(self.psi), torch.empty_like(self.coeff)
        none = ctypes.c_void_p(None)
        own, others = (pointer(coeff), pointer(psi)), (none, none)
        order = (*others, *own) if back else (*own, *others)
        self.library.acda_pack(ctypes.byref(self.plan), pointer(self.coeff), pointer(self.psi), *order)
        return psi, coeff

    def tensors(self, **more: Tensor | None) -> _Tensors:
        given = {"x": self.x, "alpha": self.alpha, "static": self.static, **more}
        return _Tensors(**{name: pointer(t) for name, t in given.items()})

    def forward(self) -> Tensor:
        """The result, (N, C_out, H', W')."""
        plan = self.plan
        y = self.x.new_empty(plan.n, plan.c_out, plan.oh, plan.ow)
        psi, coeff = self.packed(back=False)
        given = self.tensors(psi=psi, coeff=coeff, y=y)

        def work(task: int, scratch: Tensor) -> None:
            self.library.acda_forward(ctypes.byref(plan), ctypes.byref(given), pointer(scratch), ctypes.c_int64(task))

        in_parallel(work, plan.n * plan.bands, plan.forward, threads_for(self.macs))
        return y

    def backward(self, grad: Tensor, needs: Sequence[bool]) -> list[Tensor]:
        """Gradients of x, alpha, psi, static and coeff; empty if not needed."""
        plan, tasks = self.plan, self.plan.n * self.plan.bands
        lanes = self.library.surgeon_lanes()
        shapes = [
            (plan.k, plan.taps, lanes),
            (plan.m_all - plan.m, plan.taps, lanes),
            (plan.groups, plan.c_out // plan.groups, plan.features),
        ]
        floats = sum(torch.Size(s).numel() for s, need in zip(shapes, needs[2:], strict=True) if need)
        parts = partial_sums(tasks, floats)
        gx = torch.zeros_like(self.x) if needs[0] else None
        galpha = torch.empty_like(self.alpha) if needs[1] else None
        sums = [
            self.x.new_zeros(parts, *s) if need and 0 not in s else None
            for s, need in zip(shapes, needs[2:], strict=True)
        ]
        grad = grad.contiguous()
        psi, coeff = self.packed(back=False)
        psi_back, coeff_back = self.packed(back=True)
        shared = {"psi": psi, "coeff": coeff, "psi_back": psi_back, "coeff_back": coeff_back, "grad": grad}
        for odd in (0, 1):

            def work(part: int, scratch: Tensor, odd: int = odd) -> None:
                own = dict(zip(_GRADIENTS[2:], (None if s is None else s[part] for s in sums), strict=True))
                given = self.tensors(**shared, gx=gx, galpha=galpha, **own)
                ends = [ctypes.c_int64(tasks * p // parts) for p in (part, part + 1)]
                self.library.acda_backward(
                    ctypes.byref(plan), ctypes.byref(given), pointer(scratch), *ends, ctypes.c_int64(odd)
                )

            if odd < plan.bands:
                in_parallel(work, parts, plan.backward, threads_for(2 * self.macs))
        return self._results(gx, galpha, sums, needs)

    def _results(
        self, gx: Tensor | None, galpha: Tensor | None, sums: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor]:
        gpsi, gstatic, gcoeff = (None if s is None else s.sum(0) for s in sums)
        used = self.plan.c_group * self.plan.m_all
        found = [
            gx,
            galpha,
            None if gpsi is None else gpsi.sum(-1).view_as(self.psi),
            None if gstatic is None else gstatic.sum(-1).view_as(self.static),
            None if gcoeff is None else gcoeff[..., :used].reshape(self.coeff.shape),
        ]
        inputs = (self.x, self.alpha, self.psi, self.static, self.coeff)
        return [
            (t.new_zeros(t.shape) if f is None else f) if need else t.new_empty(0)
            for t, f, need in zip(inputs, found, needs, strict=True)
        ]


def forward(x: Tensor, alpha: Tensor, psi: Tensor, static: Tensor, coeff: Tensor, *geometry: Any) -> Tensor:
    """The result in the dtype of x, computed in float32; `geometry` is stride, padding, dilation, groups."""
    psi, static, coeff = (t.float() for t in (psi, static, coeff))

    def run(x: Tensor, alpha: Tensor) -> Tensor:
        return NativeProblem(x, alpha, psi, static, coeff, *geometry).forward()

    return by_images(run, x.dtype, x, alpha)


def backward(grad: Tensor, *args: Any) -> list[Tensor]:
    """Gradients of x, alpha, psi, static and coeff for the arguments of `forward` and, last, `needs`; empty if not needed.

    Torch computes them for more than `MOST_COEFFICIENTS`.
    """
    inputs, geometry, needs = args[:5], args[5:-1], args[-1]
    if inputs[4].numel() > geometry[3] * MOST_COEFFICIENTS:
        return lean_gradients(grad, inputs, geometry, needs)
    psi, static, coeff = (t.float() for t in inputs[2:])

    def run(grad: Tensor, x: Tensor, alpha: Tensor) -> list[Tensor]:
        return NativeProblem(x, alpha, psi, static, coeff, *geometry).backward(grad, needs)

    return gradients_by_images(run, [grad, *inputs[:2]], inputs, needs)
