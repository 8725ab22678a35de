"""ACDA: a convolution whose filters are built at every pixel from dynamic atoms (Wang et al., "Adaptive Convolutions with Dynamic
Atoms", §3).

Shapes: m dynamic and r static atoms; K basis elements in a window (l_h, l_w) that contains the kernel's box (k_h, k_w);
alpha (N, m·K, H', W'), psi (K, l_h, l_w), coeff (C_out, C/g, m + r), dynamic atoms first.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.errors import ConfigError
from surgeon.layers.acda.bases import basis_elements, centered, fitting_elements, window_size
from surgeon.layers.acda.decompose import Decomposition, decompose, expand_in_basis, truncate_for_inputs
from surgeon.layers.acda.operator import acda_conv
from surgeon.layers.acda.reference import acda_macs
from surgeon.layers.base import CodedConv2d, LayerConfig, scaled_bias
from surgeon.layers.generator import RANK, WINDOW, PixelGenerator
from surgeon.layers.geometry import ConvGeometry, Pair, pad_for_window
from surgeon.layers.norm import batch_statistics, check_norm
from surgeon.layers.ops.dispatch import exporting, tracing
from surgeon.layers.registry import register
from surgeon.layers.source import ConvSource

BAND_BYTES = 128 << 20  # limit for the generator's maps of one band, without gradients


@dataclass(frozen=True, kw_only=True)
class ACDAConfig(LayerConfig):
    """`atoms` m, `scales` S and `basis_size` m' of the paper (appendix A.4: 6, 3, 6), `hidden` width of the generator (A.3: 64).

    `static_atoms`: number of atoms, in addition to the dynamic ones, that are the same at every pixel. None: as many as an exact
    kernel needs; fewer make the layer smaller but no longer exact (0: compress). `extra_elements`: number of basis elements derived
    from the weights. None: as many as the dynamic atoms need. In a layer both are numbers; without a convolution, None becomes 0.
    `generator` is the form of the generator, "full" (as in the paper), "separable" or "lowrank" (see `PixelGenerator`), the latter
    with rank `generator_rank` (None: 16). `norm` normalizes the generator's signal: "batch", or None as in the paper.
    """

    paper: ClassVar[Mapping[str, Any]] = {"norm": None}
    symbols: ClassVar[Mapping[str, str]] = {"atoms": "m", "scales": "S"}
    search_defaults: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"atoms": 6, "scales": 3},  # of the paper
        {"atoms": 4, "scales": 1},
        {"atoms": 6, "scales": 1},
    )
    search_axes: ClassVar[tuple[str, ...]] = ("atoms", "scales")
    compressed: ClassVar[Mapping[str, Any]] = {"static_atoms": 0}
    least: ClassVar[Mapping[str, int]] = {
        "atoms": 1,
        "scales": 1,
        "basis_size": 1,
        "hidden": 1,
        "static_atoms": 0,
        "extra_elements": 0,
        "generator_rank": 1,
    }
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"generator": ("full", "separable", "lowrank")}

    atoms: int = 6
    scales: int = 3
    basis_size: int = 6
    hidden: int = 64
    static_atoms: int | None = None
    extra_elements: int | None = None
    generator: str = "full"
    generator_rank: int | None = None
    norm: str | None = "batch"

    def __post_init__(self) -> None:
        check_norm(self.told(), self.norm)
        self.check_values()
        if self.generator_rank is not None and self.generator != "lowrank":
            raise ConfigError(
                f"{self.told()}: generator_rank belongs to generator 'lowrank', got generator {self.generator!r}"
            )

    def may_compress(self, geometry: ConvGeometry) -> bool:
        if self.static_atoms is None:
            return False
        filters, inputs, height, width = geometry.weight_shape
        return self.atoms + self.static_atoms < min(height * width, filters * inputs)


@register
class ACDAConv2d(CodedConv2d):
    """Convolution with per-pixel dynamic atoms (paper: Eq. 4-6, two-layer form of Figure 3).

    Parameters: `generator` Φ (its last bias is the static alpha), `coeff`, `static_atoms` (r, k_h, k_w), `bias`.
    Buffer: `psi`, the Fourier-Bessel elements followed by the extra ones derived from the weights.
    """

    type_name: ClassVar[str] = "acda"
    placed: ClassVar[str] = "last stage"
    fewer_parameters: ClassVar[str] = "generator=separable or lowrank makes a smaller generator"
    new_lr_scale: ClassVar[float] = 1.0  # docs/finetuning.md: lowest loss on ResNet-20; its last weight is slowed apart
    tasks: ClassVar[tuple[str, ...]] = ("classification", "crowd-counting", "pattern-detection")
    Config: ClassVar[type[LayerConfig]] = ACDAConfig
    config: ACDAConfig
    psi: Tensor

    def __init__(self, geometry: ConvGeometry, config: ACDAConfig | None = None) -> None:
        """Built from scratch, this is the paper's layer: each atom starts as one basis element, with random coefficients."""
        config = config or ACDAConfig()
        config = replace(config, static_atoms=config.static_atoms or 0, extra_elements=config.extra_elements or 0)
        super().__init__(geometry, config)
        assert config.static_atoms is not None
        assert config.extra_elements is not None
        basis = basis_elements(geometry.kernel_size, config.scales, config.basis_size)
        extra = basis.new_zeros(config.extra_elements, *basis.shape[1:])
        self.register_buffer("psi", torch.cat([basis, extra]).to(torch.get_default_dtype()))
        form, rank = config.generator, config.generator_rank or RANK
        self.generator = PixelGenerator(
            geometry, config.hidden, config.atoms * len(self.psi), form=form, rank=rank, norm=config.norm
        )
        self.generator.set_static_output(_one_element_each(config.atoms, len(basis), len(self.psi)).flatten())
        c_out, c_group = geometry.weight_shape[:2]
        atoms = config.atoms + config.static_atoms
        bound = (c_group * atoms) ** -0.5
        self.coeff = nn.Parameter(torch.empty(c_out, c_group, atoms).uniform_(-bound, bound))
        static = torch.randn(config.static_atoms, geometry.kernel_size[0] * geometry.kernel_size[1])
        self.static_atoms = nn.Parameter(F.normalize(static, dim=1).view(-1, *geometry.kernel_size))
        self.bias = nn.Parameter(torch.zeros(c_out)) if geometry.bias else None

    def start_untrained(self) -> None:
        if self.config.static_atoms == 0:
            self.load_state_dict(type(self)(self.geometry, self.config).state_dict())

    @classmethod
    def from_conv(cls, conv: nn.Module | ConvSource, config: LayerConfig | None = None, **context: Any) -> Self:
        """Exact unless the config allows fewer static atoms or extra elements than exactness needs.

        In that case, with `calibration` (N, C, H, W) in the context, atoms and coefficients are fitted to that input; with
        `calibration_exact`, to the output of the original convolution on it.
        """
        source = conv if isinstance(conv, ConvSource) else ConvSource.read(conv)
        config = config or ACDAConfig()
        assert isinstance(config, ACDAConfig)
        parts = _decompose(source, config, context.get("calibration"), context.get("calibration_exact"))
        kernel, m = source.geometry.kernel_size, config.atoms
        basis = basis_elements(kernel, config.scales, config.basis_size)
        fitting = fitting_elements(kernel, config.scales, config.basis_size)
        extra, alpha_fit = expand_in_basis(parts.atoms[:m], centered(basis[:fitting], kernel), config.extra_elements)
        config = replace(config, static_atoms=max(0, parts.rank - m), extra_elements=len(extra))
        layer = cls(source.geometry, config)

        # Atoms that the kernel does not need start as one basis element each, with zero coefficients.
        elements, given = len(basis) + len(extra), len(alpha_fit)
        alpha = _one_element_each(m, len(basis), elements)
        alpha[:given] = 0
        alpha[:given, :fitting] = alpha_fit[:, :fitting]
        alpha[:given, len(basis) :] = alpha_fit[:, fitting:]
        coeff = torch.zeros(layer.coeff.shape, dtype=torch.float64)
        coeff[:, :, :given] = parts.coeff[:, :, :given]
        coeff[:, :, m:] = parts.coeff[:, :, m:]
        layer = layer.to(source.weight.device, source.weight.dtype)
        with torch.no_grad():
            layer.psi.copy_(torch.cat([basis, centered(extra, window_size(kernel, config.scales)).to(basis)]))
            layer.generator.set_static_output(alpha.flatten())
            layer.coeff.copy_(coeff)
            layer.static_atoms.copy_(parts.atoms[m:])
            if layer.bias is not None and source.bias is not None:
                layer.bias.copy_(source.bias)
        if isinstance(conv, nn.Conv2d):
            _take_over_flags(layer, conv)
        return layer

    def adapt(self, x: Tensor) -> Tensor:
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or exporting() or tracing()
        if whole or batch_statistics(self.generator):
            return self._filter(x, self.geometry)
        return self._in_bands(x)

    def _filter(self, x: Tensor, g: ConvGeometry) -> Tensor:
        """The dynamic convolution of an image, or of a band of it with the band's geometry."""
        window = self._window
        alpha = self.generator(x, g)
        padded, padding = pad_for_window(x, g, window)
        dynamic = self.config.atoms
        static: Tensor = centered(self.static_atoms, window)
        coeff: Tensor = self.coeff
        if self.folds_static:
            static, coeff = static[:0], coeff[:, :, :dynamic]
        y = acda_conv(padded, alpha, self.psi, static, coeff, g.stride, padding, g.dilation, g.groups)
        if self.folds_static:
            weight = torch.einsum("oca,ahw->ochw", self.coeff[:, :, dynamic:], self.static_atoms)
            padded, padding = pad_for_window(x, g, g.kernel_size)
            return y + F.conv2d(padded, weight, self.bias, g.stride, padding, g.dilation, g.groups)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def _in_bands(self, x: Tensor) -> Tensor:
        """`_filter` without gradients: the generator's maps, several times the input, exist for one band at a time.

        A band is a few images, or a few output rows of one image, whose maps take at most `BAND_BYTES`.
        """
        g = self.geometry
        rows, columns = g.output_size(x.shape[2], x.shape[3])
        maps = self.config.atoms * len(self.psi) + 2 * self.config.hidden
        fitting = max(1, BAND_BYTES // (maps * columns * x.element_size()))
        if len(x) * rows <= fitting:
            return self._filter(x, g)
        if g.padding_mode != "zeros":
            own = g.explicit_padding(x.shape[2], x.shape[3])
            x = F.pad(x, own, mode=g.padding_mode) if any(own) else x
            g = replace(g, padding=(0, 0, 0, 0), padding_mode="zeros")
        images, height = max(1, fitting // rows), -(-rows // -(-rows // min(fitting, rows)))
        out: Tensor | None = None
        for image in range(0, len(x), images):
            for top in range(0, rows, height):
                band = slice(top, min(top + height, rows))
                read, geometry = g.band(band, (g.kernel_size, self._window, WINDOW), x.shape[2], x.shape[3])
                part = self._filter(x[image : image + images, :, read], geometry)
                if out is None:
                    out = part.new_empty(len(x), part.shape[1], rows, columns)
                out[image : image + images, :, band] = part
        assert out is not None
        return out

    @property
    def _window(self) -> Pair:
        return window_size(self.geometry.kernel_size, self.config.scales)  # plain numbers, even while `psi` is traced

    @property
    def folds_static(self) -> bool:
        """Whether the static atoms run as one plain convolution because that is cheaper than filtering with each of them."""
        c_out, c_group = self.geometry.weight_shape[:2]
        window, kernel = math.prod(self._window), math.prod(self.geometry.kernel_size)
        two_layer = (self.config.static_atoms or 0) * (self.geometry.in_channels * window + c_out * c_group)
        return two_layer > kernel * c_out * c_group > 0

    def static_weight(self) -> Tensor:
        """Weight (C_out, C/g, l_h, l_w) if the generator returns its last bias everywhere."""
        alpha = self.generator.static_output.view(self.config.atoms, -1)
        dynamic = torch.einsum("ak,khw->ahw", alpha, self.psi)
        static = centered(self.static_atoms, self._window)
        return torch.einsum("oca,ahw->ochw", self.coeff, torch.cat([dynamic, static]))

    def code(self, x: Tensor) -> Tensor:
        """alpha, (N, m·K, H', W')."""
        alpha: Tensor = self.generator(x)
        return alpha

    def signal(self, x: Tensor) -> Tensor:
        return self.generator.hidden(x)

    @torch.no_grad()
    def constant_code(self) -> Tensor | None:
        """Known if the generator's last weight is zero for every atom that has a coefficient."""
        used = self.coeff[:, :, : self.config.atoms].flatten(0, 1).any(0)
        if self.generator.expand.weight.flatten(1).view(self.config.atoms, -1)[used].any():
            return None
        return self.generator.static_output.detach()

    @torch.no_grad()
    def energy_of(self, difference: Tensor) -> Tensor:
        """‖A δ ψ‖², from the Gram matrices of the coefficients and the basis."""
        m = self.config.atoms
        coeff, psi = self.coeff[:, :, :m].flatten(0, 1).double(), self.psi.flatten(1).double()
        delta = difference.unflatten(-1, (m, -1))
        weighted = (coeff.T @ coeff).to(delta) @ delta @ (psi @ psi.T).to(delta)
        energy: Tensor = (weighted * delta).sum((-2, -1))
        return energy.clamp_min(0)

    @torch.no_grad()
    def fix(self, code: Tensor) -> None:
        self.generator.set_static_output(code)

    @torch.no_grad()
    def scale_output(self, scale: Tensor, shift: Tensor) -> None:
        self.coeff.mul_(scale[:, None, None])
        self.bias = scaled_bias(self.bias, scale, shift, self.coeff)

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The generator's parameters; `coeff` and `static_atoms` are the factorized old weight."""
        yield from self.generator.named_parameters(prefix="generator")

    def output_weights(self) -> set[str]:
        return {"generator.expand.weight"}

    def macs(self, height: int, width: int) -> int:
        """Generator, atom synthesis, atom and coefficient convolution; folded static atoms as one plain convolution.

        Folding them (once per call, independent of the image size) is not counted.
        """
        g = self.geometry
        out_h, out_w = g.output_size(height, width)
        static = 0 if self.folds_static else len(self.static_atoms)
        operator = acda_macs(
            channels=g.in_channels,
            out_channels=g.out_channels,
            groups=g.groups,
            atoms=self.config.atoms,
            static=static,
            elements=len(self.psi),
            window=self.psi[0].numel(),
            pixels=out_h * out_w,
        )
        plain = g.macs(height, width) if self.folds_static else 0
        return self.generator.macs(height, width) + operator + plain


def _one_element_each(atoms: int, elements: int, width: int) -> Tensor:
    """Alpha (atoms, width) that makes atom i equal to basis element i (mod `elements`)."""
    alpha = torch.zeros(atoms, width, dtype=torch.float64)
    at = torch.arange(atoms)
    alpha[at, at % elements] = 1
    return alpha


def _decompose(
    source: ConvSource, config: ACDAConfig, calibration: Tensor | None, exact_calibration: Tensor | None
) -> Decomposition:
    """Exact, or truncated to the number of atoms that the config allows; on the CPU."""
    exact = decompose(source.weight.cpu())
    allowed = exact.rank if config.static_atoms is None else config.atoms + config.static_atoms
    if exact.rank <= allowed:
        return exact
    if calibration is None:
        return decompose(source.weight.cpu(), allowed)
    source = replace(source, weight=source.weight.cpu())
    return truncate_for_inputs(
        source, allowed, calibration.cpu(), None if exact_calibration is None else exact_calibration.cpu()
    )


def _take_over_flags(layer: ACDAConv2d, conv: nn.Conv2d) -> None:
    """Copy the training mode and the `requires_grad` of the old weight and bias."""
    layer.train(conv.training)
    for parameter in (layer.coeff, layer.static_atoms):
        parameter.requires_grad_(conv.weight.requires_grad)
    if layer.bias is not None and conv.bias is not None:
        layer.bias.requires_grad_(conv.bias.requires_grad)
