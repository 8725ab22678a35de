"""ConvGeometry and pad_for_window against torch's own convolutions; ConvSource against what the module computes."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from surgeon.errors import GeometryError, UnsupportedLayerError
from surgeon.layers.generator import PixelGenerator
from surgeon.layers.geometry import ConvGeometry, pad_for_window
from surgeon.layers.source import ConvSource

PROPERTY = settings(deadline=None, derandomize=True, max_examples=40)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[ConvGeometry, tuple[int, int]]:
    """A geometry of one channel and an input size that it can take."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    kernel, stride, dilation = draw(pairs(1, 5)), draw(pairs(1, 3)), draw(pairs(1, 2))
    if draw(st.booleans()):
        padding: tuple[int, int, int, int] | str = draw(st.tuples(*[st.integers(0, 3)] * 4))
    else:
        padding = "tf_same"
    mode = draw(st.sampled_from(PADDING_MODES)) if padding != "tf_same" else "zeros"
    size = tuple(d * (k - 1) + 4 + draw(st.integers(0, 5)) for k, d in zip(kernel, dilation, strict=True))
    geometry = ConvGeometry(
        in_channels=1,
        out_channels=1,
        kernel_size=kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        padding_mode=mode,
    )
    return geometry, (size[0], size[1])


@PROPERTY
@given(geometries(), st.integers(0, 2), st.integers(0, 2))
def test_a_larger_window_with_zeros_around_the_kernel_is_the_same_convolution(
    drawn: tuple[ConvGeometry, tuple[int, int]], more_h: int, more_w: int
) -> None:
    geometry, size = drawn
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    weight = torch.randn(1, 1, *geometry.kernel_size, dtype=torch.float64)
    expected = ConvSource(geometry=geometry, weight=weight, bias=None).conv2d(x)
    assert tuple(expected.shape[2:]) == geometry.output_size(*size)
    larger = F.pad(weight, (more_w, more_w, more_h, more_h))
    padded, padding = pad_for_window(x, geometry, (larger.shape[2], larger.shape[3]))
    got = F.conv2d(padded, larger, None, geometry.stride, padding, geometry.dilation)
    torch.testing.assert_close(got, expected)


@PROPERTY
@given(geometries(), pairs(1, 6))
def test_any_window_keeps_the_output_size(drawn: tuple[ConvGeometry, tuple[int, int]], window: tuple[int, int]) -> None:
    geometry, size = drawn
    padded, padding = pad_for_window(torch.randn(1, 1, *size), geometry, window)
    got = F.conv2d(padded, torch.randn(1, 1, *window), None, geometry.stride, padding, geometry.dilation)
    assert tuple(got.shape[2:]) == geometry.output_size(*size)


@PROPERTY
@given(geometries())
def test_the_generator_gives_the_convolutions_output_size_and_starts_constant(
    drawn: tuple[ConvGeometry, tuple[int, int]],
) -> None:
    geometry, size = drawn
    generator = PixelGenerator(geometry, 4, 3)
    generator.set_static_output(torch.tensor([1.0, -2.0, 3.0]))
    out = generator(torch.randn(2, 1, *size))
    assert tuple(out.shape) == (2, 3, *geometry.output_size(*size))
    assert torch.equal(out, generator.static_output[None, :, None, None].expand_as(out))


def test_generator_macs_are_those_of_its_two_convolutions() -> None:
    geometry = ConvGeometry(in_channels=5, out_channels=7, kernel_size=(5, 5), stride=(2, 2), padding=(2, 2, 2, 2))
    assert PixelGenerator(geometry, 64, 108).macs(9, 11) == 5 * 64 * 9 * 11 + 64 * 108 * 9 * 5 * 6


def test_common_case_leaves_the_input_alone() -> None:
    geometry = ConvGeometry(in_channels=1, out_channels=1, kernel_size=(3, 3), padding=(1, 1, 1, 1))
    x = torch.randn(1, 1, 8, 8)
    padded, padding = pad_for_window(x, geometry, (7, 7))
    assert padded is x
    assert padding == (3, 3)


def test_too_small_an_input_is_named() -> None:
    with pytest.raises(GeometryError, match="input of 2x9 is too small for a 3x3"):
        ConvGeometry(in_channels=1, out_channels=1, kernel_size=(3, 3)).output_size(2, 9)


def test_geometry_round_trips_through_plain_values() -> None:
    for padding in ((1, 2, 3, 4), "tf_same"):
        geometry = ConvGeometry(
            in_channels=4, out_channels=8, kernel_size=(3, 5), padding=padding, groups=2, bias=False
        )
        assert ConvGeometry.from_dict(geometry.to_dict()) == geometry


def sources() -> dict[str, nn.Module]:
    weight_norm = parametrizations.weight_norm(nn.Conv2d(4, 6, 3, padding=1))
    return {
        "plain": nn.Conv2d(4, 6, 3, stride=2, padding=1),
        "same": nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(1, 2), padding_mode="reflect"),
        "same, even": nn.Conv2d(4, 6, (3, 4), padding="same", padding_mode="replicate"),
        "valid": nn.Conv2d(4, 6, 3, padding="valid", bias=False),
        "circular": nn.Conv2d(4, 6, 3, padding=(0, 2), padding_mode="circular"),
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
        "Conv2dSame": timm.layers.Conv2dSame(4, 6, 3, stride=2),
        "StdConv2d": timm.layers.StdConv2d(4, 6, 3, padding=1),
        "StdConv2dSame": timm.layers.StdConv2dSame(4, 6, 3, stride=2),
        "ScaledStdConv2d": timm.layers.ScaledStdConv2d(4, 6, 3, padding=1),
        "weight_norm": weight_norm,
    }


@pytest.mark.parametrize("name", sources())
def test_source_computes_what_the_module_computes(name: str) -> None:
    torch.manual_seed(0)
    conv = sources()[name].eval()
    source = ConvSource.read(conv)
    for size in ((9, 12), (10, 11)):
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(source.conv2d(x), conv(x))


class _ConvReadingItsInput(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv1d(4, 4, 3), "not a 2-D convolution"),
        (nn.ConvTranspose2d(4, 4, 3), "not a 2-D convolution"),
        (_ConvReadingItsInput(4, 4, 3), "depends on the input"),
    ],
)
def test_source_refuses_with_a_reason(conv: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=reason):
        ConvSource.read(conv)
