"""docs/architecture.md, "Adding a fourth layer": one class and its registration, and everything else takes it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import ConfigError
from surgeon.layers import registry
from surgeon.layers.base import CodedConv2d, LayerConfig, check_at_least, scaled_bias
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.source import ConvSource
from surgeon.search.space import SpaceConfig, make_space
from surgeon.zoo.finetune import FinetuneConfig, finetune
from tests.support.training.tasks import make_restorer, regression


@dataclass(frozen=True, kw_only=True)
class GainConfig(LayerConfig):
    hidden: int = 4

    def __post_init__(self) -> None:
        check_at_least(self, "hidden", 1)


class GainConv2d(CodedConv2d):
    """A convolution whose output channels have a factor 1 + g(x) at every pixel, g of two convolutions."""

    type_name = "gain"
    Config = GainConfig
    config: GainConfig

    def __init__(self, geometry: ConvGeometry, config: GainConfig) -> None:
        super().__init__(geometry, config)
        g = geometry
        self.kernel = nn.Parameter(torch.empty(g.weight_shape))
        self.bias = nn.Parameter(torch.empty(g.out_channels)) if g.bias else None
        self.squeeze = nn.Conv2d(g.in_channels, config.hidden, 1, g.stride)
        self.expand = nn.Conv2d(config.hidden, g.out_channels, 1)

    @classmethod
    def why_not(cls, geometry: ConvGeometry, config: LayerConfig) -> list[str]:
        return [] if geometry.kernel_size[0] % 2 else ["even kernels have no center"]

    @classmethod
    def from_conv(cls, conv: nn.Module | ConvSource, config: LayerConfig | None = None, **context: Any) -> Self:
        source = conv if isinstance(conv, ConvSource) else ConvSource.read(conv)
        config = config or GainConfig()
        assert isinstance(config, GainConfig)
        layer = cls(source.geometry, config).to(source.weight)
        layer.kernel.data = source.weight.clone()
        if layer.bias is not None:
            assert source.bias is not None
            layer.bias.data = source.bias.clone()
        nn.init.zeros_(layer.expand.weight)
        nn.init.zeros_(layer.expand.bias)
        return layer

    def adapt(self, x: Tensor) -> Tensor:
        plain = self.static_conv2d(x)
        bias = 0 if self.bias is None else self.bias[:, None, None]
        return (plain - bias) * (1 + self.code(x)) + bias

    def static_weight(self) -> Tensor:
        return self.kernel

    def new_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.squeeze.named_parameters("squeeze")
        yield from self.expand.named_parameters("expand")

    def macs(self, height: int, width: int) -> int:
        g = self.geometry
        p, q = g.output_size(height, width)
        return p * q * (self.kernel.numel() + self.config.hidden * (g.in_channels + g.out_channels))

    def scale_output(self, scale: Tensor, shift: Tensor) -> None:
        self.kernel.data.mul_(scale[:, None, None, None])
        self.bias = scaled_bias(self.bias, scale, shift, self.kernel)

    def code(self, x: Tensor) -> Tensor:
        return self.expand(self.signal(x))

    def signal(self, x: Tensor) -> Tensor:
        found: Tensor = self.squeeze(x)
        return found.relu()

    def energy_of(self, difference: Tensor) -> Tensor:
        return (difference.square() * self.kernel.detach().flatten(1).square().sum(1)).sum(-1)

    def constant_code(self) -> Tensor | None:
        return None if self.expand.weight.any() else self.expand.bias.detach()

    @torch.no_grad()
    def fix(self, code: Tensor) -> None:
        self.kernel.mul_((1 + code)[:, None, None, None])
        self.expand.weight.zero_()
        self.expand.bias.zero_()


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    registry.layer_types()
    registry.register(GainConv2d)
    yield
    del registry._TYPES["gain"]


def converted() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return surgeon.convert(make_restorer(), layers="all", type="gain", hidden=3, input_size=(3, 16, 16))


def test_convert_report_save_and_load(tmp_path: Path) -> None:
    model, report = converted()
    layers = surgeon.dynamic_layers(model)
    assert layers
    assert all(isinstance(layer, GainConv2d) for layer in layers.values())
    assert report.max_rel_error <= 1e-6
    assert "gain" in report.to_text()
    with torch.no_grad():
        next(iter(layers.values())).expand.bias.fill_(0.5)
    surgeon.save(model, tmp_path / "run", report=report)
    again = surgeon.load(tmp_path / "run", base=make_restorer())
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(again(x), model.eval()(x))


def test_cost_and_search_space() -> None:
    model, _ = converted()
    plain, ours = (surgeon.cost(m, input_size=(3, 16, 16)) for m in (make_restorer(), model))
    assert ours.params > plain.params
    assert ours.flops > plain.flops
    config = SpaceConfig(types=("gain", "acda"))
    assert "gain" in {option.type for option in config.make_options()}
    model = make_restorer()
    space = make_space(model, config, sites=surgeon.inspect(model, input_size=(3, 16, 16)))
    column = space.types.index("gain")
    assert space.allowed[:, column].all()
    table = surgeon.cost_table(model, space.options, input_size=(3, 16, 16))
    assert any(row.option == "gain" and row.flops > 0 and not row.reasons for row in table.rows)


def test_finetune_collapse_and_export(tmp_path: Path) -> None:
    model, _ = converted()
    tuned = finetune(model, regression(), FinetuneConfig(epochs=1, batch_size=4, max_steps=3, recalibrate=0)).model
    moved = [layer for layer in surgeon.dynamic_layers(tuned).values() if layer.expand.bias.any()]
    assert moved, "the new parameters learn"
    surgeon.export(tuned, tmp_path / "model.onnx", input_size=(3, 16, 16))
    for layer in moved:
        layer.expand.weight.data.zero_()
    x = torch.rand(2, 3, 16, 16)
    before = tuned.eval()(x)
    folded, report = surgeon.collapse(tuned, input_size=(3, 16, 16))
    assert report.folded
    assert torch.allclose(folded.eval()(x), before, atol=1e-5)


def test_geometries_and_options_that_it_refuses() -> None:
    torch.manual_seed(0)
    with pytest.raises(surgeon.SurgeonError, match="even kernels have no center"):
        surgeon.convert(nn.Sequential(nn.Conv2d(3, 4, 2)), layers="all", type="gain", input_size=(3, 8, 8))
    with pytest.raises(ConfigError, match="hidden must be an integer >= 1"):
        surgeon.convert(make_restorer(), layers="all", type="gain", hidden=0, input_size=(3, 16, 16))
