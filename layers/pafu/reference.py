"""The definition of the per-pixel kernel selection, in plain torch.

Legend: N batch, C channels, H W input size, P Q output size, n kernels per group, O output channels, k l kernel size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.layers.geometry import Pair


def pafu_conv_reference(
    x_NCHW: Tensor,
    kernel_OCkl: Tensor,
    further_nOCkl: Tensor,
    index_NPQ: Tensor,
    soft_NnPQ: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """Apply the selected kernel of the group at each pixel: y = sum_i z_i (K_i * x), z one-hot (PAFU, eq. 2).

    Kernel 0 is `kernel_OCkl`, kernels 1.. are `further_nOCkl`. With `soft_NnPQ`, z is its straight-through version: the value of
    the one-hot selection with the gradient of the soft one (§3.4), whose value is not used. Returns (N, O, P, Q).
    """
    kernels = torch.cat([kernel_OCkl[None], further_nOCkl])
    y_NnOPQ = torch.stack([F.conv2d(x_NCHW, k, None, stride, padding, dilation, groups) for k in kernels], dim=1)
    z_NnPQ = F.one_hot(index_NPQ, len(kernels)).movedim(-1, 1).to(y_NnOPQ.dtype)
    if soft_NnPQ is not None:
        z_NnPQ = z_NnPQ + (soft_NnPQ - soft_NnPQ.detach()).to(y_NnOPQ.dtype)
    return (y_NnOPQ * z_NnPQ[:, :, None]).sum(1)
