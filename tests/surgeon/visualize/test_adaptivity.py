"""How adaptive a layer is: what is measured, what is complained about, where it is shown."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from surgeon.layers import ACDAConfig, ACDAConv2d, ConvGeometry, PAFUConv2d, SEKGConv2d
from surgeon.layers.base import CodedConv2d
from surgeon.layers.norm import SignalNorm
from surgeon.visualize.adaptivity import Adaptivity, complaints, measure, observed
from surgeon.visualize.measures import content_share
from surgeon.zoo.finetune import finetune
from tests.support.layers.contract import plain_conv
from tests.support.training.runs import QUICK, rows, with_
from tests.support.training.tasks import converted, regression


def test_content_is_the_part_of_the_energy_that_varies_over_an_image() -> None:
    assert content_share(torch.full((2, 3, 4, 4), 0.5)) == pytest.approx(0, abs=1e-6)
    sign = torch.tensor([1.0, -1.0]).repeat(2, 3, 4, 2)
    assert content_share(sign) == pytest.approx(1)
    assert content_share(sign + 1) == pytest.approx(0.5)  # mean 1, standard deviation 1
    images = torch.stack([torch.ones(1, 2, 2), -torch.ones(1, 2, 2)])  # they differ, but nothing varies inside of them
    assert content_share(images) == pytest.approx(0, abs=1e-6)


def test_the_norm_lets_the_generator_see_small_features() -> None:
    """Small features (a hundredth) drown in the bias of the first convolution; normalized, they are most of the hidden map."""
    geometry = ConvGeometry(in_channels=8, out_channels=8, kernel_size=(3, 3), padding=(1, 1, 1, 1))
    x = 0.01 * torch.randn(4, 8, 16, 16)
    seen = {}
    for norm in (None, "batch"):
        torch.manual_seed(0)
        layer = ACDAConv2d(geometry, ACDAConfig(norm=norm, hidden=8)).train()
        layer(x)  # one batch, and eval mode sees it
        seen[norm] = measure("it", layer.eval(), x).content
    assert seen[None] < 0.01
    assert seen["batch"] > 0.9


def test_the_running_statistics_average_as_batch_norms_do_after_the_first_ten_batches() -> None:
    """Plain averages at first, then with the momentum; without one (as recalibration does) plain averages for ever."""
    batches = [torch.randn(4, 3, 5, 5) * k + k for k in range(1, 16)]
    means, variances = zip(*((b.mean((0, 2, 3)), b.var((0, 2, 3))) for b in batches), strict=True)
    for momentum in (0.1, None):
        norm = SignalNorm(3, momentum=momentum).train()
        mean, variance = torch.zeros(3), torch.ones(3)
        for n, batch in enumerate(batches, start=1):
            share = max(1 / n, momentum or 0)
            mean, variance = mean.lerp(means[n - 1], share), variance.lerp(variances[n - 1], share)
            norm(batch)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, variance)


@pytest.mark.parametrize("layer_type", [ACDAConv2d, PAFUConv2d, SEKGConv2d])
def test_every_type_is_measured_once_in_eval_mode(layer_type: type[CodedConv2d]) -> None:
    model = nn.Sequential(layer_type.from_conv(plain_conv()))
    x = torch.randn(2, 6, 9, 9)
    with observed(model.train()) as found:
        model(x)
        assert found == []
        model.eval()
        model(x)
        model(x)
    (layer,) = found
    assert (layer.name, layer.type) == ("0", layer_type.type_name)
    assert 0 <= layer.content <= 1
    assert (layer.saturated is None) == (layer_type is SEKGConv2d)
    assert not model[0]._forward_pre_hooks


def test_a_constant_code_has_distance_zero_and_a_random_selection_has_not() -> None:
    x = torch.randn(1, 6, 12, 12)
    assert measure("acda", ACDAConv2d.from_conv(plain_conv()).eval(), x).distance == pytest.approx(0, abs=1e-12)
    distance = measure("pafu", PAFUConv2d.from_conv(plain_conv()).eval(), x).distance
    assert distance is not None
    assert distance > 0.1


@pytest.mark.parametrize(
    ("content", "saturated", "said"),
    [(0.5, 0.1, None), (0.5, None, None), (0.001, 0.1, "blind"), (0.001, None, "blind"), (0.5, 0.95, "saturated")],
)
def test_blind_and_saturated_generators_are_complained_about(
    content: float, saturated: float | None, said: str | None
) -> None:
    one = Adaptivity(name="a.b", type="acda", content=content, saturated=saturated, distance=0.1)
    found = complaints([one, replace(one, name="c"), replace(one, name="d", content=0.5, saturated=None)])
    assert (found is None) == (said is None)
    assert said is None or (found is not None and found.startswith(f"the generator is {said} (") and "--" in found)
    size = "95%" if said == "saturated" else "0.1%"
    assert said is None or f" in a.b {size}, c {size}: " in str(found), "one text for all layers"
    normalized = complaints([replace(one, normalized=True)])
    assert (normalized is None) == (said is None)
    assert "norm=batch" not in str(normalized), "it has that already"
    assert "--recalibrate" not in str(normalized), "trials, where it is said too, do not have it"


def test_fine_tuning_logs_it_and_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = converted("acda", norm=None)
    for layer in model.modules():
        if isinstance(layer, ACDAConv2d):
            nn.init.zeros_(layer.generator.reduce.weight)  # nothing but its bias: as blind as can be
            layer.generator.reduce.weight.requires_grad_(False)
    finetune(model, regression(), QUICK, tmp_path / "run", quiet=False)
    told = [line for line in capsys.readouterr().err.splitlines() if "blind" in line]
    layers = [name for name, layer in model.named_modules() if isinstance(layer, ACDAConv2d)]
    assert len(told) == 1, "once, however many layers and evaluations there are"
    assert all(f"{name} " in told[0] for name in layers)
    logged = rows(tmp_path / "run", "layers")
    assert len(logged) > 1
    assert {layer["name"] for layer in logged[-1]["layers"]} == set(layers)
    events = EventAccumulator(str(tmp_path / "run" / "training" / "tensorboard"))
    events.Reload()
    assert f"adaptivity/{layers[0]}/content" in events.Tags()["scalars"]


def test_a_run_whose_generators_see_is_not_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(converted("acda"), regression(), with_(epochs=2), tmp_path / "run", quiet=False)
    assert "blind" not in capsys.readouterr().err
