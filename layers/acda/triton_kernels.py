"""The Triton kernels of the ACDA operator; `triton` defines their order.

A chunk is a few rows of a few images. Its output pixels q are numbered consecutively; scratch tensors end in q. Channels of a
group are c, atoms a, taps t = (ty, tx), basis elements k, outputs o. No kernel adds to what another program writes.
"""

import triton
import triton.language as tl

from surgeon.layers.ops.triton.launch import config, product, tuned

PROJECTIONS = [config(Q=64, warps=4), config(Q=128, warps=8)]
SINGLE_PROJECTIONS = [config(Q=32, warps=4), config(Q=64, warps=8)]


@triton.jit
def pixel(q, g, first_row, rows):
    """Image (64 bits), row and column of output pixel q of a chunk."""
    of_image = rows * g.out_width
    inner = q % of_image
    return (q // of_image).to(tl.int64), first_row + inner // g.out_width, inner % g.out_width


@triton.jit
def filtered(
    x, atoms, static, c, a, q, inside, i, j, xs, g, count, channels, dynamic, m_all,
    KH: tl.constexpr, KW: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The atom convolution of channels c (C) with atoms a (A) at pixels q (Q): (Q, C, A) in float32; x points at the images."""
    z = tl.zeros([Q, C, A], tl.float32)
    a_in = inside[:, None] & (a < m_all)[None, :]
    for ty in range(KH):
        row = i * g.stride_h + ty * g.dilation_h - g.pad_h
        row_in = inside & (row >= 0) & (row < g.height)
        for tx in range(KW):
            t = ty * KW + tx
            column = j * g.stride_w + tx * g.dilation_w - g.pad_w
            x_in = row_in & (column >= 0) & (column < g.width)
            at = x + row * xs[2] + column * xs[3]
            seen = tl.load(at[:, None] + c[None, :] * xs[1], mask=x_in[:, None] & (c < channels)[None, :], other=0.0)
            place = (a[None, :] * (KH * KW) + t).to(tl.int64) * count + q[:, None]
            weight = tl.load(atoms + place, mask=a_in & (a < dynamic)[None, :], other=0.0).to(tl.float32)
            fixed = (a >= dynamic) & (a < m_all)
            weight += tl.load(static + (a - dynamic) * (KH * KW) + t, mask=fixed, other=0.0).to(tl.float32)[None, :]
            z += seen.to(tl.float32)[:, :, None] * weight[:, None, :]
    return z


@tuned(PROJECTIONS, ["elements", "T"], SINGLE_PROJECTIONS)
@triton.jit
def atoms_kernel(
    alpha, psi, out, alphas, g, first_row, rows, count, elements,
    T: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """out (m, T, q) = psi (K, T) · alpha: the dynamic atoms."""
    q_blocks = tl.cdiv(count, Q)
    q = (tl.program_id(0) % q_blocks) * Q + tl.arange(0, Q)
    rest = tl.program_id(0) // q_blocks
    t_blocks = tl.cdiv(T, BT)
    a = rest // t_blocks
    t = (rest % t_blocks) * BT + tl.arange(0, BT)
    inside = q < count
    n, i, j = pixel(q, g, first_row, rows)
    alpha += n * alphas[0] + i * alphas[2] + j * alphas[3]
    total = tl.zeros([BT, Q], tl.float32)
    for k0 in range(0, elements, BK):
        k = k0 + tl.arange(0, BK)
        code = tl.load(
            alpha[None, :] + (a * elements + k)[:, None] * alphas[1],
            mask=inside[None, :] & (k < elements)[:, None],
            other=0.0,
        )
        basis = tl.load(psi + k[None, :] * T + t[:, None], mask=(k < elements)[None, :] & (t < T)[:, None], other=0.0)
        total = product(basis.to(code.dtype), code, total, PRECISION)
    place = (a * T + t).to(tl.int64)[:, None] * count + q[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside[None, :] & (t < T)[:, None])


@tuned(PROJECTIONS, ["elements", "T"], SINGLE_PROJECTIONS)
@triton.jit
def grad_alpha_kernel(
    gradient, psi, out, outs, g, first_row, rows, count, elements,
    T: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """The gradient of alpha, in its layout, from the gradient of the atoms (M, T, q)."""
    q_blocks = tl.cdiv(count, Q)
    q = (tl.program_id(0) % q_blocks) * Q + tl.arange(0, Q)
    rest = tl.program_id(0) // q_blocks
    k_blocks = tl.cdiv(elements, BK)
    a = rest // k_blocks
    k = (rest % k_blocks) * BK + tl.arange(0, BK)
    inside = q < count
    n, i, j = pixel(q, g, first_row, rows)
    total = tl.zeros([BK, Q], tl.float32)
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        place = (a * T + t).to(tl.int64)[:, None] * count + q[None, :]
        of_atoms = tl.load(gradient + place, mask=inside[None, :] & (t < T)[:, None], other=0.0)
        basis = tl.load(psi + k[:, None] * T + t[None, :], mask=(k < elements)[:, None] & (t < T)[None, :], other=0.0)
        total = product(basis.to(of_atoms.dtype), of_atoms, total, PRECISION)
    at = out + n * outs[0] + i * outs[2] + j * outs[3]
    mask = inside[None, :] & (k < elements)[:, None]
    tl.store(at[None, :] + (a * elements + k)[:, None] * outs[1], total.to(out.dtype.element_ty), mask=mask)


@tuned(
    [config(Q=32, C=16, warps=4), config(Q=64, C=8, warps=4), config(Q=32, C=16, warps=8)],
    ["channels", "m_all", "KH", "KW"],
)
@triton.jit
def filtered_kernel(
    x, atoms, static, out, xs, g, first_row, rows, count, channels, dynamic, m_all,
    KH: tl.constexpr, KW: tl.constexpr, A: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out (C, M, q): the atom convolution."""
    q_blocks, c_blocks = tl.cdiv(count, Q), tl.cdiv(channels, C)
    q = (tl.program_id(0) % q_blocks) * Q + tl.arange(0, Q)
    rest = tl.program_id(0) // q_blocks
    c = (rest % c_blocks) * C + tl.arange(0, C)
    a = (rest // c_blocks) * A + tl.arange(0, A)
    inside = q < count
    n, i, j = pixel(q, g, first_row, rows)
    x += n * xs[0]
    z = filtered(x, atoms, static, c, a, q, inside, i, j, xs, g, count, channels, dynamic, m_all, KH, KW, Q, C, A)
    place = (c[:, None] * m_all + a[None, :]).to(tl.int64)[None, :, :] * count + q[:, None, None]
    mask = ((c < channels)[:, None] & (a < m_all)[None, :])[None, :, :] & inside[:, None, None]
    tl.store(out + place, z.to(out.dtype.element_ty), mask=mask)


@tuned(
    [config(Q=64, BT=8, warps=4), config(Q=32, BT=8, warps=4), config(Q=64, BT=16, warps=8)],
    ["channels", "m_all", "KH", "KW"],
)
@triton.jit
def grad_atoms_kernel(
    x, of_filtered, out, xs, g, first_row, rows, count, channels, m_all,
    KH: tl.constexpr, KW: tl.constexpr, A: tl.constexpr, Q: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out (M, T, q): the gradient of the atoms, from x and the gradient of the filtered input (C, M, q)."""
    q_blocks, t_blocks = tl.cdiv(count, Q), tl.cdiv(KH * KW, BT)
    q = (tl.program_id(0) % q_blocks) * Q + tl.arange(0, Q)
    rest = tl.program_id(0) // q_blocks
    t = (rest % t_blocks) * BT + tl.arange(0, BT)
    a = (rest // t_blocks) * A + tl.arange(0, A)
    inside = q < count
    n, i, j = pixel(q, g, first_row, rows)
    row = i[:, None] * g.stride_h + (t // KW)[None, :] * g.dilation_h - g.pad_h
    column = j[:, None] * g.stride_w + (t % KW)[None, :] * g.dilation_w - g.pad_w
    seen_in = inside[:, None] & (t < KH * KW)[None, :]
    seen_in = seen_in & (row >= 0) & (row < g.height) & (column >= 0) & (column < g.width)
    at = x + n[:, None] * xs[0] + row * xs[2] + column * xs[3]
    of_in = inside[:, None] & (a < m_all)[None, :]
    of_filtered += a.to(tl.int64)[None, :] * count + q[:, None]
    step = tl.full([], m_all, tl.int64) * count
    total = tl.zeros([Q, A, BT], tl.float32)
    for c in range(channels):
        gz = tl.load(of_filtered + c * step, mask=of_in, other=0.0).to(tl.float32)
        seen = tl.load(at + c * xs[1], mask=seen_in, other=0.0).to(tl.float32)
        total += gz[:, :, None] * seen[:, None, :]
    place = (a[:, None] * (KH * KW) + t[None, :]).to(tl.int64)[None, :, :] * count + q[:, None, None]
    mask = ((a < m_all)[:, None] & (t < KH * KW)[None, :])[None, :, :] & inside[:, None, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@tuned(
    [config(P=64, C=16, warps=4), config(P=32, C=16, warps=4)],
    ["channels", "m_all", "KH", "KW"],
)
@triton.jit
def grad_x_kernel(
    atoms, static, of_filtered, out, os, g, first_row, rows, top, height, count, images, channels, dynamic, m_all,
    KH: tl.constexpr, KW: tl.constexpr, ADD: tl.constexpr, P: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradient of `height` input rows starting at `top`, gathered from the chunk's output pixels that read them.

    With ADD, added to the existing values: other chunks read the same rows.
    """
    places = images * height * g.width
    p_blocks = tl.cdiv(places, P)
    p = (tl.program_id(0) % p_blocks) * P + tl.arange(0, P)
    c = (tl.program_id(0) // p_blocks) * C + tl.arange(0, C)
    inside = p < places
    n, inner = p // (height * g.width), p % (height * g.width)
    row, column = top + inner // g.width, inner % g.width
    c_in = (c < channels)[None, :]
    total = tl.zeros([P, C], tl.float32)
    for ty in range(KH):
        down = row + g.pad_h - ty * g.dilation_h
        i = down // g.stride_h
        row_in = inside & (down >= 0) & (down % g.stride_h == 0) & (i >= first_row) & (i < first_row + rows)
        for tx in range(KW):
            right = column + g.pad_w - tx * g.dilation_w
            j = right // g.stride_w
            there = row_in & (right >= 0) & (right % g.stride_w == 0) & (j < g.out_width)
            q = ((n * rows + i - first_row) * g.out_width + j).to(tl.int64)
            gz_at = of_filtered + (c.to(tl.int64) * m_all)[None, :] * count + q[:, None]
            t = ty * KW + tx
            for a in range(dynamic):
                weight = tl.load(atoms + (a * (KH * KW) + t).to(tl.int64) * count + q, mask=there, other=0.0).to(
                    tl.float32
                )
                gz = tl.load(gz_at, mask=there[:, None] & c_in, other=0.0).to(tl.float32)
                total += weight[:, None] * gz
                gz_at += count
            for a in range(dynamic, m_all):
                weight = tl.load(static + (a - dynamic) * (KH * KW) + t).to(tl.float32)
                gz = tl.load(gz_at, mask=there[:, None] & c_in, other=0.0).to(tl.float32)
                total += weight * gz
                gz_at += count
    at = out + n.to(tl.int64) * os[0] + row * os[2] + column * os[3]
    at = at[:, None] + c[None, :] * os[1]
    mask = inside[:, None] & c_in
    if ADD:
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(at, total.to(out.dtype.element_ty), mask=mask)
