"""The ACDA operator on CUDA, chunk by chunk: atoms, then filtering and mixing in one kernel; see `acda_kernels`.

A chunk is as many images, or rows of one image, as keep its scratch tensors below `CHUNK_BYTES`: in the L2 cache, and few
megabytes whatever the image. Forward makes the atoms (m, T, q) and nothing else; the filtered input lives in registers. Backward
saves only the inputs, makes the atoms again, and has scratch for the gradients of the filtered input and of the atoms; products
with the coefficients are cuBLAS's. Sums are in float32; atoms, filtered input and their gradients are rounded to the dtype of x.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from surgeon.layers.kernels.triton import acda_kernels as kernels
from surgeon.layers.kernels.triton.launch import Geometry, blocks, launch, memory_format, power_of_two, precision

CHUNK_BYTES = 32 << 20
MOST_ATOMS = 8  # that a program filters with at once
MOST_OUTPUTS = 256


@dataclass(frozen=True)
class Chunk:
    """Images n0:n1, output rows i0:i1."""

    n0: int
    n1: int
    i0: int
    i1: int


@dataclass(frozen=True)
class Problem:
    """One call; shapes as in `acda_reference`."""

    x: Tensor
    alpha: Tensor
    psi: Tensor
    static: Tensor
    coeff: Tensor
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @cached_property
    def g(self) -> Geometry:
        return Geometry.of(self.x, self.alpha.shape[-2:], self.stride, self.padding, self.dilation)

    @property
    def window(self) -> tuple[int, int]:
        return self.psi.shape[1], self.psi.shape[2]

    @property
    def taps(self) -> int:
        return math.prod(self.window)

    @property
    def m_all(self) -> int:
        return self.coeff.shape[2]

    @property
    def dynamic(self) -> int:
        return self.m_all - self.static.shape[0]

    @cached_property
    def atom_block(self) -> int:
        return power_of_two(self.m_all, most=MOST_ATOMS)

    @cached_property
    def basis(self) -> tuple[Tensor, Tensor, Tensor]:
        """psi, the static atoms and the coefficients as the kernels want them: contiguous, the coefficients in x's dtype."""
        return self.psi.contiguous(), self.static.contiguous(), self.coeff.to(self.x.dtype).contiguous()

    def chunks(self, numbers: int) -> Iterator[Chunk]:
        """Chunks with `numbers` of scratch a pixel."""
        images, (height, width) = self.x.shape[0], (self.g.out_height, self.g.out_width)
        rows = max(1, CHUNK_BYTES // (numbers * width * self.x.element_size()))
        many = max(1, rows // height)
        rows = min(rows, height)
        for n0 in range(0, images, many):
            for i0 in range(0, height, rows):
                yield Chunk(n0, min(n0 + many, images), i0, min(i0 + rows, height))

    def count(self, chunk: Chunk) -> int:
        """Pixels of a chunk."""
        return (chunk.n1 - chunk.n0) * (chunk.i1 - chunk.i0) * self.g.out_width

    def where(self, chunk: Chunk) -> tuple[Geometry, int, int, int]:
        """What every kernel is told of a chunk."""
        return self.g, chunk.i0, chunk.i1 - chunk.i0, self.count(chunk)

    def scratch(self, chunk: Chunk, *shape: int) -> Tensor:
        return self.x.new_empty(*shape, self.count(chunk))

    def atoms(self, chunk: Chunk) -> Tensor:
        """The dynamic atoms of a chunk, (m, T, q)."""
        out, count = self.scratch(chunk, self.dynamic, self.taps), self.count(chunk)
        alpha = self.alpha[chunk.n0 : chunk.n1]
        launch(
            kernels.atoms_kernel,
            lambda meta: self.dynamic * blocks(count, meta["Q"]),
            *(alpha, self.basis[0], out, alpha.stride(), *self.where(chunk), self.psi.shape[0]),
            T=self.taps,
            BT=power_of_two(self.taps, least=16),
            BK=power_of_two(self.psi.shape[0], least=16, most=32),
            PRECISION=precision(alpha.dtype),
        )
        return out

    def windows(self) -> dict[str, int]:
        return {"KH": self.window[0], "KW": self.window[1]}


def forward(*args: Tensor | Sequence[int] | int) -> Tensor:
    """Forward of `acda_conv`; arguments as those of `Problem`."""
    p = Problem(*args)  # type: ignore[arg-type]
    shape = (p.x.shape[0], p.coeff.shape[0], p.g.out_height, p.g.out_width)
    y = torch.empty(shape, dtype=p.x.dtype, device=p.x.device, memory_format=memory_format(p.x))
    _, static, coeff = p.basis
    o_group, c_group = coeff.shape[0] // p.groups, coeff.shape[1]
    o_block = power_of_two(o_group, least=16, most=MOST_OUTPUTS)
    for chunk in p.chunks(max(p.dynamic, 1) * p.taps) if y.numel() else ():
        x, out, count = p.x[chunk.n0 : chunk.n1], y[chunk.n0 : chunk.n1], p.count(chunk)
        launch(
            kernels.forward_kernel,
            _forward_programs(count, p.groups * blocks(o_group, o_block)),
            *(x, p.atoms(chunk), static, coeff, out, x.stride(), out.stride(), *p.where(chunk)),
            *(c_group, o_group, p.dynamic, p.m_all),
            **p.windows(),
            A=p.atom_block,
            O=o_block,
            PRECISION=precision(x.dtype),
        )
    return y


def _forward_programs(count: int, others: int) -> Callable[[Mapping[str, int]], int]:
    return lambda meta: blocks(count, meta["Q"]) * others


def backward(grad: Tensor, *args: Tensor | Sequence[int] | int | Sequence[bool]) -> list[Tensor]:
    """Gradients of x, alpha, psi, static and coeff, empty where `needs`, the last argument, says no."""
    *given, needs = args
    return _Gradients(Problem(*given), list(needs)).of(grad)  # type: ignore[arg-type]


class _Gradients:
    """Gradients of one problem, chunk by chunk."""

    def __init__(self, problem: Problem, needs: list[bool]) -> None:
        self.p = p = problem
        self.needs_x, self.needs_alpha, self.needs_psi, self.needs_static, self.needs_coeff = needs
        numbers = p.taps * (p.dynamic + p.m_all) + p.x.shape[1] * p.m_all
        self.chunks = list(p.chunks(numbers)) if p.x.shape[0] else []
        # Chunks of rows share input rows, and add to them, in float32.
        self.adds = any(chunk.i1 - chunk.i0 < p.g.out_height for chunk in self.chunks)
        self.x, self.alpha = self._empty_x(), torch.empty_like(p.alpha) if self.needs_alpha else None
        self.psi, self.static, self.coeff = (
            torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (p.psi, p.static, p.coeff)
        )

    def _empty_x(self) -> Tensor | None:
        x = self.p.x
        if not self.needs_x:
            return None
        if self.adds or not self.chunks:
            return torch.zeros_like(x, dtype=torch.float32)
        return torch.empty_like(x)

    def of(self, grad: Tensor) -> list[Tensor]:
        p = self.p
        for chunk in self.chunks:
            self._add(grad, chunk)
        given = (p.x, p.alpha, p.psi, p.static, p.coeff)
        needs = (self.needs_x, self.needs_alpha, self.needs_psi, self.needs_static, self.needs_coeff)
        found = (self.x, self.alpha, self.psi, self.static, self.coeff)
        return [
            g.to(t.dtype) if need and g is not None else t.new_empty(0)
            for t, g, need in zip(given, found, needs, strict=True)
        ]

    def _add(self, grad: Tensor, chunk: Chunk) -> None:
        p, count = self.p, self.p.count(chunk)
        c_group = p.coeff.shape[1]
        atoms, x = p.atoms(chunk), p.x[chunk.n0 : chunk.n1]
        of_y = grad[chunk.n0 : chunk.n1, :, chunk.i0 : chunk.i1].movedim(1, -1).reshape(count, p.groups, -1)
        scratch = p.scratch(chunk, p.x.shape[1], p.m_all)
        by_group = scratch.view(p.groups, c_group * p.m_all, count)
        if self.needs_coeff:
            self._filter(x, atoms, scratch, chunk)
            self.coeff += torch.bmm(of_y.permute(1, 2, 0), by_group.transpose(1, 2)).view(self.coeff.shape)
        if not (self.needs_x or self.needs_alpha or self.needs_psi or self.needs_static):
            return
        coeff = p.basis[2].view(p.groups, -1, c_group * p.m_all)
        torch.bmm(coeff.transpose(1, 2), of_y.permute(1, 2, 0), out=by_group)
        if self.x is not None:
            self._input(self.x[chunk.n0 : chunk.n1], atoms, scratch, chunk)
        if self.needs_alpha or self.needs_psi or self.needs_static:
            self._atoms(x, scratch, chunk)

    def _filter(self, x: Tensor, atoms: Tensor, out: Tensor, chunk: Chunk) -> None:
        """out (C, M, q) = the atom convolution."""
        p, count = self.p, self.p.count(chunk)
        launch(
            kernels.filtered_kernel,
            lambda meta: blocks(count, meta["Q"]) * blocks(x.shape[1], meta["C"]) * blocks(p.m_all, p.atom_block),
            *(x, atoms, p.basis[1], out, x.stride(), *p.where(chunk), x.shape[1], p.dynamic, p.m_all),
            **p.windows(),
            A=p.atom_block,
        )

    def _input(self, out: Tensor, atoms: Tensor, of_filtered: Tensor, chunk: Chunk) -> None:
        p = self.p
        first, last = (i * p.g.stride_h - p.g.pad_h for i in (chunk.i0, chunk.i1 - 1))
        top = max(first, 0) if self.adds else 0
        bottom = min(last + (p.window[0] - 1) * p.g.dilation_h + 1, p.g.height) if self.adds else p.g.height
        images, channels = out.shape[:2]
        if top >= bottom:
            return
        launch(
            kernels.grad_x_kernel,
            lambda meta: blocks(images * (bottom - top) * p.g.width, meta["P"]) * blocks(channels, meta["C"]),
            *(atoms, p.basis[1], of_filtered, out, out.stride(), p.g, chunk.i0, chunk.i1 - chunk.i0),
            *(top, bottom - top, p.count(chunk), images, channels, p.dynamic, p.m_all),
            **p.windows(),
            ADD=self.adds,
        )

    def _atoms(self, x: Tensor, of_filtered: Tensor, chunk: Chunk) -> None:
        """Gradients of alpha, psi and the static atoms, by way of that of the atoms."""
        p, count = self.p, self.p.count(chunk)
        of_atoms = p.scratch(chunk, p.m_all, p.taps)
        launch(
            kernels.grad_atoms_kernel,
            lambda meta: blocks(count, meta["Q"]) * blocks(p.taps, meta["BT"]) * blocks(p.m_all, p.atom_block),
            *(x, of_filtered, of_atoms, x.stride(), *p.where(chunk), x.shape[1], p.m_all),
            **p.windows(),
            A=p.atom_block,
        )
        if self.needs_static:
            self.static += of_atoms[p.dynamic :].sum(-1, dtype=torch.float32).view(self.static.shape)
        if self.needs_psi:
            part = p.alpha[chunk.n0 : chunk.n1, :, chunk.i0 : chunk.i1].transpose(0, 1).reshape(p.dynamic, -1, count)
            product = torch.bmm(part.to(of_atoms.dtype), of_atoms[: p.dynamic].transpose(1, 2))
            self.psi += product.sum(0, dtype=torch.float32).view(self.psi.shape)
        if self.alpha is None or not p.dynamic:
            return
        alpha, elements = self.alpha[chunk.n0 : chunk.n1], p.psi.shape[0]
        block = power_of_two(elements, least=16, most=32)
        launch(
            kernels.grad_alpha_kernel,
            lambda meta: blocks(count, meta["Q"]) * p.dynamic * blocks(elements, block),
            *(of_atoms, p.basis[0], alpha, alpha.stride(), *p.where(chunk), elements),
            T=p.taps,
            BT=power_of_two(p.taps, least=16, most=32),
            BK=block,
            PRECISION=precision(alpha.dtype),
        )
