"""Splitting a weight into a depthwise and a pointwise factor, and merging two consecutive convolutions into one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.errors import UnsupportedLayerError
from surgeon.layers.geometry import ConvGeometry


@torch.no_grad()
def factorise(weight: Tensor, groups: int, multiplier: int) -> tuple[Tensor, Tensor]:
    """Best depthwise (C_in·r, 1, k_h, k_w) and pointwise (C_out, r·C_in/groups, 1, 1) factors of a weight, r = `multiplier`.

    For every input channel, the truncated SVD of its (C_out/groups, k_h·k_w) slice, in float64, with the singular values
    split evenly. Computed from the eigenvectors of the smaller Gram matrix: fast for many channels, and exact at full rank,
    since they are an orthonormal basis regardless of rounding in small eigenvalues.
    """
    outputs, inputs, kernel_h, kernel_w = weight.shape
    slices = weight.double().reshape(groups, outputs // groups, inputs, -1).transpose(1, 2)
    tall = slices.shape[-2] >= slices.shape[-1]
    gram = slices.mT @ slices if tall else slices @ slices.mT
    squares, basis = torch.linalg.eigh(gram)
    squares, basis = squares.flip(-1)[..., :multiplier], basis.flip(-1)[..., :multiplier]
    singular = squares.clamp_min(0).sqrt()
    root = singular.clamp_min(1e-6 * singular[..., :1]).sqrt()
    root = torch.where(root > 0, root, 1.0)
    if tall:
        depthwise, pointwise = basis.mT * root[..., :, None], slices @ basis / root[..., None, :]
    else:
        depthwise, pointwise = basis.mT @ slices / root[..., :, None], basis * root[..., None, :]
    return (
        depthwise.reshape(groups * inputs * multiplier, 1, kernel_h, kernel_w).to(weight.dtype),
        pointwise.transpose(1, 2).reshape(outputs, inputs * multiplier, 1, 1).to(weight.dtype),
    )


def compose(kernel: Tensor, static: Tensor, geometry: ConvGeometry) -> Tensor:
    """Weight of the convolution with `kernel` followed by the depthwise one with `static`, centered on `kernel`."""
    steps = []
    for stride, dilation in zip(geometry.stride, geometry.dilation, strict=True):
        if stride % dilation:
            reason = f"a static kernel cannot be merged into a convolution of stride {stride} and dilation {dilation}"
            raise UnsupportedLayerError(reason, (reason,))
        steps.append(stride // dilation)
    size = static.shape[-1]
    before = (size - 1) // 2
    most = size - 1 - before
    parts = []
    for row in range(size):
        for column in range(size):
            up, left = (most + row - before) * steps[0], (most + column - before) * steps[1]
            margins = (left, 2 * most * steps[1] - left, up, 2 * most * steps[0] - up)
            parts.append(F.pad(kernel * static[:, :, row : row + 1, column : column + 1], margins))
    return torch.stack(parts).sum(dim=0)


def composes(geometry: ConvGeometry) -> bool:
    """Whether a bias-free convolution of this geometry would be zero everywhere outside its output.

    If so, a second, zero-padded convolution merges with it, borders included: the first one's padding must cover its
    whole kernel, as it does for every 1×1 convolution.
    """
    padding = (0, 0, 0, 0) if geometry.is_pointwise and geometry.padding == "tf_same" else geometry.padding
    if padding == "tf_same" or (geometry.padding_mode != "zeros" and any(padding)):
        return False
    left, right, top, bottom = padding
    axes = zip((top, left), (bottom, right), geometry.kernel_size, geometry.stride, geometry.dilation, strict=True)
    return all(
        s % d == 0 and after >= d * (k - 1) and before >= max(d * (k - 1) - s + 1, 0) for before, after, k, s, d in axes
    )
