"""Calibration of compressed layers on a whole network."""

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import ConfigError, InputError
from surgeon.sites.inputs import Inputs
from surgeon.surgery.running import halves_agree


class Chain(nn.Module):
    """Five convolutions in a row, the third one used twice; `mixing` lets images of a batch see each other."""

    def __init__(self, *, mixing: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 12, 12, 3, padding=1) for i in range(5))
        self.mixing = mixing

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = torch.relu(conv(x)) + (x if i else 0)
            if i == 2:
                x = torch.relu(conv(x))
            if self.mixing:
                x = x + x[::2].mean() * torch.arange(len(x)).view(-1, 1, 1, 1)
        return x


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.avg_pool2d(torch.randn(count, 3, 20, 20, generator=generator), 3, 1)


def output_error(original: nn.Module, converted: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = original(x)
        return float((converted(x) - y).norm() / y.norm())


def compressed(model: nn.Module, calibration: Tensor | None) -> nn.Module:
    return surgeon.convert(
        model,
        layers="all",
        type="acda",
        atoms=3,
        static_atoms=0,
        example_inputs=torch.randn(2, 3, 18, 18),
        calibration=calibration,
    )[0]


@pytest.mark.parametrize("mixing", [False, True])
def test_calibrated_networks_lose_less_on_images_they_have_not_seen(mixing: bool) -> None:
    torch.manual_seed(0)
    model = Chain(mixing=mixing).eval()
    unseen = images(6, seed=2)
    plain = output_error(model, compressed(model, None), unseen)
    aware = output_error(model, compressed(model, images(16, seed=1)), unseen)
    assert aware < (0.9 if mixing else 0.6) * plain


def test_two_streams_only_where_images_are_independent() -> None:
    names = [f"convs.{i}" for i in range(5)]
    for mixing in (False, True):
        pairs = Inputs(args=(images(4, seed=1),)).twice()
        assert pairs is not None
        assert pairs.args[0].shape == (8, 3, 18, 18)
        assert halves_agree(Chain(mixing=mixing), names, pairs) is not mixing


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = Chain().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = compressed(model, images(4, seed=1))
    assert model.training
    assert converted.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(InputError, match="does not run"):
        compressed(model, torch.randn(2, 5, 8, 8))


def test_inputs_that_cannot_be_doubled() -> None:
    assert Inputs(kwargs={"x": torch.zeros(1, 3, 4, 4)}).twice() is None
    listed = Inputs(args=([torch.zeros(3, 4, 4)],)).twice()
    assert listed is not None
    assert len(listed.args[0]) == 2


def test_images_that_nothing_is_fitted_to_are_refused_unless_compression_was_asked_for() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ConfigError, match="calibration fits layers to the images where they compress"):
        surgeon.convert(model, layers="all", type="acda", example_inputs=x, calibration=x)
    _, report = surgeon.convert(
        model, layers="all", type="acda", atoms=9, static_atoms=0, example_inputs=x, calibration=x
    )
    assert report.exact
