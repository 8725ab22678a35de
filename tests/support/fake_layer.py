"""A small dynamic layer for tests of the pass: the static convolution plus a generated per-pixel gain that starts at zero."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from surgeon.layers.base import DynamicConv2d, LayerConfig, check_at_least
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.source import ConvSource


@dataclass(frozen=True, kw_only=True)
class FakeConfig(LayerConfig):
    hidden: int = 4
    flaw: float = 0.0  # relative error that is built in
    keeps_gradient: bool = True

    def __post_init__(self) -> None:
        check_at_least(self, "hidden", 1)


class FakeConv2d(DynamicConv2d):
    type_name = "fake"
    Config = FakeConfig
    config: FakeConfig

    def __init__(self, geometry: ConvGeometry, config: LayerConfig) -> None:
        super().__init__(geometry, config)
        assert isinstance(config, FakeConfig)
        self.kernel = nn.Parameter(torch.empty(geometry.weight_shape))
        self.bias = nn.Parameter(torch.zeros(geometry.out_channels)) if geometry.bias else None
        self.reduce = nn.Linear(geometry.in_channels, config.hidden)
        self.expand = nn.Linear(config.hidden, geometry.out_channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    @classmethod
    def why_not(cls, geometry: ConvGeometry, config: LayerConfig) -> list[str]:
        return ["the fake layer wants no 7x7 kernels"] if geometry.kernel_size == (7, 7) else []

    @classmethod
    def from_conv(cls, conv: nn.Module | ConvSource, config: LayerConfig | None = None, **context: Any) -> Self:
        source = conv if isinstance(conv, ConvSource) else ConvSource.read(conv)
        config = config or FakeConfig()
        layer = cls(source.geometry, config).to(source.weight.device, source.weight.dtype)
        with torch.no_grad():
            layer.kernel.copy_(source.weight * (1 + config.flaw))
            if layer.bias is not None and source.bias is not None:
                layer.bias.copy_(source.bias)
        if isinstance(conv, nn.Module):
            layer.train(conv.training)
            trainable = any(p.requires_grad for p in conv.parameters())
            layer.kernel.requires_grad_(trainable)
        return layer

    def adapt(self, x: Tensor) -> Tensor:
        out = self.static_conv2d(x)
        gain = self.expand(torch.tanh(self.reduce(x.mean((2, 3)))))[:, :, None, None]
        return out + out * (gain if self.config.keeps_gradient else gain.detach())

    def static_weight(self) -> Tensor:
        return self.kernel

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix in ("reduce", "expand"):
            yield from self.get_submodule(prefix).named_parameters(prefix)

    def macs(self, height: int, width: int) -> int:
        return self.geometry.macs(height, width) + self.reduce.weight.numel() + self.expand.weight.numel()
