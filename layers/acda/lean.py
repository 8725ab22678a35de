"""The ACDA operator without unfolding the input: y = coeff · (atoms(alpha, psi, static) * x); shapes as in `acda_reference`.

The input is unfolded along y only, l_h copies instead of l_h·l_w, into rows U (rows, columns, l_h, C). There the patch of an
output pixel is one contiguous run of l_w·l_h·C numbers, so an overlapping `as_strided` view gives all patches of a row
to one `bmm` with the row's atoms D (pixels, M, l_w·l_h), M = m + r. Atoms, unfolded rows and filtered rows Z (pixels, M, C)
exist for one chunk of rows at a time, in reused buffers; the coefficient product writes the result to the output.
Dilation splits the columns into residue classes (`Phase`), each of which is a convolution without dilation.

The backward pass saves only the inputs and processes the same chunks. The gradient of D uses the unfolded rows channel by channel,
(C, columns, l_h). The gradient of x is gathered, not scattered: a padded column is read by l_w neighboring pixels, again
one contiguous run of the gradient of Z, so it is also an overlapping `bmm`.

Half precision is computed in float32 and rounded at the end.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon.layers.ops.tiles import Workspace

CHUNK_BYTES = {"cpu": 4 << 20}
CHUNK_BYTES_ELSEWHERE = 24 << 20


@dataclass(frozen=True)
class Phase:
    """`count` output columns first, first + every, …, whose taps read the padded columns start, start + dilation, ….

    Among those columns the taps of neighboring pixels are `step` apart; `width` columns are read.
    """

    first: int
    every: int
    count: int
    start: int
    step: int
    width: int


@dataclass(frozen=True)
class RowChunk:
    """Images n0:n1, output rows i0:i1."""

    n0: int
    n1: int
    i0: int
    i1: int

    @property
    def images(self) -> int:
        return self.n1 - self.n0

    @property
    def rows(self) -> int:
        return self.i1 - self.i0


class LeanProblem:
    """One call: sizes, operands in compute precision and layout, chunks and phases, and the steps shared by both directions."""

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
        self.x, self.alpha = x, alpha
        self.n, self.c, self.h, self.w = x.shape
        self.out_h, self.out_w = alpha.shape[-2:]
        self.k, self.lh, self.lw = psi.shape
        self.c_out, self.c_group, self.m_all = coeff.shape
        self.m = alpha.shape[1] // self.k
        self.groups = groups
        (self.sh, self.sw), (self.ph, self.pw), (self.dh, self.dw) = stride, padding, dilation
        self.taps = self.lh * self.lw
        self.columns = (self.out_w - 1) * self.sw + (self.lw - 1) * self.dw + 1
        self.work = Workspace(x)
        dtype = self.work.dtype
        # Taps are ordered column by column, (l_w, l_h), as in the unfolded rows.
        self.psi_KT = psi.to(dtype).transpose(1, 2).reshape(self.k, self.taps)
        self.static_RT = static.to(dtype).transpose(1, 2).reshape(-1, self.taps)
        # (g, C_out/g, M·C/g), matching the order (M, C) of the filtered rows.
        self.coeff_GOF = (
            coeff.to(dtype)
            .view(groups, -1, self.c_group, self.m_all)
            .transpose(2, 3)
            .reshape(groups, -1, self.features)
        )

    @property
    def features(self) -> int:
        return self.m_all * self.c_group

    def rows_in(self, rows: int) -> int:
        """Number of padded input rows read by this many output rows."""
        return (rows - 1) * self.sh + (self.lh - 1) * self.dh + 1

    def phases(self) -> list[Phase]:
        every = self.dw // math.gcd(self.sw, self.dw)
        step = every * self.sw // self.dw
        phases = []
        for first in range(min(every, self.out_w)):
            count = -(-(self.out_w - first) // every)
            width = (count - 1) * step + self.lw
            phases.append(Phase(first, every, count, first * self.sw, step, width))
        return phases

    def chunks(self) -> Iterator[RowChunk]:
        """Whole images while they are small, otherwise rows of one image."""
        floats = self.columns * self.lh * self.c + self.out_w * self.m_all * (self.taps + self.c)
        budget = CHUNK_BYTES.get(self.x.device.type, CHUNK_BYTES_ELSEWHERE)
        rows = max(1, budget // (floats * self.psi_KT.element_size()))
        images = max(1, rows // self.out_h)
        rows = -(-self.out_h // -(-self.out_h // min(rows, self.out_h)))
        for n0 in range(0, self.n, images):
            for i0 in range(0, self.out_h, rows):
                yield RowChunk(n0, min(n0 + images, self.n), i0, min(i0 + rows, self.out_h))

    def run(self) -> Tensor:
        """The result, (N, C_out, H', W')."""
        out = self.x.new_empty(self.n, self.c_out, self.out_h, self.out_w)
        for chunk in self.chunks():
            padded = self.channels_last(self.load(chunk))
            for phase in self.phases():
                patches = self.patches(padded, chunk, phase)
                z_PMC = self.filtered(self.atoms(self.alphas(chunk, phase)), patches)
                y_GOP = self.work.take("out", self.groups, self.c_out // self.groups, z_PMC.shape[0])
                torch.bmm(self.coeff_GOF, self.grouped("grouped", z_PMC).transpose(1, 2), out=y_GOP)
                part = self.rows_of(out, chunk, phase)
                part.copy_(y_GOP.view(part.shape))
        return out

    # --- input of a chunk -----------------------------------------------------------------------------------------

    def input_rows(self, chunk: RowChunk) -> tuple[int, int, int]:
        """Rows y0:y1 of x read by the chunk, and the chunk's padded row at which they start."""
        top = chunk.i0 * self.sh - self.ph
        y0 = min(max(top, 0), self.h)
        return y0, max(y0, min(top + self.rows_in(chunk.rows), self.h)), y0 - top

    def padded(self, name: str, chunk: RowChunk) -> Tensor:
        """Buffer for the padded input of the chunk, (images, C, rows, columns)."""
        return self.work.take(name, chunk.images, self.c, self.rows_in(chunk.rows), self.columns)

    def inside(self, padded: Tensor, chunk: RowChunk, x: Tensor) -> tuple[Tensor, Tensor]:
        """The unpadded part of a padded buffer, and the matching part of x (N, C, H, W)."""
        y0, y1, at = self.input_rows(chunk)
        part = padded[:, :, at : at + y1 - y0, self.pw : self.pw + self.w]
        return part, x[chunk.n0 : chunk.n1, :, y0:y1, : part.shape[3]]

    def load(self, chunk: RowChunk) -> Tensor:
        """The chunk's input, padded, (images, C, rows, columns)."""
        padded = self.padded("padded", chunk).zero_()
        to, part = self.inside(padded, chunk, self.x)
        to.copy_(part)
        return padded

    def channels_last(self, padded: Tensor) -> Tensor:
        """A copy (images, rows, columns, C), made from a chunk, not from x, whose channel stride may be a power of two."""
        n, c, rows, columns = padded.shape
        return self.work.take("channels_last", n, rows, columns, c).copy_(padded.permute(0, 2, 3, 1))

    def windows(self, padded: Tensor, chunk: RowChunk, phase: Phase) -> Tensor:
        """View of a padded buffer (images, rows, columns, C) unfolded along y: (images, output rows, phase columns, l_h, C)."""
        image, row, column, channel = padded.stride()
        return padded.as_strided(
            (chunk.images, chunk.rows, phase.width, self.lh, self.c),
            (image, self.sh * row, self.dw * column, self.dh * row, channel),
            padded.storage_offset() + phase.start * column,
        )

    def patches(self, padded: Tensor, chunk: RowChunk, phase: Phase) -> Tensor:
        """Patches (rows, pixels, l_w·l_h, C): an overlapping view of the rows unfolded along y."""
        rows = chunk.images * chunk.rows
        unfolded = self.work.take("unfolded", chunk.images, chunk.rows, phase.width, self.lh, self.c)
        unfolded.copy_(self.windows(padded, chunk, phase))
        run = self.lh * self.c
        return unfolded.as_strided(
            (rows, phase.count, self.taps, self.c), (phase.width * run, phase.step * run, self.c, 1)
        )

    def patches_by_channel(self, padded: Tensor, chunk: RowChunk, phase: Phase) -> Tensor:
        """Patches (rows, pixels, C, l_w·l_h); the taps of a channel are contiguous."""
        rows = chunk.images * chunk.rows
        unfolded = self.work.take("by_channel", chunk.images, chunk.rows, self.c, phase.width, self.lh)
        unfolded.copy_(self.windows(padded, chunk, phase).permute(0, 1, 4, 2, 3))
        run = phase.width * self.lh
        return unfolded.as_strided((rows, phase.count, self.c, self.taps), (self.c * run, phase.step * self.lh, run, 1))

    def alphas(self, chunk: RowChunk, phase: Phase) -> Tensor:
        """The chunk's alpha, (m, K, pixels)."""
        part = self.alpha[chunk.n0 : chunk.n1, :, chunk.i0 : chunk.i1, phase.first :: phase.every]
        buffer = self.work.take("alpha", self.m * self.k, chunk.images, chunk.rows, phase.count)
        return buffer.copy_(part.transpose(0, 1)).view(self.m, self.k, -1)

    def atoms(self, alpha_MKP: Tensor) -> Tensor:
        """Atoms D (pixels, M, l_w·l_h), dynamic ones first."""
        d_PMT = self.work.take("atoms", alpha_MKP.shape[2], self.m_all, self.taps)
        for atom in range(self.m):
            torch.mm(alpha_MKP[atom].t(), self.psi_KT, out=d_PMT[:, atom])
        d_PMT[:, self.m :] = self.static_RT
        return d_PMT

    def filtered(self, d_PMT: Tensor, patches: Tensor) -> Tensor:
        """Atom convolution Z (pixels, M, C)."""
        z_PMC = self.work.take("filtered", d_PMT.shape[0], self.m_all, self.c)
        _bmm_rows(d_PMT, patches, z_PMC)
        return z_PMC

    def grouped(self, name: str, z_PMC: Tensor) -> Tensor:
        """Z as (g, pixels, M·C/g); a copy if there are groups."""
        pixels = z_PMC.shape[0]
        if self.groups == 1:
            return z_PMC.view(1, pixels, self.features)
        z_GPF = self.work.take(name, self.groups, pixels, self.features)
        z_GPF.view(self.groups, pixels, self.m_all, self.c_group).copy_(
            z_PMC.view(pixels, self.m_all, self.groups, self.c_group).permute(2, 0, 1, 3)
        )
        return z_GPF

    def rows_of(self, out: Tensor, chunk: RowChunk, phase: Phase) -> Tensor:
        """The chunk's part of an output-sized map (N, …, H', W'), (…, images, rows, columns)."""
        return out[chunk.n0 : chunk.n1, :, chunk.i0 : chunk.i1, phase.first :: phase.every].transpose(0, 1)


