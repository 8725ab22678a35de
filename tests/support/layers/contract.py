"""What the contract suite needs: random convolutions, layers made of them, and a counter of multiply-accumulates."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from surgeon.layers import ConvGeometry, ConvSource, DynamicConv2d, LayerConfig, layer_class
from surgeon.layers.ops.dispatch import Operator

# Options that keep a layer small, by name; a type takes those that it has.
SMALL: dict[str, Any] = {"hidden": 8, "group_size": 3}

# Kinds of layers beyond the types themselves: name -> (type, options).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "acda-separable": ("acda", {"generator": "separable"}),
    "acda-lowrank": ("acda", {"generator": "lowrank", "generator_rank": 5}),
    "acda-paper": ("acda", {"norm": None}),
    "sekg-paper": ("sekg", {"norm": None}),
    "pafu-paper": ("pafu", {"shared": False, "selection": "gumbel", "norm": None}),
}

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def class_of(kind: str) -> type[DynamicConv2d]:
    """The class of a layer type or variant."""
    return layer_class(VARIANTS.get(kind, (kind, {}))[0])


def small_config(kind: str, **options: Any) -> LayerConfig:
    """A config of this type or variant with few hidden channels and kernels."""
    config = class_of(kind).Config
    known = {field.name for field in fields(config)}
    options = VARIANTS.get(kind, (kind, {}))[1] | options
    return config(**{name: value for name, value in (SMALL | options).items() if name in known})


def random_source(geometry: ConvGeometry, dtype: torch.dtype = torch.float32, seed: int = 0) -> ConvSource:
    """A convolution of this geometry with normally distributed numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    bias = normal(geometry.out_channels) if geometry.bias else None
    return ConvSource(geometry=geometry, weight=normal(*geometry.weight_shape), bias=bias)


def random_input(source: ConvSource, *size: int, seed: int = 1) -> Tensor:
    """Normally distributed (N, C_in, H, W); `size` is (N, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    images, height, width = size
    shape = (images, source.geometry.in_channels, height, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(source.weight.dtype)


def make(type_name: str, source: nn.Module | ConvSource, **options: Any) -> DynamicConv2d:
    """The layer of this type in the place of a convolution; the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return class_of(type_name).from_conv(source, small_config(type_name, **options))


def plain_conv(**changes: Any) -> nn.Conv2d:
    """An ordinary 3×3 convolution, 6 → 8 channels; the same for the same arguments."""
    settings: dict[str, Any] = {"in_channels": 6, "out_channels": 8, "kernel_size": 3, "padding": 1} | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(**settings)


@torch.no_grad()
def awaken(layer: DynamicConv2d, scale: float = 0.3) -> DynamicConv2d:
    """Make the dynamic part do something, as training would: noise on all new parameters."""
    generator = torch.Generator().manual_seed(2)
    for _, parameter in layer.new_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(scale * noise.to(parameter))
    return layer


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest error as a part of the largest expected magnitude."""
    assert got.shape == expected.shape
    got, expected = got.detach(), expected.detach()
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[ConvGeometry, tuple[int, int]]:
    """Any convolution, and an input size (H, W) that it can take."""
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    groups, inputs, outputs = draw(st.sampled_from([(1, 3, 4), (1, 4, 2), (2, 2, 3), (3, 1, 1), (4, 1, 2), (1, 1, 3)]))
    mode = draw(st.sampled_from(PADDING_MODES))
    padding: Any = draw(st.one_of(st.tuples(*[st.integers(0, 3)] * 4), st.integers(0, 3).map(lambda p: (p,) * 4)))
    if mode == "zeros" and draw(st.integers(0, 5)) == 0:
        padding = "tf_same"
    geometry = ConvGeometry(
        in_channels=inputs * groups,
        out_channels=outputs * groups,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=draw(st.booleans()),
    )
    size = draw(st.tuples(st.integers(4, 11), st.integers(4, 11)))
    left, right, top, bottom = geometry.explicit_padding(*size)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    assume(size[0] + top + bottom >= spans[0])
    assume(size[1] + left + right >= spans[1])
    return geometry, size


# --- multiply-accumulates ------------------------------------------------------------------------------------------


class _CountMacs(TorchDispatchMode):
    """Counts convolutions, matrix products, and products of two tensors element by element (as in multiply-and-sum)."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func is aten.convolution.default:
            self.total += out.numel() * args[1][0].numel()
        elif func in (aten.mm.default, aten.bmm.default):
            self.total += out.numel() * args[0].shape[-1]
        elif func in (aten.addmm.default, aten.baddbmm.default):
            self.total += out.numel() * args[1].shape[-1]
        elif func is aten.mul.Tensor and all(isinstance(a, Tensor) and a.numel() > 1 for a in args[:2]):
            self.total += out.numel()
        return out


@contextmanager
def reference_operators() -> Iterator[None]:
    """Within it, every operator runs its reference."""

    def run(self: Operator, *args: Any, backend: str | None = None, **kwargs: Any) -> Tensor:
        return self.choose(*args, backend="reference", **kwargs).run(*args, **kwargs)

    with patch.object(Operator, "__call__", run):
        yield


def _count_by_running(layer: DynamicConv2d, height: int, width: int) -> int:
    """What the references do for a second image: work on the weights alone, once a call, does not count."""
    totals = []
    for images in (1, 2):
        x = torch.zeros(images, layer.geometry.in_channels, height, width, dtype=layer.weight.dtype)
        with torch.no_grad(), reference_operators(), _CountMacs() as counter:
            layer(x)
        totals.append(counter.total)
    return totals[1] - totals[0]


def _count_pafu(layer: DynamicConv2d, height: int, width: int) -> int:
    """Paper, eq. 2: one kernel at every output pixel, C_out·C/g·k·l; the selector: 1×1 on the input, 3×3 at every output pixel.

    The reference computes all n kernels and throws n - 1 away, so that it cannot be counted by running it.
    """
    g, config = layer.geometry, layer.config.to_dict()
    rows, columns = g.output_size(height, width)
    k_h, k_w = (max([own, *config["supports"]]) for own in g.kernel_size)
    applied = g.out_channels * (g.in_channels // g.groups) * k_h * k_w
    selector = config["hidden"] * 9 * config["group_size"]
    return (applied + selector) * rows * columns + g.in_channels * config["hidden"] * height * width


# By type, where running the reference and counting is not the count of the formula.
COUNTS: dict[str, Callable[[DynamicConv2d, int, int], int]] = {"pafu": _count_pafu}


def counted_macs(layer: DynamicConv2d, height: int, width: int) -> int:
    """Multiply-accumulates of the layer's formula for one image, counted without asking the layer."""
    return COUNTS.get(layer.type_name, _count_by_running)(layer, height, width)
