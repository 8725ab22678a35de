"""ACDAConv2d: exact birth over all geometries, gradients, compress mode, config, state dict, dtypes, cost."""

import copy
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgeon.errors import ConfigError, GeometryError
from surgeon.layers.acda import ACDAConfig, ACDAConv2d
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.registry import layer_class
from surgeon.layers.source import ConvSource

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def relative(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).detach())


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, tuple[int, int]]:
    """A random convolution and an input size for it, odd or even."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    same = draw(st.booleans())
    padding: Any = "same" if same else draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    stride = (1, 1) if same else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    conv = nn.Conv2d(
        4,
        draw(st.sampled_from([4, 8])),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(PADDING_MODES)),
    )
    size = [d * (k - 1) + 4 + draw(st.integers(0, 5)) for k, d in zip(kernel, dilation, strict=True)]
    return conv.eval(), (size[0], size[1])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@PROPERTY
@given(convolutions(), st.integers(1, 7), st.integers(1, 4), st.sampled_from([torch.float32, torch.float64]))
def test_birth_is_exact(drawn: tuple[nn.Conv2d, tuple[int, int]], atoms: int, scales: int, dtype: torch.dtype) -> None:
    conv, size = drawn[0].to(dtype), drawn[1]
    layer = ACDAConv2d.from_conv(conv, ACDAConfig(atoms=atoms, scales=scales, hidden=4))
    x = torch.randn(2, 4, *size, dtype=dtype)
    expected = conv(x)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    got = layer(x)
    assert got.dtype == dtype
    assert relative(got, expected) <= tolerance
    assert relative(layer.static_conv2d(x), expected) <= tolerance
    assert not layer.training


@pytest.mark.parametrize(
    "conv",
    [
        timm.layers.Conv2dSame(4, 6, 3, stride=2),
        timm.layers.StdConv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 32, 7, stride=2, padding=3),
        nn.Conv2d(4, 4, 11, padding=5, groups=4),
        nn.Conv2d(4, 6, (1, 7), padding=(0, 3)),
    ],
    ids=["Conv2dSame", "StdConv2d", "stem", "large depthwise", "one-dimensional"],
)
def test_birth_is_exact_for_what_models_have(conv: nn.Conv2d) -> None:
    conv.eval()
    layer = ACDAConv2d.from_conv(conv)
    for size in ((13, 16), (17, 15)):
        x = torch.randn(2, 4, *size)
        assert relative(layer(x), conv(x)) <= 1e-5


def test_defaults_are_the_papers_and_what_exactness_needs() -> None:
    layer = ACDAConv2d.from_conv(nn.Conv2d(64, 64, 3, padding=1))
    assert (layer.config.atoms, layer.config.scales, layer.config.basis_size, layer.config.hidden) == (6, 3, 6, 64)
    assert (layer.config.static_atoms, layer.config.extra_elements) == (3, 3)
    assert tuple(layer.psi.shape) == (21, 7, 7)
    assert tuple(layer.generator.expand.weight.shape) == (6 * 21, 64, 3, 3)
    assert layer_class("acda") is ACDAConv2d


CASES = {
    "dense 3x3": nn.Conv2d(24, 24, 3, padding=1),
    "depthwise, folded static atoms": nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "pointwise": nn.Conv2d(8, 8, 1),
    "fewer atoms than m": nn.Conv2d(8, 8, 2, stride=2),
    "5x5, grouped, no bias": nn.Conv2d(8, 16, 5, padding=2, groups=2, bias=False),
}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_learns_within_two_steps(name: str) -> None:
    torch.manual_seed(0)
    layer = ACDAConv2d.from_conv(copy.deepcopy(CASES[name])).train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    x = torch.randn(4, layer.geometry.in_channels, 9, 11)
    target = torch.randn_like(layer(x))
    moved: set[str] = set()
    for _ in range(2):
        optimizer.zero_grad()
        F.mse_loss(layer(x), target).backward()
        moved |= {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.norm() > 0}
        optimizer.step()
    assert moved == {name for name, p in layer.named_parameters() if p.numel()}


def test_atoms_that_the_kernel_does_not_fill_can_grow() -> None:
    layer = ACDAConv2d.from_conv(nn.Conv2d(8, 8, 2, stride=2))
    assert layer.config.static_atoms == 0
    layer(torch.randn(2, 8, 8, 8)).square().sum().backward()
    assert layer.coeff.grad is not None
    assert torch.all(layer.coeff[:, :, 4:] == 0)
    assert torch.all(layer.coeff.grad[:, :, 4:].flatten(0, 1).norm(dim=0) > 0)


@pytest.mark.parametrize("name", ["dense 3x3", "depthwise, folded static atoms"])
def test_gradcheck_of_the_layer(name: str) -> None:
    torch.manual_seed(0)
    small = nn.Conv2d(2, 2, 3, padding=1, groups=2 if "depthwise" in name else 1).double()
    layer = ACDAConv2d.from_conv(small, ACDAConfig(atoms=1, scales=1, basis_size=2, hidden=2, extra_elements=1))
    nn.init.normal_(layer.generator.expand.weight, std=0.3)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return out

    assert torch.autograd.gradcheck(run, (x, *values))


def trained_a_little(layer: ACDAConv2d) -> ACDAConv2d:
    """With a generator that varies from pixel to pixel."""
    nn.init.normal_(layer.generator.expand.weight, std=0.1)
    return layer


@pytest.mark.parametrize("name", CASES)
def test_state_dict_rebuilds_the_layer(name: str) -> None:
    layer = trained_a_little(ACDAConv2d.from_conv(CASES[name]))
    again = type(layer)(layer.geometry, ACDAConfig.from_dict(layer.config.to_dict()))
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, layer.geometry.in_channels, 9, 9)
    assert torch.equal(again(x), layer(x))
    assert again.config == layer.config


def test_adaptive_off_is_the_static_convolution() -> None:
    layer = trained_a_little(ACDAConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1)))
    x = torch.randn(2, 4, 9, 9)
    assert relative(layer(x), layer.static_conv2d(x)) > 1e-3
    layer.adaptive = False
    assert torch.equal(layer(x), layer.static_conv2d(x))


def test_dynamic_filters_reach_over_the_whole_window() -> None:
    layer = ACDAConv2d.from_conv(nn.Conv2d(2, 2, 3, padding=1))
    x = torch.randn(1, 2, 9, 9)
    before = layer(x)[0, :, 4, 4]
    x[0, :, 4, 1] += 1  # three pixels away: outside the kernel, inside the 7×7 window, seen by no generator window
    assert torch.allclose(layer(x)[0, :, 4, 4], before, atol=1e-6)
    with torch.no_grad():
        layer.generator.static_output.add_(0.1)
    moved = layer(x)[0, :, 4, 4]
    x[0, :, 4, 1] += 1
    assert not torch.allclose(layer(x)[0, :, 4, 4], moved, atol=1e-4)


def test_compress_drops_static_atoms_and_uses_the_calibration() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1)
    smooth = F.avg_pool2d(torch.randn(8, 16, 14, 14), 3, 1, 1)
    config = ACDAConfig(atoms=4, static_atoms=0)
    plain, aware = ACDAConv2d.from_conv(conv, config), ACDAConv2d.from_conv(conv, config, calibration=smooth)
    assert plain.config.static_atoms == aware.config.static_atoms == 0
    assert plain.macs(14, 14) < ACDAConv2d.from_conv(conv, ACDAConfig(atoms=4)).macs(14, 14)
    errors = [relative(layer(smooth), conv(smooth)) for layer in (plain, aware)]
    assert errors[1] < 0.8 * errors[0]
    assert errors[0] > 0.05
    exact = ACDAConv2d.from_conv(conv, ACDAConfig(atoms=9, static_atoms=0), calibration=smooth)
    assert relative(exact(smooth), conv(smooth)) <= 1e-5


def test_fewer_extra_elements_make_an_approximate_birth() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    layer = ACDAConv2d.from_conv(conv, ACDAConfig(extra_elements=1))
    assert layer.config.extra_elements == 1
    assert relative(layer(torch.ones(1, 16, 9, 9)), conv(torch.ones(1, 16, 9, 9))) > 1e-3


@pytest.mark.parametrize("name", ["atoms", "scales", "basis_size", "hidden"])
def test_options_of_zero_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be an integer >= 1, got 0"):
        ACDAConfig(**{name: 0})


@pytest.mark.parametrize(
    ("name", "value"), [("static_atoms", -1), ("extra_elements", 1.5), ("atoms", True), ("atoms", "6")]
)
def test_options_of_a_wrong_kind_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        ACDAConfig(**{name: value})


def test_inputs_that_do_not_fit_are_named() -> None:
    layer = ACDAConv2d.from_conv(nn.Conv2d(4, 4, 3))
    with pytest.raises(GeometryError, match=r"expects an input \(N, 4, H, W\), got \(1, 3, 8, 8\)"):
        layer(torch.randn(1, 3, 8, 8))
    with pytest.raises(GeometryError, match="too small"):
        layer(torch.randn(1, 4, 2, 2))


def test_no_images_give_no_output() -> None:
    layer = ACDAConv2d.from_conv(nn.Conv2d(4, 6, 3, stride=2))
    assert tuple(layer(torch.randn(0, 4, 9, 9)).shape) == (0, 6, 4, 4)


def test_built_from_scratch_it_is_the_papers_layer() -> None:
    geometry = ConvGeometry(in_channels=16, out_channels=8, kernel_size=(7, 7), padding=(3, 3, 3, 3))
    layer = ACDAConv2d(geometry)
    assert (layer.config.static_atoms, layer.config.extra_elements) == (0, 0)
    assert tuple(layer.psi.shape) == (18, 7, 7)
    y = layer(torch.randn(2, 16, 9, 9))
    assert 0.1 < float(y.detach().std()) < 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    layer = ACDAConv2d.from_conv(conv.to(dtype))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = torch.randn(2, 8, 9, 9, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    assert relative(y.float(), conv.float()(x.float())) < 20 * torch.finfo(dtype).eps
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("name", CASES)
def test_autocast_gives_autocasts_dtype_as_the_convolution_does(name: str) -> None:
    conv = CASES[name]
    layer = ACDAConv2d.from_conv(conv)
    x = torch.randn(2, conv.in_channels, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), conv(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert relative(y.float(), expected.float()) < 0.03
    y.float().sum().backward()
    assert layer.coeff.grad is not None
    assert layer.coeff.grad.dtype == torch.float32


def test_channels_last_input() -> None:
    layer = trained_a_little(ACDAConv2d.from_conv(nn.Conv2d(8, 8, 3, padding=1)))
    x = torch.randn(2, 8, 9, 9)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, layer(x), rtol=1e-4, atol=1e-5)


def test_compiles_to_one_graph() -> None:
    layer = trained_a_little(ACDAConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1, groups=2)))
    x = torch.randn(2, 4, 7, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), layer(x))


def test_flags_of_the_convolution_are_taken_over() -> None:
    conv = nn.Conv2d(4, 4, 3).train()
    conv.weight.requires_grad_(False)
    layer = ACDAConv2d.from_conv(conv)
    assert layer.training
    assert not layer.coeff.requires_grad
    assert not layer.static_atoms.requires_grad
    assert layer.bias is not None
    assert layer.bias.requires_grad
    assert all(p.requires_grad for _, p in layer.new_parameters())
    assert {name for name, _ in layer.new_parameters()} < {name for name, _ in layer.named_parameters()}


def test_the_convolution_is_not_changed() -> None:
    conv = nn.Conv2d(4, 4, 3)
    before = copy.deepcopy(conv.state_dict())
    layer = ACDAConv2d.from_conv(ConvSource.read(conv))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())


def test_macs_of_a_dense_layer_by_hand() -> None:
    # 64 → 128, 3×3, stride 2, 9×11 → 5×6; m = 6, r = 3, K = 21, window 7×7.
    layer = ACDAConv2d.from_conv(nn.Conv2d(64, 128, 3, stride=2, padding=1))
    assert not layer.folds_static
    pixels = 5 * 6
    generator = 64 * 64 * 9 * 11 + 9 * 64 * (6 * 21) * pixels
    atoms = 6 * 21 * 49 * pixels
    assert layer.macs(9, 11) == generator + atoms + (64 * 9 * 49 + 128 * 64 * 9) * pixels


def test_macs_of_a_depthwise_layer_count_static_atoms_as_one_convolution() -> None:
    # Filtering 32 channels with 3 static atoms in a 7×7 window is dearer than one depthwise 3×3 convolution.
    layer = ACDAConv2d.from_conv(nn.Conv2d(32, 32, 3, padding=1, groups=32))
    assert layer.folds_static
    pixels = 8 * 8
    generator = 32 * 64 * pixels + 9 * 64 * (6 * 21) * pixels
    operator = (6 * 21 * 49 + 32 * 6 * 49 + 32 * 6) * pixels
    assert layer.macs(8, 8) == generator + operator + 32 * 9 * pixels
