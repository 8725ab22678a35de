"""docs/architecture.md, "Adding a fourth layer": one class and its registration, and everything else takes it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.cli import main
from surgeon.errors import ConfigError
from surgeon.layers import registry
from surgeon.layers.base import CodedConv2d, LayerConfig, check_at_least, scaled_bias
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.source import ConvSource
from surgeon.records.recipe import Rule
from surgeon.records.report import growth_notes
from surgeon.search.space import SpaceConfig, make_space
from surgeon.zoo.finetune import FinetuneConfig, finetune
from surgeon.zoo.finetune.parameters import group_parameters
from surgeon.zoo.finetune.schedule import Temperature
from surgeon.zoo.surgery import operate
from surgeon.zoo.trial.plan import default_conversion
from tests.support.training.tasks import make_restorer, regression


@dataclass(frozen=True, kw_only=True)
class GainConfig(LayerConfig):
    symbols: ClassVar = {"hidden": "h"}
    search_defaults: ClassVar = ({"hidden": 2}, {"hidden": 3})
    compressed: ClassVar = {"hidden": 1}

    hidden: int = 4

    def __post_init__(self) -> None:
        check_at_least(self, "hidden", 1)


class GainConv2d(CodedConv2d):
    """A convolution whose output channels have a factor 1 + g(x) at every pixel, g of two convolutions."""

    type_name = "gain"
    fewer_parameters = "a smaller hidden"
    tasks = ("deblurring",)
    selects = True
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

    def selector_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.squeeze.named_parameters("squeeze")

    def no_weight_decay(self) -> set[str]:
        return {"expand.weight"}

    def anneal(self, factor: float) -> bool:
        self.factor = factor
        return True

    def start_untrained(self) -> None:
        nn.init.ones_(self.expand.bias)

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
    assert "gain h3" in report.to_text(120)
    growth = replace(report, params_after=10 * report.params_before)
    assert any("a smaller hidden" in note for note in growth_notes(growth))
    first, *others = report.replaced
    costly = replace(report, replaced=[replace(first, macs_after=6 * first.macs_before), *others])
    told = f"gain layers with 5 times the FLOPs of their convolutions or more: {first.name} (x6); a smaller hidden"
    assert any(note.startswith(told) for note in growth_notes(costly))
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
    assert {"gain(hidden=2)", "gain(hidden=3)"} < {option.label for option in SpaceConfig().make_options()}
    config = SpaceConfig(types=("gain", "acda"))
    model = make_restorer()
    space = make_space(model, config, sites=surgeon.inspect(model, input_size=(3, 16, 16)))
    column = space.types.index("gain")
    assert space.allowed[:, column].all()
    table = surgeon.cost_table(model, space.options, input_size=(3, 16, 16))
    assert any(row.option == "gain(hidden=2)" and row.flops > 0 and not row.reasons for row in table.rows)


@pytest.mark.long
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


def test_training_respects_what_the_layer_states() -> None:
    model, _ = converted()
    groups = {name: group for group in group_parameters(model) for name in group.parameters}
    assert {group.role for name, group in groups.items() if ".squeeze." in name} == {"selector"}
    assert {group.role for name, group in groups.items() if ".expand." in name} == {"new"}
    assert not any(group.decays for name, group in groups.items() if name.endswith("expand.weight"))
    assert Temperature(model, 0.25, 3).set(2) == 0.25
    assert {layer.factor for layer in surgeon.dynamic_layers(model).values()} == {0.25}
    assert default_conversion("deblurring")[0] == "gain"
    assert default_conversion("super-resolution") == ("pafu", ("last-spatial", "all"))
    scratch = operate(make_restorer(), [Rule(layers="all", type="gain", options={})], (3, 16, 16))
    assert all((layer.expand.bias == 1).all() for layer in scratch.modules() if isinstance(layer, GainConv2d))


def test_an_export_forgives_ties_if_the_layer_selects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = converted()
    runs: list[Tensor] = []

    def tied(x: Tensor) -> list[Tensor]:
        runs.append(x)
        return [model.eval()(x) + (len(runs) == 1)]

    monkeypatch.setattr("surgeon.exporting.export.read", lambda *_: tied)
    exported = surgeon.export(model, tmp_path / "model.pt2", format="torch", input_size=(3, 16, 16), free="none")
    assert [check.draws for check in exported.checks] == [2]


def test_compress_takes_the_options_that_the_config_states(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["zoo/resnet20_cifar", "--weights", "random", "--layers", "conv1"]
    assert main(["convert", *model, "--type", "gain", "--compress", "--dry-run", "--json"]) == 0
    (replaced,) = json.loads(capsys.readouterr().out)["replaced"]
    assert replaced["options"] == {"hidden": 1}


def test_geometries_and_options_that_it_refuses() -> None:
    torch.manual_seed(0)
    with pytest.raises(surgeon.SurgeonError, match="even kernels have no center"):
        surgeon.convert(nn.Sequential(nn.Conv2d(3, 4, 2)), layers="all", type="gain", input_size=(3, 8, 8))
    with pytest.raises(ConfigError, match="hidden must be an integer >= 1"):
        surgeon.convert(make_restorer(), layers="all", type="gain", hidden=0, input_size=(3, 16, 16))
