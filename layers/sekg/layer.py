"""A DConv in place of a convolution, after it, or inside its factorization (ADFNet, §3)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError, UnsupportedLayerError
from surgeon.layers.base import CodedConv2d, LayerConfig, scaled_bias
from surgeon.layers.geometry import ConvGeometry, pad_for_window
from surgeon.layers.norm import check_norm
from surgeon.layers.registry import register
from surgeon.layers.sekg.dconv import DConv2d, misfit
from surgeon.layers.sekg.factors import compose, composes, factorise
from surgeon.layers.sekg.operator import channels_fit
from surgeon.layers.source import ConvSource


@dataclass(frozen=True, kw_only=True)
class SEKGConfig(LayerConfig):
    """`mode` selects what becomes dynamic: "depthwise", the convolution itself (depthwise ones only, and their "auto"); "dense", a
    DConv after it ("auto" otherwise); "factorised", the depthwise stage of its factorization.

    `kernel_size` is that of the DConv after a dense convolution. `kernel_groups` is the number of generated kernels per
    pixel; None means one for each channel of the DConv, or in "factorised" mode one for each input channel, shared by the
    channels derived from it. `multiplier` is the number of depthwise kernels per input channel in "factorised" mode; None,
    or at least the weight's maximum rank, min(k_h·k_w, C_out / groups), is exact. `norm` normalizes the features that
    generate the kernels: "batch", or None as in the paper.
    """

    paper: ClassVar[Mapping[str, Any]] = {"norm": None}
    symbols: ClassVar[Mapping[str, str]] = {"kernel_size": "k", "kernel_groups": "g"}
    search_axes: ClassVar[tuple[str, ...]] = ("kernel_groups",)
    least: ClassVar[Mapping[str, int]] = {"kernel_size": 1, "kernel_groups": 1, "multiplier": 1}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"mode": ("auto", "depthwise", "dense", "factorised")}

    kernel_size: int = 3
    kernel_groups: int | None = None
    mode: str = "auto"
    multiplier: int | None = None
    norm: str | None = "batch"

    @classmethod
    def symbols_of(cls, options: Mapping[str, Any]) -> Mapping[str, str]:
        # elsewhere the generated kernels are as large as the convolution's
        after = options.get("mode", "auto") not in ("depthwise", "factorised")
        return {key: letter for key, letter in cls.symbols.items() if key != "kernel_size" or after}

    def __post_init__(self) -> None:
        check_norm(self.told(), self.norm)
        self.check_values()
        if self.multiplier is not None and self.mode != "factorised":
            raise ConfigError(f"{self.told()}: multiplier belongs to mode 'factorised', got mode {self.mode!r}")

    def may_compress(self, geometry: ConvGeometry) -> bool:
        taps = geometry.kernel_size[0] * geometry.kernel_size[1]
        return self.mode == "factorised" and self.multiplier is not None and self.multiplier < taps

    def resolve(self, geometry: ConvGeometry) -> "SEKGConfig":
        """This config with every open choice resolved for a convolution of this geometry."""
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
    """Maximum number of depthwise kernels per input channel that a factorization of the convolution can need."""
    return min(geometry.kernel_size[0] * geometry.kernel_size[1], geometry.out_channels // geometry.groups)


@register
class SEKGConv2d(CodedConv2d):
    """A convolution with a DConv: in its place if it is depthwise, after it if it is dense, or inside its factorization.

    In "dense" mode (the order of ADFNet's DCB) the parameters are the convolution's `kernel` and a DConv at the identity; in
    "depthwise" mode the weight is the DConv's static kernel; in "factorised" mode a DConv of depth multiplier r is followed by
    the 1×1 convolution `pointwise` (C_out, r·C_in/groups, 1, 1), from an SVD of the weight of every input channel.
    """

    type_name: ClassVar[str] = "sekg"
    fewer_parameters: ClassVar[str] = "kernel_groups shares kernels among channels: 4 is a value to start with"
    tasks: ClassVar[tuple[str, ...]] = ("denoising", "real-denoising")
    patterns: ClassVar[Mapping[str, Mapping[str, Any]]] = {"dcb": {"mode": "dense"}}
    Config: ClassVar[type[LayerConfig]] = SEKGConfig
    config: SEKGConfig
    kernel: nn.Parameter | None
    pointwise: nn.Parameter | None
    shift: nn.Parameter | None  # added after the DConv in "dense" mode if a norm was folded

    def __init__(self, geometry: ConvGeometry, config: LayerConfig) -> None:
        options = _options(config).resolve(geometry)
        super().__init__(geometry, options)
        self.register_parameter("kernel", None)
        self.register_parameter("pointwise", None)
        self.register_parameter("shift", None)
        if options.mode == "dense":
            self.kernel = nn.Parameter(torch.zeros(geometry.weight_shape))
            self.dconv = DConv2d.same(
                geometry.out_channels, options.kernel_size, kernel_groups=options.kernel_groups, norm=options.norm
            )
        else:
            self.dconv = DConv2d(_dconv_geometry(geometry, options), options.kernel_groups, norm=options.norm)
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
            reasons.append(misfit(inner.in_channels, options.kernel_groups or 1, inner.out_channels))
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

    def adapt(self, x: Tensor) -> Tensor:
        return self._compute(x, self.dconv)

    def static_conv2d(self, x: Tensor) -> Tensor:
        """The layer with every generated kernel at zero; in "dense" mode that may be two convolutions, see `static_weight`."""
        return self._compute(x, self.dconv.static_conv2d)

    def _compute(self, x: Tensor, dconv: Callable[..., Tensor]) -> Tensor:
        if self.kernel is not None:
            return dconv(self.dconv_input(x), self.shift)
        if self.pointwise is not None:
            return F.conv2d(dconv(x), self.pointwise, self.bias, groups=self.geometry.groups)
        return dconv(x, self.bias)

    def static_weight(self) -> Tensor:
        """Weight of the plain convolution that remains.

        In "dense" mode that is the convolution followed by the DConv's static kernels: if these have left the identity, a
        larger convolution, equal away from the borders (zero padding lies between the two); see `static_is_exact`. Raises
        `UnsupportedLayerError` if a dilated convolution and non-identity static kernels cannot be merged into one convolution.
        """
        g, static = self.geometry, self.dconv.static
        if self.kernel is not None:
            if self._static_is_centered():
                row, column = self.dconv.center
                return self.kernel * static[:, :, row : row + 1, column : column + 1]
            return compose(self.kernel, static, g)
        if self.pointwise is not None:
            inputs, taps = g.in_channels // g.groups, g.kernel_size
            depthwise = static.view(g.groups, inputs, -1, *taps)
            pointwise = self.pointwise.view(g.groups, g.out_channels // g.groups, inputs, -1)
            return torch.einsum("gocr,gcryx->gocyx", pointwise, depthwise).reshape(g.weight_shape).contiguous()
        return static

    def dconv_input(self, x: Tensor) -> Tensor:
        """The DConv's input: in "dense" mode the convolution's output, otherwise x itself."""
        if self.kernel is None:
            return x
        g = self.geometry
        x, padding = pad_for_window(x, g, g.kernel_size)
        return F.conv2d(x, self.kernel, self.bias, g.stride, padding, g.dilation, g.groups)

    def code(self, x: Tensor) -> Tensor:
        """The generated kernels, (N, kernel_groups·k_h·k_w, H', W')."""
        generated: Tensor = self.dconv.generator(self.dconv_input(x))
        return generated

    def signal(self, x: Tensor) -> Tensor:
        return self.dconv.generator.features(self.dconv_input(x))

    def constant_code(self) -> Tensor | None:
        """Zero, if the generator's last weight is zero."""
        weight = self.dconv.generator.weight.detach()
        return None if weight.any() else weight.new_zeros(len(weight))

    def energy_of(self, difference: Tensor) -> Tensor:
        """In terms of the DConv's kernels; a kernel shared by several channels counts once per channel."""
        return difference.square().sum(-1) * (len(self.dconv.static) // self.dconv.kernel_groups)

    def static_energy(self) -> Tensor:
        return self.dconv.static.detach().square().sum()

    @torch.no_grad()
    def fix(self, code: Tensor) -> None:
        kernels = code.view(self.dconv.kernel_groups, 1, 1, *self.dconv.geometry.kernel_size)
        static = self.dconv.static
        static.add_(kernels.expand(-1, len(static) // len(kernels), -1, -1, -1).reshape(static.shape))
        self.dconv.generator.weight.zero_()

    @torch.no_grad()
    def scale_output(self, scale: Tensor, shift: Tensor) -> None:
        if self.pointwise is not None:
            self.pointwise.mul_(scale[:, None, None, None])
        else:
            generated, groups = self.dconv.generator.weight, self.dconv.kernel_groups
            shared = scale.view(groups, -1)
            if self.constant_code() is None and not torch.equal(shared, shared[:, :1].expand_as(shared)):
                reason = f"{len(scale)} channels, each with a scale of its own, share {groups} generated kernels"
                raise UnsupportedLayerError(f"the norm cannot be folded into this layer: {reason}", (reason,))
            generated.view(groups, -1).mul_(shared[:, :1])
            self.dconv.static.mul_(scale[:, None, None, None])
        if self.kernel is None:
            self.bias = scaled_bias(self.bias, scale, shift, self.dconv.static)
        else:
            self.shift = scaled_bias(self.shift, scale, shift, self.kernel)

    def static_bias(self) -> Tensor | None:
        if self.kernel is None or self.bias is None:
            return self.bias if self.kernel is None else self.shift
        bias = self.bias * self.dconv.static.sum(dim=(1, 2, 3))
        return bias if self.shift is None else bias + self.shift

    def static_is_exact(self) -> bool:
        """False only in "dense" mode, for static kernels with off-center elements that see the zero padding in between."""
        if self.kernel is None or self._static_is_centered():
            return True
        no_bias = self.bias is None or not self.bias.detach().any()
        return no_bias and composes(self.geometry)

    def _static_is_centered(self) -> bool:
        row, column = self.dconv.center
        return int(self.dconv.static.count_nonzero()) == int(self.dconv.static[:, :, row, column].count_nonzero())

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.dconv.named_parameters(prefix="dconv"):
            if self.kernel is not None or name != "dconv.static":
                yield name, parameter

    def no_weight_decay(self) -> set[str]:
        """In "dense" mode the static kernels, which start at the identity: they are a gain, like a norm's."""
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
