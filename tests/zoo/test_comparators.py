"""CondConv, DY-CNN and DFN: against their formulas, an image or a pixel at a time."""

import pytest
import torch
import torch.nn.functional as F

from surgeon.errors import ConfigError
from surgeon.zoo.comparators import CondConv2d, DyConv2d, DynamicFilterConv2d, MixedConv2d


@pytest.mark.parametrize("kind", [CondConv2d, DyConv2d])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}, {"bias": False, "experts": 3}]
)
def test_mixed_kernels(kind: type[MixedConv2d], options: dict[str, int]) -> None:
    layer = kind(4, 6, 3, **options).double()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    y = layer(x)
    for i in range(3):
        weights = layer.routing(x[i : i + 1].mean((2, 3)))[0]
        kernel = torch.einsum("e,eocxy->ocxy", weights, layer.kernels)
        bias = None if layer.bias is None else weights @ layer.bias
        settings = (
            options.get("stride", 1),
            options.get("padding", 0),
            options.get("dilation", 1),
            options.get("groups", 1),
        )
        torch.testing.assert_close(y[i], F.conv2d(x[i : i + 1], kernel, bias, *settings)[0])


def test_routing() -> None:
    average = torch.randn(5, 8)
    assert torch.equal(CondConv2d(8, 8, 3).routing(average) > 0, torch.ones(5, 8, dtype=torch.bool))
    attention = DyConv2d(8, 8, 3)
    assert attention.kernels.shape[0] == 4
    torch.testing.assert_close(attention.routing(average).sum(1), torch.ones(5))
    sharp = DyConv2d(8, 8, 3, temperature=0.01)
    sharp.load_state_dict(attention.state_dict())
    assert bool(sharp.routing(average).amax(1).min() > attention.routing(average).amax(1).max())


@pytest.mark.parametrize("groups", [1, 2])
def test_dynamic_filters(groups: int) -> None:
    layer = DynamicFilterConv2d(4, 5, 3, filter_groups=groups).double()
    torch.nn.init.normal_(layer.expand.weight, std=0.1)
    x = torch.randn(1, 4, 6, 7, dtype=torch.float64)
    filters = layer.expand(torch.tanh(layer.reduce(x)))
    padded = F.pad(x, (1, 1, 1, 1))
    expected = torch.empty_like(x)
    for row in range(6):
        for column in range(7):
            for channel in range(4):
                at = channel * groups // 4 * 9
                kernel = filters[0, at : at + 9, row, column].view(3, 3)
                expected[0, channel, row, column] = (
                    kernel * padded[0, channel, row : row + 3, column : column + 3]
                ).sum()
    torch.testing.assert_close(layer(x), layer.mix(expected))


def test_dynamic_filters_start_at_the_identity() -> None:
    layer = DynamicFilterConv2d(4, 4, 7)
    x = torch.randn(1, 4, 6, 7)
    torch.testing.assert_close(layer(x), layer.mix(x))


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="at least one expert"):
        CondConv2d(4, 4, 3, experts=0)
    with pytest.raises(ConfigError, match="odd kernels"):
        DynamicFilterConv2d(4, 4, 4)
    with pytest.raises(ConfigError, match="3 filters"):
        DynamicFilterConv2d(4, 4, 3, filter_groups=3)
