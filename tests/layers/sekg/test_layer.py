"""SEKG, DConv2d and SEKGConv2d: exact birth, learning, sharing, modes, costs."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from surgeon.errors import ConfigError, GeometryError, UnsupportedLayerError
from surgeon.layers.geometry import ConvGeometry
from surgeon.layers.registry import layer_class
from surgeon.layers.sekg import SEKGConfig, SEKGConv2d
from surgeon.layers.sekg.dconv import SEKG, DConv2d
from surgeon.layers.sekg.factors import factorise
from surgeon.layers.sekg.layer import full_rank
from surgeon.layers.source import ConvSource

FEW = settings(max_examples=30, deadline=None, derandomize=True)
MODES = ["auto", "dense", "factorised"]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[ConvSource, tuple[int, ...]]:
    """A convolution of any geometry in float64, and the shape of an input that it can take."""
    groups = draw(st.sampled_from([1, 2, 4]))
    inputs = groups * draw(st.integers(1, 3))
    outputs = groups * draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    size = [d * (k - 1) + 4 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation, strict=True)]
    geometry = ConvGeometry(
        in_channels=inputs,
        out_channels=outputs,
        kernel_size=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        dilation=dilation,
        padding=draw(st.one_of(st.just("tf_same"), st.tuples(*[st.integers(0, 3)] * 4))),
        groups=groups,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )
    # torch itself cannot reflect or wrap by more than the image holds
    assume(geometry.padding_mode == "zeros" or max(geometry.explicit_padding(size[0], size[1])) < min(size))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    bias = torch.randn(outputs, dtype=torch.float64) if geometry.bias else None
    source = ConvSource(geometry=geometry, weight=torch.randn(geometry.weight_shape, dtype=torch.float64), bias=bias)
    return source, (2, inputs, *size)


def in_dtype(source: ConvSource, dtype: torch.dtype) -> ConvSource:
    bias = None if source.bias is None else source.bias.to(dtype)
    return ConvSource(geometry=source.geometry, weight=source.weight.to(dtype), bias=bias)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).norm() / expected.norm()).detach())


def make(mode: str = "auto", *, depthwise: bool = False, seed: int = 0, **options: Any) -> tuple[nn.Conv2d, SEKGConv2d]:
    torch.manual_seed(seed)
    conv = nn.Conv2d(6, 12, 3, padding=1, groups=6 if depthwise else 1)
    return conv, SEKGConv2d.from_conv(conv, SEKGConfig(mode=mode, **options))


KINDS: list[dict[str, Any]] = [
    {"mode": "depthwise", "depthwise": True},
    {"mode": "depthwise", "depthwise": True, "kernel_groups": 3},
    {"mode": "dense"},
    {"mode": "dense", "kernel_groups": 4, "kernel_size": 2},
    {"mode": "factorised"},
    {"mode": "factorised", "kernel_groups": 54},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))


class TestBirth:
    @FEW
    @given(case=convolutions(), mode=st.sampled_from(MODES), kernel_size=st.integers(1, 4))
    def test_equals_the_convolution_for_every_geometry(
        self, case: tuple[ConvSource, tuple[int, ...]], mode: str, kernel_size: int
    ) -> None:
        source, shape = case
        x = torch.randn(shape, dtype=torch.float64)
        for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            conv = in_dtype(source, dtype)
            layer = SEKGConv2d.from_conv(conv, SEKGConfig(mode=mode, kernel_size=kernel_size)).eval()
            expected = conv.conv2d(x.to(dtype))
            for adaptive in (True, False):
                layer.adaptive = adaptive
                got = layer(x.to(dtype))
                assert got.shape == expected.shape
                assert relative_error(got.double(), source.conv2d(x)) <= bound
            # what remains when the dynamic part is off, as one convolution
            assert layer.static_is_exact()
            plain = ConvSource(geometry=source.geometry, weight=layer.static_weight(), bias=layer.static_bias())
            assert relative_error(plain.conv2d(x.to(dtype)), expected) <= bound

    @kinds
    def test_reads_modules(self, kind: dict[str, Any]) -> None:
        conv, layer = make(**kind)
        x = torch.randn(2, 6, 9, 7)
        assert relative_error(layer(x), conv(x)) < 1e-5
        assert isinstance(layer, layer_class("sekg"))
        assert (layer.in_channels, layer.out_channels, layer.stride, layer.padding) == (6, 12, (1, 1), (1, 1))

    def test_takes_over_mode_dtype_and_requires_grad(self) -> None:
        conv = nn.Conv2d(4, 4, 3).double().eval()
        conv.weight.requires_grad_(False)
        for mode in ("dense", "factorised"):
            layer = SEKGConv2d.from_conv(conv, SEKGConfig(mode=mode))
            new = dict(layer.new_parameters())
            assert not layer.training
            assert not layer.dconv.training
            for name, parameter in layer.named_parameters():
                assert parameter.dtype == torch.float64
                assert parameter.requires_grad == (name in new or name == "bias")

    def test_channels_last_batch_zero_and_odd_sizes(self) -> None:
        for mode in MODES:
            conv, layer = make(mode)
            x = torch.randn(2, 6, 7, 5).to(memory_format=torch.channels_last)
            assert relative_error(layer(x), conv(x)) < 1e-5
            assert layer(torch.zeros(0, 6, 7, 5)).shape == (0, 12, 7, 5)
            assert layer(torch.randn(1, 6, 1, 1)).shape == (1, 12, 1, 1)


class TestLearning:
    @kinds
    def test_the_last_weight_learns_at_step_one_and_the_branches_at_step_two(self, kind: dict[str, Any]) -> None:
        _, layer = make(**kind)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        x, target = torch.randn(2, 6, 8, 8), torch.randn(2, 12, 8, 8)
        moved = []
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(layer(x), target).backward()
            moved.append({name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()})
            optimizer.step()
        new = {name for name, _ in layer.new_parameters()}
        assert "dconv.generator.weight" in moved[0]
        assert new <= moved[1]
        assert {name for name, _ in layer.named_parameters()} <= moved[1]

    def test_the_generated_kernels_differ_from_pixel_to_pixel_once_trained(self) -> None:
        _, layer = make("dense")
        with torch.no_grad():
            layer.dconv.generator.weight.normal_()
        kernels = layer.dconv.generator(torch.randn(1, 12, 5, 5))
        assert kernels.shape == (1, 12 * 9, 5, 5)
        assert bool((kernels.std(dim=(2, 3)) > 0).all())

    def test_adaptive_off_ignores_what_the_generator_learned(self) -> None:
        for kind in KINDS:
            conv, layer = make(**kind)
            with torch.no_grad():
                layer.dconv.generator.weight.normal_()
            x = torch.randn(1, 6, 5, 5)
            assert relative_error(layer(x), conv(x)) > 0.01
            layer.adaptive = False
            assert relative_error(layer(x), conv(x)) < 1e-5


class TestSharing:
    def test_channels_of_a_group_share_their_generated_kernels(self) -> None:
        torch.manual_seed(0)
        dconv = DConv2d.same(4, kernel_groups=2)
        with torch.no_grad():
            dconv.static.zero_()
            dconv.generator.weight.normal_()
        x = torch.randn(1, 4, 6, 6)
        kernels = dconv.generator(x).view(1, 2, 9, 6, 6)
        patches = F.unfold(x, 3, padding=1).view(1, 4, 9, 6, 6)
        expected = (patches * kernels.repeat_interleave(2, dim=1)).sum(2)
        torch.testing.assert_close(dconv(x), expected)
        assert dconv.generator.weight.shape == (18, 4)

    def test_factorised_shares_among_the_channels_of_an_input_channel(self) -> None:
        _, layer = make("factorised")
        assert layer.config.kernel_groups == 6
        assert layer.config.multiplier == 9
        with torch.no_grad():
            layer.dconv.static.zero_()
            layer.dconv.generator.weight.normal_()
        stage = layer.dconv(torch.randn(1, 6, 5, 5)).view(6, 9, 5, 5)
        torch.testing.assert_close(stage, stage[:, :1].expand_as(stage))

    def test_the_number_of_kernels_is_resolved(self) -> None:
        assert make(depthwise=True)[1].config == SEKGConfig(mode="depthwise", kernel_groups=12)
        assert make()[1].config == SEKGConfig(mode="dense", kernel_groups=12)


class TestFactorisation:
    def test_full_rank_is_exact_and_lower_rank_is_the_best_approximation(self) -> None:
        torch.manual_seed(0)
        weight = torch.randn(8, 3, 3, 3, dtype=torch.float64)
        geometry = geometry_of(weight.shape)
        assert full_rank(geometry) == 8
        errors = []
        for rank in (2, 5, 8):
            layer = SEKGConv2d.from_conv(
                ConvSource(geometry=geometry, weight=weight, bias=None),
                SEKGConfig(mode="factorised", multiplier=rank),
            )
            errors.append(float((layer.static_weight().detach() - weight).norm()))
            tail = torch.linalg.svdvals(weight.transpose(0, 1).reshape(3, 8, 9))[:, rank:]
            assert errors[-1] == pytest.approx(float(tail.norm()), abs=1e-10)
        assert errors[0] > errors[1] > errors[2]

    def test_a_multiplier_beyond_the_rank_is_cut(self) -> None:
        assert make("factorised", multiplier=50)[1].config.multiplier == 9

    @pytest.mark.parametrize("shape", [(8, 3, 3, 3), (12, 3, 3, 3)])
    def test_weights_of_low_rank_and_of_nothing_are_exact(self, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        weight = torch.zeros(shape, dtype=torch.float64)
        weight[:, 1] = torch.randn(shape[0], 1, 1) * torch.randn(3, 3)
        weight[:, 2] = torch.randn(shape[0], 3, 3) * torch.logspace(-14, 0, 9).view(3, 3)
        source = ConvSource(geometry=geometry_of(shape), weight=weight, bias=None)
        layer = SEKGConv2d.from_conv(source, SEKGConfig(mode="factorised"))
        torch.testing.assert_close(layer.static_weight().detach(), weight, rtol=0, atol=1e-14)
        assert all(bool(p.isfinite().all()) for p in layer.parameters())

    def test_factors_have_the_stated_shapes(self) -> None:
        depthwise, pointwise = factorise(torch.randn(8, 3, 3, 2), groups=2, multiplier=4)
        assert depthwise.shape == (24, 1, 3, 2)
        assert pointwise.shape == (8, 12, 1, 1)


def geometry_of(shape: Sequence[int]) -> ConvGeometry:
    return ConvGeometry(in_channels=shape[1], out_channels=shape[0], kernel_size=(shape[2], shape[3]), bias=False)


class TestStaticWeight:
    """A dense layer whose static kernels have left the identity."""

    def trained(self, kernel_size: int = 3, **conv: Any) -> SEKGConv2d:
        torch.manual_seed(0)
        layer = SEKGConv2d.from_conv(nn.Conv2d(3, 4, 3, **conv), SEKGConfig(kernel_size=kernel_size))
        with torch.no_grad():
            layer.dconv.static.normal_()
        layer.adaptive = False
        return layer.double()

    @pytest.mark.parametrize("kernel_size", [2, 3, 5])
    @pytest.mark.parametrize(
        "conv", [{}, {"stride": 2}, {"stride": (1, 2), "padding": 1}, {"stride": 2, "dilation": 2}]
    )
    def test_is_the_composition_away_from_the_border(self, conv: dict[str, Any], kernel_size: int) -> None:
        layer = self.trained(kernel_size, **conv)
        x = torch.randn(1, 3, 40, 40, dtype=torch.float64)
        composed = super(SEKGConv2d, layer).static_conv2d(x)
        assert not layer.static_is_exact()
        torch.testing.assert_close(composed[..., 5:-5, 5:-5], layer(x)[..., 5:-5, 5:-5])
        assert not torch.allclose(composed, layer(x))

    def test_is_exact_where_only_the_center_was_scaled(self) -> None:
        layer = self.trained(padding=1)
        with torch.no_grad():
            layer.dconv.static[..., 0] = layer.dconv.static[..., 2] = 0
            layer.dconv.static[..., 0, 1] = layer.dconv.static[..., 2, 1] = 0
        x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
        assert layer.static_is_exact()
        assert layer.static_weight().shape == (4, 3, 3, 3)
        torch.testing.assert_close(super(SEKGConv2d, layer).static_conv2d(x), layer(x))

    def test_says_where_there_is_no_such_convolution(self) -> None:
        with pytest.raises(UnsupportedLayerError, match="stride 1 and dilation 2"):
            self.trained(dilation=2).static_weight()

    @kinds
    def test_is_differentiable(self, kind: dict[str, Any]) -> None:
        _, layer = make(**kind)
        layer.static_weight().sum().backward()
        assert layer.dconv.static.grad is not None


class TestStateAndRefusals:
    @kinds
    def test_state_dict_round_trip(self, kind: dict[str, Any]) -> None:
        _, layer = make(**kind)
        with torch.no_grad():
            layer.dconv.generator.weight.normal_()
        config = SEKGConfig.from_dict(layer.config.to_dict())
        again = type(layer)(ConvGeometry.from_dict(layer.geometry.to_dict()), config)
        again.load_state_dict(layer.state_dict())
        x = torch.randn(1, 6, 5, 5)
        assert torch.equal(again(x), layer(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))

    def test_kernel_groups_that_do_not_fit_name_those_that_do(self) -> None:
        geometry = ConvGeometry(in_channels=6, out_channels=12, kernel_size=(3, 3))
        assert SEKGConv2d.why_not(geometry, SEKGConfig(kernel_groups=4)) == []
        reason = "5 kernel groups do not divide 12 input channels (4 or 6 would)"
        assert SEKGConv2d.why_not(geometry, SEKGConfig(kernel_groups=5)) == [reason]
        factorised = SEKGConfig(mode="factorised", kernel_groups=99)
        reason = "99 kernel groups do not divide 6 input and 54 output channels (54 would)"
        assert SEKGConv2d.why_not(geometry, factorised) == [reason]
        with pytest.raises(UnsupportedLayerError, match="5 kernel groups do not divide"):
            SEKGConv2d(geometry, SEKGConfig(kernel_groups=5))

    def test_depthwise_mode_refuses_a_dense_convolution(self) -> None:
        with pytest.raises(UnsupportedLayerError, match="1 groups for 6 input channels") as caught:
            make("depthwise")
        assert len(caught.value.reasons) == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kernel_size": 0}, "kernel_size must be an integer >= 1, got 0"),
            ({"kernel_groups": 0}, "kernel_groups must be an integer >= 1, got 0"),
            ({"mode": "factorised", "multiplier": 0}, "multiplier must be an integer >= 1, got 0"),
            ({"mode": "sparse"}, "one of auto, depthwise, dense, factorised, got 'sparse'"),
            ({"multiplier": 4}, "multiplier belongs to mode 'factorised', got mode 'auto'"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            SEKGConfig(**options)

    def test_bad_inputs_and_modules(self) -> None:
        _, layer = make()
        with pytest.raises(GeometryError, match=r"\(N, 6, H, W\), got \(1, 5, 4, 4\)"):
            layer(torch.zeros(1, 5, 4, 4))
        with pytest.raises(GeometryError, match="expected groups=6, got 1"):
            DConv2d(ConvGeometry(in_channels=6, out_channels=6, kernel_size=(3, 3)))
        with pytest.raises(GeometryError, match=r"4 kernel groups do not divide 6 input channels \(3 or 6 would\)"):
            DConv2d.same(6, kernel_groups=4)


class TestCost:
    @kinds
    def test_macs_are_those_that_torch_counts(self, kind: dict[str, Any]) -> None:
        _, layer = make(**kind)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, 6, 9, 7))
        assert counter.get_total_flops() == 2 * layer.macs(9, 7)

    def test_macs_by_hand(self) -> None:
        conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        layer = SEKGConv2d.from_conv(conv, SEKGConfig(kernel_groups=4))
        pixel = 8 * 9 + 8 * 4 * 9 + 8 * 9  # depthwise branch, 1×1 convolution, application
        assert layer.macs(10, 8) == 5 * 4 * pixel + 3 * 8

    def test_parameters_by_hand(self) -> None:
        generator = SEKG(DConv2d.same(32).geometry, 9 * 32, channel_bias=True)
        count = sum(p.numel() for p in generator.parameters())
        assert count == 32 * 9 + 32 + 3 + 1 + 9 * 32 * 32


class TestPrecision:
    @kinds
    def test_autocast(self, kind: dict[str, Any]) -> None:
        conv, layer = make(**kind)
        x = torch.randn(2, 6, 6, 6)
        with torch.autocast("cpu", torch.bfloat16):
            got = layer(x)
        assert got.dtype == torch.bfloat16
        assert relative_error(got.float(), conv(x)) < 0.02
        got.float().square().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half(self, dtype: torch.dtype) -> None:
        conv, layer = make("dense")
        x = torch.randn(1, 6, 6, 6)
        got = layer.to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        assert relative_error(got.float(), conv(x)) < math.sqrt(torch.finfo(dtype).eps) / 5


def test_compiles_whole_and_traces_as_a_leaf() -> None:
    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, SEKGConv2d) or super().is_leaf_module(module, name)

    conv, layer = make("dense")
    x = torch.randn(1, 6, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), conv(x))
    compiled(x).sum().backward()
    assert layer.dconv.generator.weight.grad is not None
    graph = Leaf().trace(nn.Sequential(layer))
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
