"""The definition of dynamic convolution (DConv) in plain torch: unfold, multiply, sum. ADFNet, section "DCB".

Every channel is filtered separately, by a kernel that differs from pixel to pixel; a kernel may serve several channels.
N images, C input channels, O output channels (a multiple of C), G kernels per pixel, T = k_h·k_w taps, Cf generator features.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from surgeon.layers.geometry import Pair


def dconv_reference(
    x: Tensor, kernels: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """y[n, o, p] = Σ_t kernels[n, group(o), t, p] · x[n, channel(o), stride·p + dilation·t - padding].

    `x` is (N, C, H, W), `kernels` is (N, G, T, H', W') where G divides C or C divides G. The result is
    (N, max(C, G), H', W'): consecutive outputs, max(C, G) / C per input channel and max(C, G) / G per kernel.
    """
    n, channels = x.shape[:2]
    groups, taps, height, width = kernels.shape[1:]
    outputs = max(channels, groups)
    patches = F.unfold(x, kernel_size, dilation, padding, stride).view(n, channels, taps, height, width)
    patches = patches.repeat_interleave(outputs // channels, dim=1)
    return (patches * kernels.repeat_interleave(outputs // groups, dim=1)).sum(dim=2)


def dconv_layer_reference(
    x: Tensor,
    features: Tensor,
    weight: Tensor,
    static: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """`dconv_reference` with kernels from a 1×1 convolution of features, plus a static kernel for every output channel.

    `x` is (N, C, H, W), `features` is (N, Cf, H', W'), `weight` is (G·T, Cf) with G kernels in order, `static` is
    (O, 1, k_h, k_w), `bias` is (O). The result is (N, O, H', W').
    """
    n, channels = x.shape[:2]
    outputs, _, kernel_h, kernel_w = static.shape
    taps = kernel_h * kernel_w
    height, width = features.shape[-2:]
    groups = weight.shape[0] // taps
    generated = F.conv2d(features, weight[:, :, None, None]).view(n, groups, taps, height, width)
    kernels = generated.repeat_interleave(outputs // groups, dim=1) + static.view(1, outputs, taps, 1, 1)
    patches = F.unfold(x, (kernel_h, kernel_w), tuple(dilation), tuple(padding), tuple(stride))
    patches = patches.view(n, channels, taps, height, width).repeat_interleave(outputs // channels, dim=1)
    y = (patches * kernels).sum(dim=2)
    return y if bias is None else y + bias.view(1, -1, 1, 1)
