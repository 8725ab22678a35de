"""The operators in ordinary torch operations, for files read by other programs: used by `torch.export` and ONNX.

No registered operator, no data-dependent shape, no `unfold`: only convolutions, matrix products, slices, products, sums
and selections, which every runtime has. Batch and image size may be symbolic. Slower and more memory than the lean versions:
ACDA filters with the whole basis before mixing (K maps per channel), PAFU runs all n convolutions. Differentiable by autograd.
Shapes are those of each operator's reference. Contiguous inputs give contiguous results: where formats meet, as in DenseNet's
concatenations, torch.export compares strides of symbolic size and refuses to leave the image size dynamic.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.layers.ops.tiles import channel_split


def acda_conv_portable(
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
    """Basis maps from one depthwise convolution, mixed at every pixel by alpha; the static atoms are a plain convolution."""
    out_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, alpha, psi, static, coeff = (t.to(dtype) for t in (x, alpha, psi, static, coeff))
    (n, channels), (out_h, out_w), elements = x.shape[:2], alpha.shape[2:], psi.shape[0]
    atoms = alpha.shape[1] // elements
    maps = F.conv2d(
        x, psi[:, None].repeat(channels, 1, 1, 1), None, tuple(stride), tuple(padding), tuple(dilation), channels
    )
    maps_NHWCK = maps.view(n, channels, elements, out_h, out_w).permute(0, 3, 4, 1, 2)
    alpha_NHWKM = alpha.view(n, atoms, elements, out_h, out_w).permute(0, 3, 4, 2, 1)
    filtered = torch.matmul(maps_NHWCK, alpha_NHWKM).flatten(3).permute(0, 3, 1, 2).contiguous()
    y = F.conv2d(filtered, coeff[:, :, :atoms].flatten(1)[:, :, None, None], groups=groups)
    if static.shape[0]:
        weight = torch.einsum("oca,ahw->ochw", coeff[:, :, atoms:], static)
        y = y + F.conv2d(x, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)
    return y.to(out_dtype)


def dconv_portable(
    x: Tensor,
    kernels: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Tap by tap: the shifted input times the kernels' element."""
    channels, groups = x.shape[1], kernels.shape[1]
    outputs = max(channels, groups)
    taps = shifted(x, kernel_size, stride, padding, dilation, (kernels.shape[-2], kernels.shape[-1]))
    return _filtered(taps, kernels.unbind(2), channel_split(channels, groups, outputs))


def dconv_layer_portable(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    static: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The static kernels are a depthwise convolution; the generated ones are computed one tap at a time."""
    channels, (outputs, _, *kernel_size) = x.shape[1], static.shape
    by_tap = weight.view(-1, kernel_size[0] * kernel_size[1], weight.shape[1], 1, 1).transpose(0, 1)
    groups = by_tap.shape[1]
    split = channel_split(channels, groups, outputs)
    taps = shifted(x, kernel_size, stride, padding, dilation, (features.shape[-2], features.shape[-1]))
    # Split, not unbind: in ONNX that is one operation for all taps instead of two per tap.
    generators = by_tap.flatten(0, 1).split(groups)
    generated = _filtered(taps, (F.conv2d(features, of_tap) for of_tap in generators), split)
    y = F.conv2d(x, static, bias, tuple(stride), tuple(padding), tuple(dilation), channels)
    if split[3] == 1:
        return y + generated
    # The generated part is the same for the S neighboring output channels of a kernel.
    size = y.shape[-2:]
    return (y.view(y.shape[0], -1, split[3], *size) + generated[:, :, None]).view(y.shape)


def shifted(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_size: Sequence[int],
) -> Iterator[Tensor]:
    """The input under each tap, (N, C, H', W'); without stride, views of one padded copy.

    With a stride, a convolution with a single 1 in its kernel selects the tap: a slice of symbolic length and step leaves
    the exporter with sizes that it cannot simplify.
    """
    kernel_h, kernel_w = kernel_size
    if tuple(stride) == (1, 1):
        padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
        for top in range(0, kernel_h * dilation[0], dilation[0]):
            rows = padded[:, :, top : top + out_size[0]]  # once for all its taps: exports pay per operation
            for left in range(0, kernel_w * dilation[1], dilation[1]):
                yield rows[:, :, :, left : left + out_size[1]]
        return
    channels = x.shape[1]
    one_hot = torch.eye(kernel_h * kernel_w, dtype=x.dtype, device=x.device).view(-1, 1, 1, kernel_h, kernel_w)
    for pick in one_hot.unbind():
        kernel = pick.expand(channels, -1, -1, -1)
        yield F.conv2d(x, kernel, None, tuple(stride), tuple(padding), tuple(dilation), channels)


def _filtered(taps: Iterable[Tensor], kernels: Iterable[Tensor], split: tuple[int, int, int, int]) -> Tensor:
    """Σ over taps of kernel (N, G, H', W') times input (N, C, H', W'), with C = P·Q and G = P·R: (N, P·Q·R, H', W')."""
    p, q, r, _ = split
    shared = r > 1 or (p > 1 and q > 1)  # a kernel shared by all channels broadcasts as is
    total: Tensor | None = None
    for x, kernel_NGHW in zip(taps, kernels, strict=True):
        if shared:
            size = kernel_NGHW.shape[-2:]
            x, kernel_NGHW = x.reshape(-1, p, q, 1, *size), kernel_NGHW.reshape(-1, p, 1, r, *size)
        total = x * kernel_NGHW if total is None else torch.addcmul(total, x, kernel_NGHW)
    assert total is not None
    return total.flatten(1, 3) if shared else total


def pafu_conv_portable(
    x: Tensor,
    kernel: Tensor,
    further: Tensor,
    index: Tensor,
    soft: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Kernel by kernel: its convolution where it is selected; in training, with the straight-through gradient of `soft`."""
    total: Tensor | None = None
    for i, weight in enumerate([kernel, *further.unbind()]):
        # A clone: with one input channel per group, packed kernels count as contiguous but have channels-last strides.
        weight = weight.clone(memory_format=torch.contiguous_format)
        y = F.conv2d(x, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)
        chosen = (index == i)[:, None]
        if soft is None:
            total = y if total is None else torch.where(chosen, y, total)
        else:
            y = y * (chosen + (soft[:, i : i + 1] - soft[:, i : i + 1].detach())).to(y.dtype)
            total = y if total is None else total + y
    assert total is not None
    return total
