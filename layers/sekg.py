"""SEKG: every pixel and channel gets its own kernel, generated from its surroundings and its channel (ADFNet, Figure 3).

`SEKG` generates kernels, `DConv2d` applies them to each channel on its own, `SEKGConv2d` puts that in the place of a convolution.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError, GeometryError
from surgeon.layers.base import DynamicConv2d, LayerConfig, check_at_least
from surgeon.layers.factors import compose, composes, factorise
from surgeon.layers.geometry import ConvGeometry, Pair, pad_for_window
from surgeon.layers.kernels.dconv import channels_fit, dconv_layer
from surgeon.layers.registry import register
from surgeon.layers.source import ConvSource

WINDOW = (3, 3)
MODES = ("auto", "depthwise", "dense", "factorised")


class SEKG(nn.Module):
    """Spatially enhanced kernel generation: features of every output pixel, and the 1×1 convolution to `maps` kernel elements.

    The features (N, C, H', W') are a 3×3 depthwise convolution of the input (N, C, H, W), with the stride and dilation of
    `geometry` and centred where its kernel is, plus one value a channel: the global average, convolved over the channels
    with width 3. `weight` (maps, C) starts at zero. A bias of the second branch is redundant (`spatial` has one) and is there
    only on request, for weights trained elsewhere.
    """

    def __init__(self, geometry: ConvGeometry, maps: int, *, channel_bias: bool = False) -> None:
        super().__init__()
        self.geometry = geometry
        channels = geometry.in_channels
        self.spatial = nn.Conv2d(
            channels, channels, WINDOW, stride=geometry.stride, dilation=geometry.dilation, groups=channels
        )
        self.channel = nn.Conv1d(1, 1, 3, padding=1, bias=channel_bias)
        self.weight = nn.Parameter(torch.zeros(maps, channels))

    def features(self, x: Tensor) -> Tensor:
        """What the kernels are made of, (N, C, H', W')."""
        spatial = self.spatial
        padded, padding = pad_for_window(x, self.geometry, WINDOW)
        around = F.conv2d(
            padded, spatial.weight, spatial.bias, spatial.stride, padding, spatial.dilation, spatial.groups
        )
        average = x.mean(dim=(2, 3)).unsqueeze(1)
        channel: Tensor = self.channel(average)
        return around.add_(channel.transpose(1, 2).unsqueeze(3))  # no second map of the image's size

    def forward(self, x: Tensor) -> Tensor:
        """The generated kernels, (N, maps, H', W')."""
        return F.conv2d(self.features(x), self.weight[:, :, None, None])

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one image of this input size."""
        out_h, out_w = self.geometry.output_size(height, width)
        pixel = self.spatial.weight.numel() + self.weight.numel()
        return pixel * out_h * out_w + 3 * self.geometry.in_channels


class DConv2d(nn.Module):
    """Dynamic convolution (ADFNet, section "DCB"): every channel is filtered with a kernel of its own at every pixel.

    Maps (N, C, H, W) to (N, O, H', W') as the depthwise convolution of `geometry` would; O may be a multiple of C. The kernel
    at a pixel is `static` (O, 1, k_h, k_w), one for each output channel, plus a generated part, which is zero at the start.
    `kernel_groups` is the number of generated kernels at a pixel: O (the default), a divisor of C, or a multiple of C that
    divides O; neighbouring channels share one. `static` starts at the identity; in the paper it is the bias of the 1×1
    convolution. Raises `GeometryError` for another geometry or number. `backend` names the operator's implementation, for
    comparisons; None is the fastest that can run.
    """

    backend: str | None = None

    def __init__(self, geometry: ConvGeometry, kernel_groups: int | None = None, *, channel_bias: bool = False) -> None:
        super().__init__()
        channels, outputs = geometry.in_channels, geometry.out_channels
        if geometry.groups != channels:
            raise GeometryError(
                f"DConv2d filters every channel on its own: expected groups={channels}, got {geometry.groups}"
            )
        self.kernel_groups = outputs if kernel_groups is None else kernel_groups
        if not channels_fit(channels, self.kernel_groups, outputs):
            raise GeometryError(_misfit(channels, self.kernel_groups, outputs))
        self.geometry = geometry
        taps = geometry.kernel_size[0] * geometry.kernel_size[1]
        self.generator = SEKG(geometry, self.kernel_groups * taps, channel_bias=channel_bias)
        self.static = nn.Parameter(torch.empty(outputs, 1, *geometry.kernel_size))
        self.reset_static()

    @classmethod
    def same(
        cls, channels: int, kernel_size: int = 3, *, kernel_groups: int | None = None, channel_bias: bool = False
    ) -> Self:
        """Of stride 1 and zero padding that keeps the size; an even kernel reaches one pixel further down-right."""
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
        return cls(geometry, kernel_groups, channel_bias=channel_bias)

    @torch.no_grad()
    def reset_static(self) -> None:
        """Make the static kernels the identity: 1 at the centre tap."""
        row, column = self.centre
        self.static.zero_()
        self.static[:, :, row, column] = 1

    @property
    def centre(self) -> Pair:
        """The tap over the pixel itself, (row, column)."""
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
        """The same without the generated part: a depthwise convolution."""
        g = self.geometry
        x, padding = pad_for_window(x, g, g.kernel_size)
        return F.conv2d(x, self.static, bias, g.stride, padding, g.dilation, g.groups)

    def macs(self, height: int, width: int) -> int:
        """Multiply-accumulates for one image of this input size; static and generated kernel are added, then applied once."""
        out_h, out_w = self.geometry.output_size(height, width)
        return self.generator.macs(height, width) + self.static.numel() * out_h * out_w

    def extra_repr(self) -> str:
        g = self.geometry
        return (
            f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}, "
            f"dilation={g.dilation}, kernel_groups={self.kernel_groups}"
        )


