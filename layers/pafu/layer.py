"""PAFU: a selector picks, at every pixel, one kernel of a learned group (Kokkinos et al., Pixel Adaptive Filtering Units).

Legend: N batch, C channels, H W input size, P Q output size, n kernels per group, O output channels, k l window, G groups.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.layers.base import CodedConv2d, LayerConfig, check_at_most, scaled_bias
from surgeon.layers.generator import PixelGenerator
from surgeon.layers.geometry import ConvGeometry, Pair, pad_for_window
from surgeon.layers.norm import check_norm
from surgeon.layers.pafu.operator import pafu_conv
from surgeon.layers.registry import register
from surgeon.layers.source import ConvSource


@dataclass(frozen=True, kw_only=True)
class PAFUConfig(LayerConfig):
    """Options of PAFU.

    group_size: n, kernels to select from, at least 2.
    hidden: channels inside the selector.
    selector_depth: its 3×3 convolutions, at least 1; one selection depends on (2·depth + 1)² input pixels (stride and dilation 1).
    temperature: of the softmax in training; initial value of the layer's attribute `temperature`, which may be annealed.
    perturbation: how far kernels 1.. start from the replaced weight, as a fraction of its RMS. They must differ: identical
        kernels are a stationary point of the regularizer and give the selector no gradient.
    supports: additional (square, odd) kernel sizes, assigned in turn to kernels 1..; kernel 0 keeps its own. Empty: all
        kernels have the size of the replaced one.
    shared: kernels 1.. are kernel 0 plus a difference (limited to their support): kernel 0 gets the gradient of every pixel. The
        differences start at zero and the selector at random: exact for any selection, in training, too. `perturbation` is then
        unused. False is the paper's form: independent kernels.
    selection: in training. "argmax": the kernel that eval mode selects; the selector's gradient is that of the expected loss under
        the softmax of its logits. "gumbel", as in the paper: sampled by a straight-through Gumbel-softmax.
    norm: normalizes the selector's signal: "batch", or None as in the paper.
    """

    paper: ClassVar[Mapping[str, Any]] = {"shared": False, "selection": "gumbel", "norm": None}
    symbols: ClassVar[Mapping[str, str]] = {"group_size": "n"}
    search_defaults: ClassVar[tuple[Mapping[str, Any], ...]] = ({"group_size": 4}, {"group_size": 8})  # 8: of the paper
    search_axes: ClassVar[tuple[str, ...]] = ("group_size",)
    least: ClassVar[Mapping[str, int]] = {"group_size": 2, "hidden": 1, "selector_depth": 1}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"selection": ("argmax", "gumbel")}

    group_size: int = 8
    hidden: int = 32
    selector_depth: int = 1
    temperature: float = 1.0
    perturbation: float = 0.02
    supports: tuple[int, ...] = ()
    shared: bool = True
    selection: str = "argmax"
    norm: str | None = "batch"

    def __post_init__(self) -> None:
        self.check_values()
        check_norm(self.told(), self.norm)
        if not isinstance(self.shared, bool):
            raise ConfigError(f"{self.told()}: shared must be true or false, got {self.shared!r}")
        for name in ("temperature", "perturbation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"{self.told()}: {name} must be a finite number > 0, got {value!r}")
        sizes = self.supports
        if not isinstance(sizes, tuple) or any(type(size) is not int or size < 1 or size % 2 == 0 for size in sizes):
            raise ConfigError(f"{self.told()}: supports must be a tuple of odd kernel sizes, got {sizes!r}")
        check_at_most(self, "supports", max(sizes, default=1))
        if len(sizes) >= self.group_size:
            raise ConfigError(
                f"{self.told()}: a group of {self.group_size} kernels has no room for {len(sizes)} more supports {sizes!r}; "
                f"kernel 0 keeps its own size, so there can be at most {self.group_size - 1}"
            )


@register
class PAFUConv2d(CodedConv2d):
    """A convolution whose kernel is selected at every pixel from a group of n (PAFU, eq. 2).

    In eval mode the selection is the argmax of the selector's logits; in training it is the same or a straight-through
    Gumbel-softmax (§3.4), depending on `selection`. Kernel 0 is the replaced weight, a parameter of its own, `kernel`,
    to keep its learning rate and allow freezing it while the group is trained. Kernels 1.. are `further_kernels`
    (n - 1, O, k·l·C/G), or kernel 0 plus these (`shared`), packed in the operator's layout, zero-padded to the largest support.
    All kernels share one bias.
    """

    type_name = "pafu"
    placed = "first of stages"  # §4.2.3
    tasks = ("segmentation", "super-resolution", "demosaicking", "sad")
    selects = True
    fewer_parameters = "a smaller group_size makes fewer kernels"
    Config = PAFUConfig

    config: PAFUConfig
    support_mask: Tensor | None

    def __init__(self, geometry: ConvGeometry, config: PAFUConfig) -> None:
        super().__init__(geometry, config)
        n, (outputs, inputs, k_h, k_w) = config.group_size, geometry.weight_shape
        self.window: Pair = (max(k_h, *config.supports, 1), max(k_w, *config.supports, 1))
        self.kernel = nn.Parameter(torch.zeros(geometry.weight_shape))
        self.further_kernels = nn.Parameter(torch.zeros(n - 1, outputs, math.prod(self.window) * inputs))
        self.selector = PixelGenerator(geometry, config.hidden, n, config.selector_depth, norm=config.norm)
        self.bias = nn.Parameter(torch.zeros(outputs)) if geometry.bias else None
        self.temperature = float(config.temperature)
        self.register_buffer("support_mask", self._support_mask(), persistent=False)

    @classmethod
    def why_not(cls, geometry: ConvGeometry, config: LayerConfig) -> list[str]:
        """With a window of different parity, the taps would fall between those of a dilated kernel."""
        assert isinstance(config, PAFUConfig)
        return [
            f"supports {config.supports} cannot be centered on a kernel of size {k} at dilation {d}: the parity differs"
            for k, d in zip(geometry.kernel_size, geometry.dilation, strict=True)
            if d > 1 and (max(k, *config.supports, 1) - k) % 2
        ][:1]

    @classmethod
    def from_conv(cls, conv: nn.Module | ConvSource, config: LayerConfig | None = None, **context: Any) -> Self:
        """Kernel 0 is the weight. With `shared`, the others start equal to it, and the selector selects at random.

        Otherwise the others are the weight plus noise, and the selector's last bias favors kernel 0: its logit is log n, the
        others' are 0, so it is selected everywhere in eval mode, and about half of the time in training with "gumbel".
        """
        source = conv if isinstance(conv, ConvSource) else ConvSource.read(conv)
        config = PAFUConfig() if config is None else config
        if not isinstance(config, PAFUConfig):
            raise ConfigError(f"PAFUConv2d takes a PAFUConfig, got a {type(config).__name__}")
        weight = source.weight
        layer = cls(source.geometry, config).to(device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            layer.kernel.data = weight.clone()
            if config.shared:
                layer.selector.expand.reset_parameters()
                layer.selector.set_static_output(torch.zeros(config.group_size))
            else:
                layer._fill_further_kernels(weight)
                preference = torch.zeros(config.group_size)
                preference[0] = math.log(config.group_size)
                layer.selector.set_static_output(preference)
            if layer.bias is not None and source.bias is not None:
                layer.bias.copy_(source.bias)
        if isinstance(conv, nn.Module):
            layer.train(conv.training)
            layer.kernel.requires_grad_(cast(Tensor, conv.weight).requires_grad)
            if layer.bias is not None:
                layer.bias.requires_grad_(cast(Tensor, conv.bias).requires_grad)
        return layer

    def _sizes(self) -> list[Pair]:
        """Supports of kernels 1.. ."""
        supports = [(size, size) for size in self.config.supports] or [self.geometry.kernel_size]
        return [supports[i % len(supports)] for i in range(self.config.group_size - 1)]

    def _support_mask(self) -> Tensor | None:
        """1 inside each kernel's support, 0 outside, (n - 1, k·l); None if all fill the window."""
        if all(size == self.window for size in self._sizes()):
            return None
        masks = [F.pad(torch.ones(size), _margins(size, self.window)) for size in self._sizes()]
        return torch.stack(masks).flatten(1)

    @torch.no_grad()
    def _fill_further_kernels(self, weight: Tensor) -> None:
        """In place, because the kernels of a large layer take gigabytes."""
        drawn = torch.randn(self.further_kernels.shape)  # on the CPU: equal on every device
        kernels = self.further_kernels.copy_(drawn)
        rms = weight.double().square().mean().sqrt().to(weight.dtype)
        centered = F.pad(weight, _margins((weight.shape[-2], weight.shape[-1]), self.window)).movedim(1, -1)
        kernels.mul_(self.config.perturbation * rms).add_(centered.flatten(1))
        if self.support_mask is not None:
            self._by_tap(kernels).mul_(self.support_mask[:, None, :, None])

    def _kernel(self) -> Tensor:
        """Kernel 0, zero-padded to the window, (O, C/G, k, l)."""
        if self.window == self.geometry.kernel_size:
            return self.kernel
        return F.pad(self.kernel, _margins(self.geometry.kernel_size, self.window))

    def _further_kernels(self) -> Tensor:
        """Kernels 1.., zero outside their supports, (n - 1, O, k·l·C/G)."""
        kernels: Tensor = self.further_kernels
        if self.support_mask is not None:
            kernels = (self._by_tap(kernels) * self.support_mask[:, None, :, None]).flatten(2)
        return kernels + self._kernel().movedim(1, -1).flatten(1) if self.config.shared else kernels

    def _by_tap(self, packed: Tensor) -> Tensor:
        """(..., k·l·C/G) as (..., k·l, C/G), without a copy."""
        return packed.view(*packed.shape[:-1], -1, self.geometry.weight_shape[1])

    def _unpacked(self, packed: Tensor) -> Tensor:
        """(..., O, k·l·C/G) as (..., O, C/G, k, l), without a copy."""
        return packed.view(*packed.shape[:-1], *self.window, -1).movedim(-1, -3)

    def adapt(self, x: Tensor) -> Tensor:
        g = self.geometry
        index, soft = self._select(self.selector(x))
        x, padding = pad_for_window(x, g, self.window)
        further = self._unpacked(self._further_kernels())
        settings: dict[str, Any] = {"stride": g.stride, "dilation": g.dilation, "groups": g.groups}
        y = pafu_conv(x, self._kernel(), further, index, soft, padding=padding, **settings)
        return y if self.bias is None else y.add_(self.bias.to(y.dtype)[:, None, None])

    def _select(self, logits_NnPQ: Tensor) -> tuple[Tensor, Tensor | None]:
        """The selected kernel (N, P, Q) and, in training, the soft selection (N, n, P, Q) that carries the gradient."""
        if not self.training:
            return _largest(logits_NnPQ), None
        logits_NnPQ = logits_NnPQ.to(torch.promote_types(logits_NnPQ.dtype, torch.float32))
        if self.config.selection == "argmax":
            return _largest(logits_NnPQ.detach()), (logits_NnPQ / self.temperature).softmax(1)
        gumbel_NnPQ = -torch.empty_like(logits_NnPQ).exponential_().log()
        soft_NnPQ = ((logits_NnPQ + gumbel_NnPQ) / self.temperature).softmax(1)
        return _largest(soft_NnPQ.detach()), soft_NnPQ

    @torch.no_grad()
    def selection(self, x: Tensor) -> Tensor:
        """The kernel that each output pixel selects in eval mode, (N, P, Q) int64, for pictures."""
        self.check_input(x)
        return _largest(self.selector(x))

    def code(self, x: Tensor) -> Tensor:
        """The selection, one channel per kernel, 1 where it is selected and 0 elsewhere, (N, n, P, Q)."""
        return F.one_hot(self.selection(x), self.config.group_size).movedim(-1, 1).to(self.kernel.dtype)

    def signal(self, x: Tensor) -> Tensor:
        return self.selector.hidden(x)

    @torch.no_grad()
    def constant_code(self) -> Tensor | None:
        """Known if all kernels are equal, or if one logit is always the largest: tanh keeps the hidden map within [-1, 1]."""
        if self.config.shared and not self.further_kernels.any():
            return self._chosen(0)
        expand = self.selector.expand
        weight, bias = expand.weight.double().flatten(1), self.selector.static_output.double()
        best = int(bias.argmax())
        if weight.any():
            lead = bias[best] - bias - (weight[best] - weight).abs().sum(1)
            rounding = 16 * torch.finfo(expand.weight.dtype).eps * (bias.abs().max() + weight.abs().sum(1).max())
            others = torch.arange(len(bias), device=bias.device) != best
            if not bool((lead[others] > rounding).all()):
                return None
        return self._chosen(best)

    def nearest_constant(self, mean: Tensor) -> Tensor:
        """The most frequently selected kernel."""
        return self._chosen(int(mean.argmax()))

    def code_text(self, mean: Tensor) -> str:
        share, kernel = mean.max(0)
        return f"kernel {int(kernel)} at {100 * float(share):.4g} % of the pixels"

    def _chosen(self, kernel: int) -> Tensor:
        return F.one_hot(torch.tensor(kernel), self.config.group_size).to(self.kernel)

    @torch.no_grad()
    def energy_of(self, difference: Tensor) -> Tensor:
        gram = self._gram(torch.float64).to(difference)
        return torch.einsum("...i,ij,...j->...", difference, gram, difference).clamp_min(0)

    @torch.no_grad()
    def fix(self, code: Tensor) -> None:
        self.selector.set_static_output(code)

    @torch.no_grad()
    def scale_output(self, scale: Tensor, shift: Tensor) -> None:
        self.kernel.mul_(scale[:, None, None, None])
        self.further_kernels.mul_(scale[:, None])
        self.bias = scaled_bias(self.bias, scale, shift, self.kernel)

    def static_weight(self) -> Tensor:
        """The kernel that the selector's last bias favors, (O, C/G, k, l): at initialization the replaced weight."""
        preferred = self.selector.static_output.detach().argmax()
        others = self._further_kernels().index_select(0, (preferred - 1).clamp(min=0)[None])[0]
        return torch.where(preferred == 0, self._kernel(), self._unpacked(others))

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "further_kernels", self.further_kernels
        yield from self.selector_parameters()

    def selector_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.selector.named_parameters(prefix="selector")

    def macs(self, height: int, width: int) -> int:
        """Every pixel is filtered with one kernel of the window's size, for any n; the selector is added."""
        rows, columns = self.geometry.output_size(height, width)
        outputs, inputs, *_ = self.geometry.weight_shape
        return outputs * inputs * math.prod(self.window) * rows * columns + self.selector.macs(height, width)

    def anneal(self, factor: float) -> bool:
        self.temperature = self.config.temperature * factor
        return True

    def regularization(self) -> Tensor:
        """‖W_f W_fᵀ − I‖²_F; the rows of W_f (n, k·l·C/G·O) are the kernels, padded to the window and normalized (eq. 3)."""
        gram = self._gram(torch.promote_types(self.kernel.dtype, torch.float32))
        norms = gram.diagonal().clamp_min(1e-24).sqrt()  # before the root, whose slope at zero is infinite
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return (gram / (norms[:, None] * norms) - eye).square().sum()

    def _gram(self, dtype: torch.dtype) -> Tensor:
        """Inner products of all pairs of kernels, (n, n). Normalized copies of the kernels would be saved for the backward pass."""
        first = self._kernel().movedim(1, -1).reshape(1, -1).to(dtype)
        others = self._further_kernels().flatten(1).to(dtype)
        with torch.autocast(first.device.type, enabled=False):
            across = others @ first.t()
            rows = [[first @ first.t(), across.t()], [across, others @ others.t()]]
            return torch.cat([torch.cat(row, 1) for row in rows])


def _largest(x: Tensor) -> Tensor:
    """`x.argmax(1)`, which is several times as slow on a CPU."""
    return x.max(1).indices


def _margins(size: Pair, window: Pair) -> tuple[int, int, int, int]:
    """Padding (left, right, top, bottom) that centers `size` in `window` as `pad_for_window` does; negative if it is larger."""
    (down, across) = (w - s for s, w in zip(size, window, strict=True))
    return (across // 2, across - across // 2, down // 2, down - down // 2)
