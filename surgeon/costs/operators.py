"""FLOPs of this package's own operators (1 MAC = 2 FLOPs), counted by their definitions, whatever backend runs.

Their backward passes save only inputs; what they compute again is counted where a gradient needs it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from surgeon.costs.flops import register_formula


def _acda_macs(x: Tensor, alpha: Tensor, psi: Tensor, static: Tensor, coeff: Tensor) -> tuple[int, int, int]:
    """MACs of making atoms from the basis, of the atom convolution, and of the coefficient convolution (ACDA §3.2)."""
    pixels = alpha.shape[0] * alpha.shape[2] * alpha.shape[3]
    elements, window = psi.shape[0], psi.shape[1] * psi.shape[2]
    c_out, c_group, atoms = coeff.shape
    dynamic = atoms - static.shape[0]
    return pixels * dynamic * elements * window, pixels * x.shape[1] * atoms * window, pixels * c_out * c_group * atoms


@register_formula("surgeon::acda_conv")
def _acda(out: Tensor, x: Tensor, alpha: Tensor, psi: Tensor, static: Tensor, coeff: Tensor, *geometry: Any) -> int:
    return 2 * sum(_acda_macs(x, alpha, psi, static, coeff))


@register_formula("surgeon::acda_conv_backward")
def _acda_backward(
    out: Any, grad: Tensor, x: Tensor, alpha: Tensor, psi: Tensor, static: Tensor, coeff: Tensor, *rest: Any
) -> int:
    atoms, filtering, mixing = _acda_macs(x, alpha, psi, static, coeff)
    need_x, need_alpha, need_psi, need_static, need_coeff = (bool(need) for need in rest[4])
    need_atoms = need_alpha or need_psi or need_static
    macs = mixing * (need_x or need_atoms)  # gradient of the filtered input
    macs += filtering * (need_x + need_atoms) + atoms * (need_alpha + need_psi)
    macs += atoms * (need_x or need_coeff)  # made again
    macs += (filtering + mixing) * need_coeff  # filtered again, and the gradient itself
    return 2 * macs


@register_formula("surgeon::pafu_conv")
def _pafu(out: Tensor, x: Tensor, kernel: Tensor, *rest: Any) -> int:
    return 2 * out.shape[0] * out.shape[2] * out.shape[3] * kernel.numel()  # every pixel has one kernel


@register_formula("surgeon::pafu_conv_backward")
def _pafu_backward(out: Any, grad: Tensor, x: Tensor, kernel: Tensor, further: Tensor, *rest: Any) -> int:
    wanted: Sequence[bool] = rest[-1]
    need_x, need_kernels, need_soft = (bool(need) for need in wanted)
    units = need_x + need_kernels + need_soft * (1 + further.shape[0])  # every kernel's answer for the soft selection
    return 2 * grad.shape[0] * grad.shape[2] * grad.shape[3] * kernel.numel() * units