def _bmm_rows(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a · b, with the batch of `b` split into rows (rows, pixels, …): each overlapping view covers one row."""
    rows, pixels = b.shape[:2]
    for a_row, b_row, out_row in zip(
        a.view(rows, pixels, *a.shape[1:]).unbind(),
        b.unbind(),
        out.view(rows, pixels, *out.shape[1:]).unbind(),
        strict=True,
    ):
        torch.bmm(a_row, b_row, out=out_row)


class Gradients:
    """Gradients of one problem, accumulated chunk by chunk."""

    def __init__(self, problem: LeanProblem, needs: Sequence[bool]) -> None:
        self.p = p = problem
        self.needs_x, self.needs_alpha, self.needs_psi, self.needs_static, self.needs_coeff = needs
        self.x = torch.zeros(p.x.shape, dtype=p.work.dtype, device=p.x.device) if self.needs_x else None
        self.alpha = p.alpha.new_empty(p.alpha.shape) if self.needs_alpha else None
        self.psi_KT = torch.zeros_like(p.psi_KT)
        self.static_RT = torch.zeros_like(p.static_RT)
        self.coeff_GOF = torch.zeros_like(p.coeff_GOF)

    def add(self, grad: Tensor, chunk: RowChunk) -> None:
        """Add the contribution of one chunk; `grad` is the gradient of the whole output."""
        p = self.p
        padded = p.load(chunk)
        by_pixel = p.channels_last(padded)
        into = p.work.take("into", *by_pixel.shape).zero_()
        for phase in p.phases():
            part = p.rows_of(grad, chunk, phase)
            g_GOP = p.work.take("grad", *part.shape).copy_(part).view(p.groups, p.c_out // p.groups, -1)
            alpha_MKP = p.alphas(chunk, phase)
            d_PMT = p.atoms(alpha_MKP)
            if self.needs_coeff:
                z_PMC = p.filtered(d_PMT, p.patches(by_pixel, chunk, phase))
                self.coeff_GOF.baddbmm_(g_GOP, p.grouped("grouped", z_PMC))
            gz_PMC = self._filtered(g_GOP)
            if self.needs_alpha or self.needs_psi or self.needs_static:
                patches = p.patches_by_channel(padded.permute(0, 2, 3, 1), chunk, phase)
                self._atoms(patches, alpha_MKP, gz_PMC, chunk, phase)
            if self.needs_x:
                self._input(p.windows(into, chunk, phase), d_PMT, gz_PMC, phase)
        if self.x is not None:
            part, gx = p.inside(padded.copy_(into.permute(0, 3, 1, 2)), chunk, self.x)
            gx += part

    def _filtered(self, g_GOP: Tensor) -> Tensor:
        """Gradient of Z (pixels, M, C)."""
        p = self.p
        pixels = g_GOP.shape[2]
        gz_PMC = p.work.take("filtered", pixels, p.m_all, p.c)
        if p.groups == 1:
            torch.mm(g_GOP[0].t(), p.coeff_GOF[0], out=gz_PMC.view(pixels, p.features))
            return gz_PMC
        gz_GPF = p.work.take("grouped", p.groups, pixels, p.features)
        torch.bmm(g_GOP.transpose(1, 2), p.coeff_GOF, out=gz_GPF)
        gz_PMC.view(pixels, p.m_all, p.groups, p.c_group).copy_(
            gz_GPF.view(p.groups, pixels, p.m_all, p.c_group).permute(1, 2, 0, 3)
        )
        return gz_PMC

    def _atoms(self, patches: Tensor, alpha_MKP: Tensor, gz_PMC: Tensor, chunk: RowChunk, phase: Phase) -> None:
        """Gradients of alpha, psi and the static atoms via the atoms' gradient; patches (rows, pixels, C, l_w·l_h)."""
        p = self.p
        gd_PMT = p.work.take("grad_atoms", gz_PMC.shape[0], p.m_all, p.taps)
        _bmm_rows(gz_PMC, patches, gd_PMT)
        if self.needs_static:
            self.static_RT += gd_PMT[:, p.m :].sum(0)
        galpha_MKP = p.work.take("grad_alpha", *alpha_MKP.shape)
        for atom in range(p.m):
            if self.needs_psi:
                self.psi_KT.addmm_(alpha_MKP[atom], gd_PMT[:, atom])
            if self.needs_alpha:
                torch.mm(p.psi_KT, gd_PMT[:, atom].t(), out=galpha_MKP[atom])
        if self.alpha is not None:
            part = p.rows_of(self.alpha, chunk, phase)
            part.copy_(galpha_MKP.view(part.shape))

    def _input(self, into: Tensor, d_PMT: Tensor, gz_PMC: Tensor, phase: Phase) -> None:
        """Add to the gradient of x, `into` (images, output rows, phase columns, l_h, C), a view like that of `LeanProblem.windows`.

        The phase's column q·step + s is read by the pixels q - t at the taps s + t·step, t = 0 … turns-1: with their atoms
        in the order of these pixels, `skewed`, a column's gradient is one matrix product.
        """
        p = self.p
        rows = into.shape[0] * into.shape[1]
        margin = -(-p.lw // phase.step) - 1
        wide = p.work.take("wide", rows, phase.count + 2 * margin, p.m_all, p.c)
        wide[:, :margin].zero_()
        wide[:, margin + phase.count :].zero_()
        wide[:, margin : margin + phase.count] = gz_PMC.view(rows, phase.count, p.m_all, p.c)
        atoms = d_PMT.view(rows, phase.count, p.m_all, p.lw, p.lh)
        for shift in range(min(phase.step, p.lw)):
            turns = -(-(p.lw - shift) // phase.step)
            columns = phase.count + turns - 1
            skewed = p.work.take("skewed", rows, columns, turns, p.m_all, p.lh).zero_()
            for t in range(turns):
                skewed[:, t : t + phase.count, turns - 1 - t] = atoms[:, :, :, shift + t * phase.step]
            run = p.m_all * p.c
            pixels = wide.as_strided(
                (rows, columns, turns * p.m_all, p.c),
                (wide.stride(0), run, p.c, 1),
                (margin - turns + 1) * run,
            )
            gu = p.work.take("grad_unfolded", rows * columns, p.lh, p.c)
            _bmm_rows(skewed.view(rows * columns, turns * p.m_all, p.lh).transpose(1, 2), pixels, gu)
            gu = gu.view(*into.shape[:2], columns, p.lh, p.c)
            for tap in range(p.lh):
                into[:, :, shift :: phase.step, tap] += gu[:, :, :, tap]

    def results(self, psi: Tensor, static: Tensor, coeff: Tensor) -> list[Tensor]:
        """Gradients of x, alpha, psi, static and coeff; empty if not needed."""
        p = self.p
        gcoeff = self.coeff_GOF.view(p.c_out, p.m_all, p.c_group).transpose(1, 2)
        return [
            p.x.new_empty(0) if self.x is None else self.x.to(p.x.dtype),
            p.alpha.new_empty(0) if self.alpha is None else self.alpha,
            self._window(self.psi_KT).to(psi.dtype) if self.needs_psi else psi.new_empty(0),
            self._window(self.static_RT).to(static.dtype) if self.needs_static else static.new_empty(0),
            gcoeff.to(coeff.dtype).contiguous() if self.needs_coeff else coeff.new_empty(0),
        ]

    def _window(self, taps: Tensor) -> Tensor:
        """(…, l_w·l_h) back to (…, l_h, l_w)."""
        return taps.view(-1, self.p.lw, self.p.lh).transpose(1, 2).contiguous()


def lean_gradients(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of `inputs` (x, alpha, psi, static and coeff), from that of the output; empty if not needed.

    `geometry` is stride, padding, dilation and groups.
    """
    problem = LeanProblem(*inputs, *geometry)
    grads = Gradients(problem, needs)
    for chunk in problem.chunks():
        grads.add(grad, chunk)
    return grads.results(*inputs[2:])
