"""FLOPs of ACDA's operator for torch's counter (1 MAC = 2 FLOPs), from its definition, independent of the backend.

Torch's counter passes shapes in place of tensors. The backward pass saves only inputs; what it recomputes is counted
if a gradient needs it.
"""

from collections.abc import Sequence

Shape = Sequence[int]


def acda_flops(
    x: Shape, alpha: Shape, psi: Shape, static: Shape, coeff: Shape, *rest: object, out_shape: Shape, **kwargs: object
) -> int:
    return 2 * sum(_macs(x, alpha, psi, static, coeff))


def acda_backward_flops(
    grad: Shape,
    x: Shape,
    alpha: Shape,
    psi: Shape,
    static: Shape,
    coeff: Shape,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
    needs: Sequence[bool],
    *rest: object,
    out_shape: object,
    **kwargs: object,
) -> int:
    atoms, filtering, mixing = _macs(x, alpha, psi, static, coeff)
    need_x, need_alpha, need_psi, need_static, need_coeff = needs
    need_atoms = need_alpha or need_psi or need_static
    macs = mixing * (need_x or need_atoms)  # gradient of the filtered input
    macs += filtering * (need_x + need_atoms) + atoms * (need_alpha + need_psi)
    macs += atoms * (need_x or need_coeff)  # recomputed
    macs += (filtering + mixing) * need_coeff  # recomputed filtering, and the gradient itself
    return 2 * macs


def _macs(x: Shape, alpha: Shape, psi: Shape, static: Shape, coeff: Shape) -> tuple[int, int, int]:
    """MACs of synthesizing the atoms, filtering with them, and mixing with the coefficients (ACDA §3.2)."""
    pixels = alpha[0] * alpha[2] * alpha[3]
    elements, window = psi[0], psi[1] * psi[2]
    c_out, c_group, atoms = coeff
    dynamic = atoms - static[0]
    return pixels * dynamic * elements * window, pixels * x[1] * atoms * window, pixels * c_out * c_group * atoms