def _misfit(channels: int, groups: int, outputs: int) -> str:
    """That this number of kernel groups does not fit, and the nearest that do."""
    fitting = [g for g in range(1, outputs + 1) if channels_fit(channels, g, outputs)]
    near = [g for g in fitting if g < groups][-1:] + [g for g in fitting if g > groups][:1]
    told = " or ".join(map(str, near))
    wide = f" and {outputs} output" if outputs != channels else ""
    return f"{groups} kernel groups do not divide {channels} input{wide} channels ({told} would)"


@dataclass(frozen=True, kw_only=True)
class SEKGConfig(LayerConfig):
    """`mode` says what becomes dynamic: "depthwise" the convolution itself (depthwise ones only, and their "auto"), "dense" a
    DConv behind it ("auto" otherwise), "factorised" the depthwise stage of its factorisation.

    `kernel_size` is that of the DConv behind a dense convolution. `kernel_groups` is the number of generated kernels at a
    pixel; None takes one for each channel of the DConv, or in "factorised" mode one for each input channel, shared by the
    channels that come from it. `multiplier` is the number of depthwise kernels an input channel in "factorised" mode; None,
    or more than the rank of the weight can be, min(k_h·k_w, C_out / groups), is exact.
    """

    kernel_size: int = 3
    kernel_groups: int | None = None
    mode: str = "auto"
    multiplier: int | None = None

    def __post_init__(self) -> None:
        check_at_least(self, "kernel_size", 1)
        for name in ("kernel_groups", "multiplier"):
            if getattr(self, name) is not None:
                check_at_least(self, name, 1)
        if self.mode not in MODES:
            raise ConfigError(f"SEKGConfig: mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.multiplier is not None and self.mode != "factorised":
            raise ConfigError(f"SEKGConfig: multiplier belongs to mode 'factorised', got mode {self.mode!r}")

    def resolve(self, geometry: ConvGeometry) -> "SEKGConfig":
        """This config with every open choice made for a convolution of this geometry."""
        mode = self.mode
        if mode == "auto":
            mode = "depthwise" if geometry.is_depthwise else "dense"
        if mode != "factorised":
            return replace(self, mode=mode, kernel_groups=self.kernel_groups or geometry.out_channels)
        rank = full_rank(geometry)
        return replace(
            self,
            kernel_groups=self.kernel_groups or geometry.in_channels,
            multiplier=rank if self.multiplier is None else min(rank, self.multiplier),
        )


def full_rank(geometry: ConvGeometry) -> int:
    """The most depthwise kernels an input channel that a factorisation of the convolution can need."""
    return min(geometry.kernel_size[0] * geometry.kernel_size[1], geometry.out_channels // geometry.groups)


@register
class SEKGConv2d(DynamicConv2d):
    """A convolution with a DConv: in its place if it is depthwise, behind it if it is dense, or inside of its factorisation.

    In "dense" mode (the order of ADFNet's DCB) the parameters are the convolution's `kernel` and a DConv at the identity; in
    "depthwise" mode the weight is the DConv's static kernel; in "factorised" mode a DConv of depth multiplier r is followed by
    the 1×1 convolution `pointwise` (C_out, r·C_in/groups, 1, 1), from an SVD of the weight of every input channel.
    """

    type_name: ClassVar[str] = "sekg"
    fewer_parameters: ClassVar[str] = "kernel_groups shares kernels among channels"
    Config: ClassVar[type[LayerConfig]] = SEKGConfig
    config: SEKGConfig
    kernel: nn.Parameter | None
    pointwise: nn.Parameter | None

    def __init__(self, geometry: ConvGeometry, config: LayerConfig) -> None:
        options = _options(config).resolve(geometry)
        super().__init__(geometry, options)
        self.register_parameter("kernel", None)
        self.register_parameter("pointwise", None)
        if options.mode == "dense":
            self.kernel = nn.Parameter(torch.zeros(geometry.weight_shape))
            self.dconv = DConv2d.same(geometry.out_channels, options.kernel_size, kernel_groups=options.kernel_groups)
        else:
            self.dconv = DConv2d(_dconv_geometry(geometry, options), options.kernel_groups)
        if options.mode == "factorised":
            inner = self.dconv.geometry.out_channels // geometry.groups
            self.pointwise = nn.Parameter(torch.zeros(geometry.out_channels, inner, 1, 1))
        self.bias = nn.Parameter(torch.zeros(geometry.out_channels)) if geometry.bias else None

    @classmethod
    def why_not(cls, geometry: ConvGeometry, config: LayerConfig) -> list[str]:
        options = _options(config).resolve(geometry)
        inner = _dconv_geometry(geometry, options)
        reasons = []
        if options.mode == "depthwise" and geometry.groups != geometry.in_channels:
            reasons.append(
                f"mode 'depthwise' takes depthwise convolutions, and this one has {geometry.groups} groups "
                f"for {geometry.in_channels} input channels"
            )
        elif not channels_fit(inner.in_channels, options.kernel_groups or 1, inner.out_channels):
            reasons.append(_misfit(inner.in_channels, options.kernel_groups or 1, inner.out_channels))
        return reasons

    @classmethod
    def from_conv(cls, conv: nn.Module | ConvSource, config: LayerConfig | None = None, **context: Any) -> Self:
        """Exact, unless the config asks for fewer depthwise kernels than the weight's rank."""
        source = conv if isinstance(conv, ConvSource) else ConvSource.read(conv)
        layer = cls(source.geometry, config or SEKGConfig())
        layer = layer.to(device=source.weight.device, dtype=source.weight.dtype)
        with torch.no_grad():
            if layer.bias is not None and source.bias is not None:
                layer.bias.copy_(source.bias)
            if layer.kernel is not None:
                layer.kernel.copy_(source.weight)
            elif layer.pointwise is not None:
                depthwise, pointwise = factorise(source.weight, source.geometry.groups, layer.config.multiplier or 1)
                layer.dconv.static.copy_(depthwise)
                layer.pointwise.copy_(pointwise)
            else:
                layer.dconv.static.copy_(source.weight)
        if isinstance(conv, nn.Module):
            layer.train(conv.training)
            layer._require_grad_like(conv)
        return layer

    def _require_grad_like(self, conv: nn.Module) -> None:
        new = {name for name, _ in self.new_parameters()}
        for name, parameter in self.named_parameters():
            if name not in new:
                old = conv.bias if name == "bias" else conv.weight
                parameter.requires_grad_(cast(Tensor, old).requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self._compute(x, self.dconv if self.adaptive else self.dconv.static_conv2d)

    def static_conv2d(self, x: Tensor) -> Tensor:
        """The layer with every generated kernel at zero; in "dense" mode that may be two convolutions, see `static_weight`."""
        return self._compute(x, self.dconv.static_conv2d)

    def _compute(self, x: Tensor, dconv: Callable[..., Tensor]) -> Tensor:
        if self.kernel is not None:
            return dconv(self.dconv_input(x))
        if self.pointwise is not None:
            return F.conv2d(dconv(x), self.pointwise, self.bias, groups=self.geometry.groups)
        return dconv(x, self.bias)

    def static_weight(self) -> Tensor:
        """Weight of the plain convolution that remains.

        In "dense" mode that is the convolution followed by the DConv's static kernels: where these have left the identity, a
        larger convolution, equal away from the borders (between the two lies zero padding); see `static_is_exact`. Raises
        `UnsupportedLayerError` where a dilated convolution and static kernels off the identity do not make a convolution.
        """
        g, static = self.geometry, self.dconv.static
        if self.kernel is not None:
            if self._static_is_centred():
                row, column = self.dconv.centre
                return self.kernel * static[:, :, row : row + 1, column : column + 1]
            return compose(self.kernel, static, g)
        if self.pointwise is not None:
            inputs, taps = g.in_channels // g.groups, g.kernel_size
            depthwise = static.view(g.groups, inputs, -1, *taps)
            pointwise = self.pointwise.view(g.groups, g.out_channels // g.groups, inputs, -1)
            return torch.einsum("gocr,gcryx->gocyx", pointwise, depthwise).reshape(g.weight_shape)
        return static

    def dconv_input(self, x: Tensor) -> Tensor:
        """What the DConv gets: in "dense" mode the convolution's output, otherwise x itself."""
        if self.kernel is None:
            return x
        g = self.geometry
        x, padding = pad_for_window(x, g, g.kernel_size)
        return F.conv2d(x, self.kernel, self.bias, g.stride, padding, g.dilation, g.groups)

    def code(self, x: Tensor) -> Tensor:
        """The generated kernels, (N, kernel_groups·k_h·k_w, H', W')."""
        generated: Tensor = self.dconv.generator(self.dconv_input(x))
        return generated

    def constant_code(self) -> Tensor | None:
        """Zero, where the generator's last weight is."""
        weight = self.dconv.generator.weight.detach()
        return None if weight.any() else weight.new_zeros(len(weight))

    def energy_of(self, difference: Tensor) -> Tensor:
        """Of the DConv's kernels; one that several channels share counts for each."""
        return difference.square().sum(-1) * (len(self.dconv.static) // self.dconv.kernel_groups)

    def static_energy(self) -> Tensor:
        return self.dconv.static.detach().square().sum()

    @torch.no_grad()
    def fix(self, code: Tensor) -> None:
        kernels = code.view(self.dconv.kernel_groups, 1, 1, *self.dconv.geometry.kernel_size)
        static = self.dconv.static
        static.add_(kernels.expand(-1, len(static) // len(kernels), -1, -1, -1).reshape(static.shape))
        self.dconv.generator.weight.zero_()

    def static_bias(self) -> Tensor | None:
        if self.kernel is None or self.bias is None:
            return self.bias
        return self.bias * self.dconv.static.sum(dim=(1, 2, 3))

    def static_is_exact(self) -> bool:
        """False only in "dense" mode, for static kernels with elements off their centre that see the zero padding in between."""
        if self.kernel is None or self._static_is_centred():
            return True
        no_bias = self.bias is None or not self.bias.detach().any()
        return no_bias and composes(self.geometry)

    def _static_is_centred(self) -> bool:
        row, column = self.dconv.centre
        return int(self.dconv.static.count_nonzero()) == int(self.dconv.static[:, :, row, column].count_nonzero())

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.dconv.named_parameters(prefix="dconv"):
            if self.kernel is not None or name != "dconv.static":
                yield name, parameter

    def no_weight_decay(self) -> set[str]:
        """In "dense" mode the static kernels, which start at the identity: they are a gain, as that of a norm."""
        return {"dconv.static"} if self.kernel is not None else set()

    def macs(self, height: int, width: int) -> int:
        out_h, out_w = self.geometry.output_size(height, width)
        if self.kernel is not None:
            return self.geometry.macs(height, width) + self.dconv.macs(out_h, out_w)
        pointwise = 0 if self.pointwise is None else self.pointwise.numel() * out_h * out_w
        return self.dconv.macs(height, width) + pointwise


def _options(config: LayerConfig) -> SEKGConfig:
    if not isinstance(config, SEKGConfig):
        raise ConfigError(f"SEKGConv2d takes a SEKGConfig, got a {type(config).__name__}")
    return config


def _dconv_geometry(geometry: ConvGeometry, options: SEKGConfig) -> ConvGeometry:
    """Geometry of the DConv; in "dense" mode only its channels matter."""
    if options.mode == "depthwise":
        return replace(geometry, bias=False)
    if options.mode == "factorised":
        channels = geometry.in_channels
        outputs = channels * (options.multiplier or 1)
        return replace(geometry, out_channels=outputs, groups=channels, bias=False)
    channels = geometry.out_channels
    return replace(geometry, in_channels=channels, groups=channels, bias=False)
