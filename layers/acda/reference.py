"""The ACDA operator as defined in the paper: unfold the input, build every pixel's atoms, apply them, mix (ACDA §3.2, Eq. 5-6).

Shapes. x (N, C, H, W); alpha (N, m·K, H', W'), the coefficients of m dynamic atoms over the K basis elements, atom by atom;
psi (K, l_h, l_w), the basis; static (r, l_h, l_w), atoms shared by all pixels (r may be 0);
coeff (C_out, C/g, m + r), dynamic atoms first; result (N, C_out, H', W'). stride, padding (zeros on both sides) and dilation
are (vertical, horizontal).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def acda_conv_reference(
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
    """The definition. Half precision is computed in float32 and rounded once at the end."""
    out_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, alpha, psi, static, coeff = (t.to(dtype) for t in (x, alpha, psi, static, coeff))
    n, _, out_h, out_w = alpha.shape
    c_out, c_group, m_all = coeff.shape
    k, window = psi.shape[0], psi.shape[1:]

    patches = F.unfold(x, tuple(window), tuple(dilation), tuple(padding), tuple(stride))
    patches = patches.view(n, groups * c_group, window.numel(), out_h * out_w)
    atoms = torch.einsum("nakp,kt->natp", alpha.reshape(n, alpha.shape[1] // k, k, out_h * out_w), psi.flatten(1))
    static = static.flatten(1)[None, :, :, None].expand(n, -1, -1, out_h * out_w)
    filtered = torch.einsum("nctp,natp->ncap", patches, torch.cat([atoms, static], 1))
    filtered = filtered.reshape(n, groups, c_group, m_all, out_h * out_w)
    y = torch.einsum("goca,ngcap->ngop", coeff.view(groups, c_out // groups, c_group, m_all), filtered)
    return y.reshape(n, c_out, out_h, out_w).to(out_dtype)


def acda_macs(
    *, channels: int, out_channels: int, groups: int, atoms: int, static: int, elements: int, window: int, pixels: int
) -> int:
    """Multiply-accumulates of the formula above for `pixels` output pixels: atom synthesis, atom and coefficient convolution.

    `window` is l_h·l_w. The last two terms are the paper's "ACDA (conv only)" (§4.4, Table 6) for r = 0 and g = 1.
    """
    make_atoms = atoms * elements * window
    atom_convolution = channels * (atoms + static) * window
    coefficients = out_channels * (channels // groups) * (atoms + static)
    return pixels * (make_atoms + atom_convolution + coefficients)
