"""The ACDA operator on CUDA, chunk by chunk: atoms, atom convolution, coefficients; see `triton_kernels`.

Scratch memory holds the atoms (m, T, q) and the filtered input (C, M, q) of a chunk's pixels q; T = l_h·l_w taps. Products with
the coefficients use cuBLAS. The backward pass saves only the inputs, recomputes the atoms, and has scratch for the gradients of the
filtered input and the atoms. Sums are in float32; atoms, filtered input and their gradients are rounded to the dtype of x.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from surgeon.layers.acda import triton_kernels as kernels
from surgeon.layers.ops.library import memory_format_of
from surgeon.layers.ops.triton.chunks import Chunk, are_cut, chunks
from surgeon.layers.ops.triton.launch import Geometry, blocks, launch, power_of_two, precision

MOST_ATOMS = 8  # per program at once


@dataclass(frozen=True)
class TritonProblem:
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
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def window(self) -> dict[str, Any]:
        return {"KH": self.psi.shape[1], "KW": self.psi.shape[2]}

    @property
    def taps(self) -> int:
        return math.prod(self.psi.shape[1:])

    @property
    def m_all(self) -> int:
        return self.coeff.shape[2]

    @property
    def dynamic(self) -> int:
        return self.m_all - self.static.shape[0]

    @property
    def atom_block(self) -> int:
        return power_of_two(self.m_all, most=MOST_ATOMS)

    @cached_property
    def basis(self) -> tuple[Tensor, Tensor]:
        """psi and the static atoms, contiguous."""
        return self.psi.contiguous(), self.static.contiguous()

    @cached_property
    def coeff_GOF(self) -> Tensor:
        """(g, C_out/g, C/g·M) in the dtype of x."""
        return self.coeff.to(self.x.dtype).reshape(self.groups, self.coeff.shape[0] // self.groups, -1)

    def chunks(self, numbers: int) -> list[Chunk]:
        """Chunks that need `numbers` of scratch per pixel."""
        size = numbers * self.x.element_size()
        return list(chunks(self.x.shape[0], self.g.out_height, self.g.out_width, size))

    def count(self, chunk: Chunk) -> int:
        """Number of pixels of a chunk."""
        return (chunk.n1 - chunk.n0) * chunk.rows * self.g.out_width

    def where(self, chunk: Chunk) -> tuple[Geometry, int, int, int]:
        """Arguments that every kernel takes for a chunk."""
        return self.g, chunk.i0, chunk.rows, self.count(chunk)

    def scratch(self, chunk: Chunk, *shape: int) -> Tensor:
        return self.x.new_empty(*shape, self.count(chunk))

    def atoms(self, chunk: Chunk) -> Tensor:
        """The dynamic atoms of a chunk, (m, T, q)."""
        out, count = self.scratch(chunk, self.dynamic, self.taps), self.count(chunk)
        alpha, block = self.alpha[chunk.images], power_of_two(self.taps, least=16, most=32)
        if not self.dynamic:
            return out
        launch(
            kernels.atoms_kernel,
            lambda meta: self.dynamic * blocks(self.taps, block) * blocks(count, meta["Q"]),
            *(alpha, self.basis[0], out, alpha.stride(), *self.where(chunk), self.psi.shape[0]),
            T=self.taps,
            BT=block,
            BK=power_of_two(self.psi.shape[0], least=16, most=32),
            PRECISION=precision(alpha.dtype),
        )
        return out

    def filtered(self, atoms: Tensor, chunk: Chunk) -> Tensor:
        """The atom convolution of a chunk, (C, M, q)."""
        out, count, x = self.scratch(chunk, self.channels, self.m_all), self.count(chunk), self.x[chunk.images]
        launch(
            kernels.filtered_kernel,
            lambda meta: (
                blocks(count, meta["Q"]) * blocks(self.channels, meta["C"]) * blocks(self.m_all, self.atom_block)
            ),
            *(x, atoms, self.basis[1], out, x.stride(), *self.where(chunk)),
            *(self.channels, self.dynamic, self.m_all),
            **self.window,
            A=self.atom_block,
        )
        return out

    def by_group(self, filtered: Tensor) -> Tensor:
        """(C, M, q) as (g, C/g·M, q)."""
        return filtered.view(self.groups, -1, filtered.shape[-1])


def forward(*args: Any) -> Tensor:
    """Forward of `acda_conv`; arguments as those of `TritonProblem`."""
    p = TritonProblem(*args)
    shape = (p.x.shape[0], p.coeff.shape[0], p.g.out_height, p.g.out_width)
    y = torch.empty(shape, dtype=p.x.dtype, device=p.x.device, memory_format=memory_format_of(p.x))
    for chunk in p.chunks(p.dynamic * p.taps + p.channels * p.m_all):
        mixed_GOQ = torch.bmm(p.coeff_GOF, p.by_group(p.filtered(p.atoms(chunk), chunk)))
        part = chunk.part(y).transpose(0, 1)
        part.copy_(mixed_GOQ.view(part.shape))
    return y


def backward(grad: Tensor, *args: Any) -> list[Tensor]:
    """Gradients of x, alpha, psi, static and coeff; empty if not needed (`needs`, the last argument)."""
    *given, needs = args
    return _Gradients(TritonProblem(*given), needs).of(grad)


class _Gradients:
    """Gradients of one problem, chunk by chunk."""

    def __init__(self, problem: TritonProblem, needs: Sequence[bool]) -> None:
        self.p = p = problem
        self.needs = needs
        self.needs_x, self.needs_alpha, self.needs_psi, self.needs_static, self.needs_coeff = needs
        self.needs_atoms = self.needs_alpha or self.needs_psi or self.needs_static
        self.chunks = p.chunks(p.taps * (p.dynamic + p.m_all) + p.channels * p.m_all)
        self.adds = are_cut(self.chunks, p.g.out_height)  # in float32 in that case
        self.x = torch.zeros_like(p.x, dtype=torch.float32 if self.adds else None) if self.needs_x else None
        self.alpha = torch.empty_like(p.alpha) if self.needs_alpha else None
        self.psi, self.static, self.coeff = (
            torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (p.psi, p.static, p.coeff)
        )

    def of(self, grad: Tensor) -> list[Tensor]:
        p = self.p
        for chunk in self.chunks:
            self._add(grad, chunk)
        given = (p.x, p.alpha, p.psi, p.static, p.coeff)
        found = (self.x, self.alpha, self.psi, self.static, self.coeff)
        return [
            g.to(t.dtype) if need and g is not None else t.new_empty(0)
            for t, g, need in zip(given, found, self.needs, strict=True)
        ]

    def _add(self, grad: Tensor, chunk: Chunk) -> None:
        p = self.p
        atoms = p.atoms(chunk)
        of_y = chunk.part(grad).movedim(1, -1).reshape(p.count(chunk), p.groups, -1).permute(1, 2, 0)
        if self.needs_coeff:
            filtered = p.by_group(p.filtered(atoms, chunk))
            self.coeff += torch.bmm(of_y, filtered.transpose(1, 2)).view(self.coeff.shape)
        if not (self.needs_x or self.needs_atoms):
            return
        of_filtered = torch.bmm(p.coeff_GOF.transpose(1, 2), of_y)
        if self.x is not None:
            self._input(self.x[chunk.images], atoms, of_filtered, chunk)
        if self.needs_atoms:
            self._atoms(of_filtered, chunk)

    def _input(self, out: Tensor, atoms: Tensor, of_filtered: Tensor, chunk: Chunk) -> None:
        p = self.p
        images, top, bottom = out.shape[0], 0, p.g.height
        if self.adds:  # only the rows that the chunk reads
            top = max(chunk.i0 * p.g.stride_h - p.g.pad_h, 0)
            last = (chunk.i1 - 1) * p.g.stride_h - p.g.pad_h + (p.psi.shape[1] - 1) * p.g.dilation_h
            bottom = max(min(last + 1, p.g.height), top)
        places = images * (bottom - top) * p.g.width
        if places:
            launch(
                kernels.grad_x_kernel,
                lambda meta: blocks(places, meta["P"]) * blocks(p.channels, meta["C"]),
                *(atoms, p.basis[1], of_filtered, out, out.stride(), p.g, chunk.i0, chunk.rows),
                *(top, bottom - top, p.count(chunk), images, p.channels, p.dynamic, p.m_all),
                **p.window,
                ADD=self.adds,
                tune=not self.adds,
            )

    def _atoms(self, of_filtered: Tensor, chunk: Chunk) -> None:
        """Gradients of alpha, psi and the static atoms via the gradient of the atoms (M, T, q)."""
        p, count, x = self.p, self.p.count(chunk), self.p.x[chunk.images]
        of_atoms = p.scratch(chunk, p.m_all, p.taps)
        launch(
            kernels.grad_atoms_kernel,
            lambda meta: blocks(count, meta["Q"]) * blocks(p.taps, meta["BT"]) * blocks(p.m_all, p.atom_block),
            *(x, of_filtered, of_atoms, x.stride(), *p.where(chunk), p.channels, p.m_all),
            **p.window,
            A=p.atom_block,
        )
        if self.needs_static:
            self.static += of_atoms[p.dynamic :].sum(-1, dtype=torch.float32).view(self.static.shape)
        if not p.dynamic:
            return
        if self.needs_psi:
            alpha = chunk.part(p.alpha).transpose(0, 1).reshape(p.dynamic, -1, count).to(of_atoms.dtype)
            share = torch.bmm(alpha, of_atoms[: p.dynamic].transpose(1, 2))
            self.psi += share.sum(0, dtype=torch.float32).view(self.psi.shape)
        if self.alpha is not None:
            self._alpha(self.alpha[chunk.images], of_atoms, chunk)

    def _alpha(self, out: Tensor, of_atoms: Tensor, chunk: Chunk) -> None:
        p, count, elements = self.p, self.p.count(chunk), self.p.psi.shape[0]
        block = power_of_two(elements, least=16, most=32)
        launch(
            kernels.grad_alpha_kernel,
            lambda meta: blocks(count, meta["Q"]) * p.dynamic * blocks(elements, block),
            *(of_atoms, p.basis[0], out, out.stride(), *p.where(chunk), elements),
            T=p.taps,
            BT=power_of_two(p.taps, least=16, most=32),
            BK=block,
            PRECISION=precision(of_atoms.dtype),
        )
