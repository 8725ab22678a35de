"""SEKG and DConv: every pixel and channel gets its own kernel, generated from its neighborhood and channel (ADFNet, Figure 3).

`SEKG` generates kernels, `DConv2d` applies them to each channel separately.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import GeometryError
from surgeon.layers.aligned import AlignedConv2d
from surgeon.layers.geometry import ConvGeometry, Pair, pad_for_window
from surgeon.layers.norm import SignalNorm, check_norm
from surgeon.layers.sekg.operator import channels_fit, dconv_layer

WINDOW = (3, 3)


class SEKG(nn.Module):
    """Spatially enhanced kernel generation: features of every output pixel, and the 1×1 convolution to `maps` kernel elements.

    The features (N, C, H', W') are a 3×3 depthwise convolution of the input (N, C, H, W), with the stride and dilation of
    `geometry` and centered on its kernel, plus one value per channel: the global average, convolved over the channels
    with width 3. `weight` (maps, C) starts at zero. The second branch's bias is redundant (`spatial` has one) and exists
    only on request, for weights trained elsewhere. `norm` "batch" normalizes the features; None, as in the paper, does not.
    """

    def __init__(
        self, geometry: ConvGeometry, maps: int, *, channel_bias: bool = False, norm: str | None = None
    ) -> None:
        super().__init__()
        check_norm("SEKG", norm)
        self.geometry = geometry
        channels = geometry.in_channels
        self.spatial = AlignedConv2d(geometry, channels, channels, WINDOW, groups=channels)
        self.channel = nn.Conv1d(1, 1, 3, padding=1, bias=channel_bias)
        self.norm = None if norm is None else SignalNorm(channels)
        self.weight = nn.Parameter(torch.zeros(maps, channels))

    def features(self, x: Tensor) -> Tensor:
        """The features from which the kernels are generated, (N, C, H', W')."""
        around: Tensor = self.spatial(x)
        average = x.mean(dim=(2, 3)).unsqueeze(1)
        channel: Tensor = self.channel(average)
        channel = channel.transpose(1, 2).unsqueeze(3)
        held = self.spatial._forward_hooks or self.spatial._backward_hooks  # a hook may hold that map
        around = around + channel if held else around.add_(channel)  # in place: no second full-size map
        return around if self.norm is None else self.norm(around)

    def forward(self, x: Tensor) -> Tensor:
        """The generated kernels, (N, maps, H', W')."""
        return F.conv2d(self.features(x), self.weight[:, :, None, None])

    def output_weights(self) -> set[str]:
        """Local name of the last weight, which fine-tuning slows in proportion to its inputs."""
        return {"weight"}

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one image of this input size."""
        out_h, out_w = self.geometry.output_size(height, width)
        pixel = self.spatial.weight.numel() + self.weight.numel()
        return pixel * out_h * out_w + 3 * self.geometry.in_channels


class DConv2d(nn.Module):
    """Dynamic convolution (ADFNet, section "DCB"): every channel is filtered with its own kernel at every pixel.

    Maps (N, C, H, W) to (N, O, H', W') as the depthwise convolution of `geometry` would; O may be a multiple of C. The kernel
    at a pixel is `static` (O, 1, k_h, k_w), one per output channel, plus a generated part, which starts at zero.
    `kernel_groups` is the number of generated kernels per pixel: O (the default), a divisor of C, or a multiple of C that
    divides O; neighboring channels share one. `static` starts at the identity; in the paper it is the bias of the 1×1
    convolution. Raises `GeometryError` for any other geometry or number. `backend` names the operator's implementation, for
    comparisons; None is the fastest that can run. `norm` is as in `SEKG`.
    """

    backend: str | None = None

    def __init__(
        self,
        geometry: ConvGeometry,
        kernel_groups: int | None = None,
        *,
        channel_bias: bool = False,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        channels, outputs = geometry.in_channels, geometry.out_channels
        if geometry.groups != channels:
            raise GeometryError(
                f"DConv2d filters every channel separately: expected groups={channels}, got {geometry.groups}"
            )
        self.kernel_groups = outputs if kernel_groups is None else kernel_groups
        if not channels_fit(channels, self.kernel_groups, outputs):
            raise GeometryError(misfit(channels, self.kernel_groups, outputs))
        self.geometry = geometry
        taps = geometry.kernel_size[0] * geometry.kernel_size[1]
        self.generator = SEKG(geometry, self.kernel_groups * taps, channel_bias=channel_bias, norm=norm)
        self.static = nn.Parameter(torch.empty(outputs, 1, *geometry.kernel_size))
        self.reset_static()

    @classmethod
    def same(
        cls,
        channels: int,
        kernel_size: int = 3,
        *,
        kernel_groups: int | None = None,
        channel_bias: bool = False,
        norm: str | None = None,
    ) -> Self:
        """A DConv of stride 1 whose zero padding keeps the size; an even kernel reaches one pixel farther down-right."""
        before = (kernel_size - 1) // 2
        after = kernel_size - 1 - before
        geometry = ConvGeometry(
            in_channels=channels,
            out_channels=channels,
            kernel_size=(kernel_size, kernel_size),
            padding=(before, after, before, after),
            groups=channels,
            bias=False,
        )
        return cls(geometry, kernel_groups, channel_bias=channel_bias, norm=norm)

    @torch.no_grad()
    def reset_static(self) -> None:
        """Make the static kernels the identity: 1 at the center tap."""
        row, column = self.center
        self.static.zero_()
        self.static[:, :, row, column] = 1

    @property
    def center(self) -> Pair:
        """The tap at the pixel itself, (row, column)."""
        kernel_h, kernel_w = self.geometry.kernel_size
        return (kernel_h - 1) // 2, (kernel_w - 1) // 2

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        g = self.geometry
        features = self.generator.features(x)
        x, padding = pad_for_window(x, g, g.kernel_size)
        return dconv_layer(
            x,
            features,
            self.generator.weight,
            self.static,
            bias,
            stride=g.stride,
            padding=padding,
            dilation=g.dilation,
            backend=self.backend,
        )

    def static_conv2d(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`forward` without the generated part: a depthwise convolution."""
        g = self.geometry
        x, padding = pad_for_window(x, g, g.kernel_size)
        return F.conv2d(x, self.static, bias, g.stride, padding, g.dilation, g.groups)

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one image of this input size; static and generated kernels are added, then applied once."""
        out_h, out_w = self.geometry.output_size(height, width)
        return self.generator.macs(height, width) + self.static.numel() * out_h * out_w

    def extra_repr(self) -> str:
        g = self.geometry
        return (
            f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}, "
            f"dilation={g.dilation}, kernel_groups={self.kernel_groups}"
        )


def misfit(channels: int, groups: int, outputs: int) -> str:
    """Message that this number of kernel groups does not fit, with the nearest ones that do."""
    fitting = [g for g in range(1, outputs + 1) if channels_fit(channels, g, outputs)]
    near = [g for g in fitting if g < groups][-1:] + [g for g in fitting if g > groups][:1]
    told = " or ".join(map(str, near))
    wide = f" and {outputs} output" if outputs != channels else ""
    return f"{groups} kernel groups do not divide {channels} input{wide} channels ({told} would)"
