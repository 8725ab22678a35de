"""The PAFU layer: its group of kernels, its selector, its regularizer. What all layers share is in layers/test_contract.py."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.collapsing.evidence import prove
from surgeon.errors import ConfigError, UnsupportedLayerError
from surgeon.layers import PAFUConfig, PAFUConv2d, regularization
from tests.support.layers.contract import awaken, plain_conv, relative_error


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make(conv: nn.Conv2d | None = None, **options: Any) -> PAFUConv2d:
    """The paper's form, unless the options say otherwise."""
    options = {"group_size": 4, "hidden": 8, **PAFUConfig.paper, **options}
    return PAFUConv2d.from_conv(conv or plain_conv(), PAFUConfig(**options))


def kernels(layer: PAFUConv2d) -> Tensor:
    """All kernels of the group, (n, O, C/G, k, l), read off the parameters; for groups without further supports."""
    k_h, k_w = layer.geometry.kernel_size
    further = layer.further_kernels.unflatten(2, (k_h, k_w, -1)).movedim(-1, 2)
    return torch.cat([layer.kernel[None], further])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group_size": 1}, "group_size must be an integer >= 2, got 1"),
        ({"group_size": True}, "got True"),
        ({"hidden": 0}, "hidden must be an integer >= 1, got 0"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"perturbation": -1}, "perturbation must be a finite number > 0, got -1"),
        ({"temperature": math.inf}, "got inf"),
        ({"supports": (3, 4)}, r"supports must be a tuple of odd kernel sizes, got \(3, 4\)"),
        ({"supports": 5}, "got 5"),
        ({"group_size": 2, "supports": (3, 5)}, "at most 1"),
        ({"shared": 1}, "shared must be true or false, got 1"),
        ({"selection": "soft"}, "selection must be one of argmax, gumbel, got 'soft'"),
        ({"norm": "layer"}, "norm must be 'batch' or None, got 'layer'"),
    ],
)
def test_wrong_options_print_the_value(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PAFUConfig(**options)


def test_a_config_of_another_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes a PAFUConfig, got a LayerConfig"):
        PAFUConv2d.from_conv(plain_conv(), PAFUConfig.__base__())


def test_options_survive_json() -> None:
    config = PAFUConfig(group_size=4, supports=(5, 7))
    assert config.to_dict()["supports"] == [5, 7]
    assert PAFUConfig.from_dict(config.to_dict()) == config


def test_kernels_start_distinct_and_near_the_weight() -> None:
    conv = plain_conv()
    layer = make(conv, perturbation=0.05)
    assert torch.equal(layer.kernel, conv.weight)
    rms = conv.weight.square().mean().sqrt()
    for kernel in kernels(layer)[1:]:
        distance = (kernel - conv.weight).square().mean().sqrt() / rms
        assert 0.03 < distance < 0.07
    assert torch.pdist(kernels(layer).flatten(1)).min() > 0


@pytest.mark.parametrize("n", [2, 8])
def test_at_birth_training_samples_kernel_0_half_of_the_time(n: int) -> None:
    layer = make(group_size=n)
    logits = layer.selector(torch.randn(4, 6, 40, 40))
    index, soft = layer._select(logits)
    assert soft is not None
    shares = torch.bincount(index.flatten(), minlength=n) / index.numel()
    expected = torch.full((n,), 1 / (2 * n - 1))
    expected[0] = n / (2 * n - 1)
    assert (shares - expected).abs().max() < 0.03
    assert not layer.eval().selection(torch.randn(4, 6, 9, 9)).any()


def test_training_is_the_straight_through_gumbel_softmax() -> None:
    """Outputs and all gradients against `F.gumbel_softmax` over n stacked convolutions, on the same noise."""
    layer = awaken(make(plain_conv(stride=2))).double()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    # Noise is drawn in the logits' dtype, so that both draws are the same.
    torch.manual_seed(1)
    layer(x).square().sum().backward()
    got = {name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.grad is not None}
    layer.zero_grad()
    torch.manual_seed(1)
    z = F.gumbel_softmax(layer.selector(x), tau=layer.temperature, hard=True, dim=1)
    stacked = torch.stack([F.conv2d(x, kernel, None, stride=2, padding=1) for kernel in kernels(layer)], 1)
    y = (stacked * z[:, :, None]).sum(1) + layer.bias[:, None, None]
    y.square().sum().backward()
    assert got.keys() == dict(layer.named_parameters()).keys()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert relative_error(got[name], parameter.grad) < 1e-10, name


def test_a_low_temperature_makes_the_soft_selection_hard() -> None:
    layer = make()
    logits = layer.selector(torch.randn(2, 6, 20, 20))
    confidence = []
    for layer.temperature in (10.0, 1.0, 0.1):
        _, soft = layer._select(logits)
        assert soft is not None
        confidence.append(float(soft.amax(1).mean().detach()))
    assert 0.25 < confidence[0] < 0.4 < confidence[1] < 0.9 < confidence[2]


def test_eval_is_deterministic_and_selects_where_the_selector_says() -> None:
    layer = awaken(make()).eval()
    x = torch.randn(2, 6, 20, 20)
    index = layer.selection(x)
    assert index.shape == (2, 20, 20)
    assert len(index.unique()) > 1
    y = layer(x)
    assert torch.equal(y, layer(x))
    for i, kernel in enumerate(kernels(layer)):
        expected = F.conv2d(x, kernel, layer.bias, padding=1)
        chosen = (index == i)[:, None].expand_as(y)
        torch.testing.assert_close(y[chosen], expected[chosen], atol=1e-5, rtol=1e-5)


def test_the_static_weight_is_the_kernel_that_the_bias_prefers() -> None:
    layer = make()
    assert torch.equal(layer.static_weight(), layer.kernel)
    layer.selector.set_static_output(torch.tensor([0.0, 0.0, 3.0, 0.0]))
    assert torch.equal(layer.static_weight(), kernels(layer)[2])
    layer.adaptive = False
    layer(torch.randn(1, 6, 5, 5)).sum().backward()
    assert layer.further_kernels.grad is not None
    assert [bool(g.any()) for g in layer.further_kernels.grad] == [False, True, False]


@pytest.mark.parametrize("supports", [(5,), (5, 7), (1, 5), (1,)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"kernel_size": (2, 3)}, {"kernel_size": 5, "padding": 0, "stride": 2}, {"padding_mode": "circular"}],
)
def test_further_supports(supports: tuple[int, ...], changes: dict[str, Any]) -> None:
    """Birth stays exact, every kernel is centered where the replaced one was, and gradients stay inside of each support."""
    conv = plain_conv(**changes)
    layer = make(conv, supports=supports).eval()
    x = torch.randn(2, 6, 13, 12)
    assert relative_error(layer(x), conv(x)) <= 1e-5
    assert relative_error(layer.static_conv2d(x), conv(x)) <= 1e-5
    mask = layer.support_mask
    sizes = [supports[i % len(supports)] ** 2 for i in range(3)]
    expected = None if all(size == layer.window[0] * layer.window[1] for size in sizes) else sizes
    assert expected == (None if mask is None else mask.sum(1).int().tolist())
    layer.train()(x).square().sum().backward()
    grad = layer.further_kernels.grad
    assert grad is not None
    assert layer.kernel.grad is not None
    if mask is not None:
        inside = mask[:, None, :, None].bool()
        for tensor in (grad, layer.further_kernels.detach()):
            taps = tensor.unflatten(2, (mask.shape[1], -1))
            assert not taps.masked_select(~inside).any()
            assert taps.masked_select(inside).all()
    assert "support_mask" not in layer.state_dict()


def test_a_larger_support_is_aligned_with_the_replaced_kernel() -> None:
    """A kernel 1 whose inner 3×3 is the weight and whose rim is zero computes the same as kernel 0."""
    conv = plain_conv(stride=2, dilation=2)
    layer = make(conv, supports=(5,)).eval()
    with torch.no_grad():
        rim = F.pad(conv.weight, (1, 1, 1, 1)).movedim(1, -1).flatten(1)
        layer.further_kernels.copy_(rim.expand_as(layer.further_kernels))
    layer.selector.set_static_output(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    x = torch.randn(2, 6, 13, 12)
    assert layer.selection(x).eq(1).all()
    assert relative_error(layer(x), conv(x)) <= 1e-5


def test_the_regularizer_by_hand() -> None:
    """Two kernels at an angle of 60°: W_f W_fᵀ − I has 0.5 in two places, so that the loss is 0.5; orthogonal ones cost nothing."""
    layer = make(plain_conv(in_channels=2, out_channels=1, kernel_size=1, padding=0), group_size=2)
    for other, expected in (([3 * 0.5, 3 * math.sqrt(0.75)], 0.5), ([0.0, -2.0], 0.0), ([5.0, 0.0], 2.0)):
        with torch.no_grad():
            layer.kernel.copy_(torch.tensor([2.0, 0.0]).view(1, 2, 1, 1))
            layer.further_kernels.copy_(torch.tensor(other).view(1, 1, 2))
        assert layer.regularization().item() == pytest.approx(expected, abs=1e-6)


def test_a_small_kernel_is_padded_before_it_is_compared() -> None:
    """A 1×1 kernel against a 3×3 one: only the center counts in the product, everything in the norm (§3.5)."""
    layer = make(plain_conv(in_channels=1, out_channels=1, kernel_size=1, padding=0), group_size=2, supports=(3,))
    with torch.no_grad():
        layer.kernel.fill_(-2.0)
        layer.further_kernels.fill_(1.0)
    assert layer.regularization().item() == pytest.approx(2 * (1 / 3) ** 2)


def test_the_regularizer_keeps_no_copy_of_the_kernels_and_takes_a_zero_kernel() -> None:
    layer = make(group_size=4)
    kept: set[tuple[int, int]] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        return tensor

    with torch.no_grad():
        layer.further_kernels.normal_()
        layer.further_kernels[1] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = layer.regularization()
    loss.backward()
    kernels = torch.cat([layer.kernel.movedim(1, -1).flatten()[None], layer.further_kernels.flatten(1)]).detach()
    rows = F.normalize(kernels, dim=1)
    assert loss.item() == pytest.approx(float((rows @ rows.t() - torch.eye(4)).square().sum()), rel=1e-5)
    assert layer.further_kernels.grad is not None
    assert layer.further_kernels.grad.isfinite().all()
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    assert sum(size for at, size in kept if at not in own) < 2 * kernels[0].nbytes


def test_identical_kernels_are_a_stationary_point_of_the_regularizer() -> None:
    layer = make().double()
    slopes = []
    for _ in range(2):
        layer.zero_grad()
        layer.regularization().backward()
        assert layer.further_kernels.grad is not None
        slopes.append(float(layer.further_kernels.grad.abs().max()))
        with torch.no_grad():
            layer.further_kernels.copy_(layer.kernel.movedim(1, -1).flatten(1).expand_as(layer.further_kernels))
    assert slopes[0] > 1e-3
    assert slopes[1] < 1e-12


def test_a_model_is_regularized_by_the_average_of_its_units() -> None:
    model = nn.Sequential(make(), nn.ReLU(), make(plain_conv(in_channels=8), group_size=2), plain_conv(in_channels=8))
    first, second = (unit.regularization() for unit in model if isinstance(unit, PAFUConv2d))
    total = regularization(model)
    assert total.item() == pytest.approx((first + second).item() / 2)
    total.backward()
    assert all(unit.further_kernels.grad is not None for unit in model if isinstance(unit, PAFUConv2d))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(regularization(model), total)
    assert regularization(nn.ReLU()).item() == 0
    assert regularization(nn.Linear(2, 2, device="meta")).device.type == "meta"


@pytest.mark.parametrize("training", [True, False])
def test_the_operator_saves_next_to_nothing(training: bool) -> None:
    """Beyond inputs, parameters and the selector's own: at most 5 % of x."""
    layer = awaken(make(plain_conv(in_channels=64, out_channels=64), hidden=2)).train(training)
    x = torch.randn(2, 64, 30, 30, requires_grad=True)
    logits = layer.selector(x).detach().requires_grad_()
    index, soft = layer._select(logits)
    given = [x, index, *layer.parameters(), *([] if soft is None else [soft])]
    known = {t.untyped_storage().data_ptr() for t in given}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    layer._select = lambda _: (index, soft)
    layer.selector.forward = lambda _: logits
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert sum(nbytes for pointer, nbytes in saved.items() if pointer not in known) <= 0.05 * x.nbytes


def test_a_frozen_weight_stays_while_the_group_learns() -> None:
    conv = plain_conv()
    conv.weight.requires_grad_(False)
    layer = make(conv)
    layer(torch.randn(2, 6, 9, 9)).square().sum().backward()
    assert layer.kernel.grad is None
    assert layer.further_kernels.grad is not None
    assert layer.bias is not None
    assert layer.bias.grad is not None


def test_the_same_seed_gives_the_same_kernels() -> None:
    layers = []
    for _ in range(2):
        torch.manual_seed(7)
        layers.append(make())
    assert all(torch.equal(a, b) for a, b in zip(*(layer.state_dict().values() for layer in layers), strict=True))


def test_supports_between_the_taps_of_a_dilated_even_kernel_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="at dilation 2"):
        PAFUConv2d.from_conv(nn.Conv2d(3, 4, 2, dilation=2), PAFUConfig(group_size=3, supports=(3,)))
    for kernel, dilation in ((2, 1), (3, 2), (4, 2)):
        conv = nn.Conv2d(3, 4, kernel, dilation=dilation, padding=1)
        layer = PAFUConv2d.from_conv(conv, PAFUConfig(group_size=3, supports=(3,))).eval()
        x = torch.randn(1, 3, 12, 12)
        assert torch.allclose(layer(x), conv(x), atol=1e-5)


def test_a_deeper_selector_sees_further_and_changes_nothing_at_birth() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(1, 4, 15, 15, requires_grad=True)
    for depth in (1, 3):
        layer = make(conv, group_size=3, hidden=5, selector_depth=depth).eval()
        torch.testing.assert_close(layer(x), conv(x))
        nn.init.normal_(layer.selector.expand.weight)
        (seen,) = torch.autograd.grad(layer.selector(x)[0, :, 7, 7].sum(), x)
        rows = seen[0].abs().sum((0, 2)).nonzero().flatten()
        assert rows.tolist() == list(range(7 - depth, 8 + depth))
        selector = sum(p.numel() for name, p in layer.selector.named_parameters() if name.endswith("weight"))
        assert layer.selector.macs(15, 15) == selector * 225
    with pytest.raises(ConfigError, match="selector_depth must be an integer >= 1, got 0"):
        PAFUConfig(selector_depth=0)


def shared(conv: nn.Conv2d | None = None, **options: Any) -> PAFUConv2d:
    """The default form: a shared base, argmax in training, a normalized selector."""
    return PAFUConv2d.from_conv(conv or plain_conv(), PAFUConfig(group_size=4, hidden=8, **options))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("supports", [(), (1, 5)])
def test_a_shared_base_is_exact_whatever_is_selected(training: bool, supports: tuple[int, ...]) -> None:
    conv = plain_conv()
    layer = shared(conv, supports=supports).train(training)
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(layer(x), conv(x))
    assert len(layer.selection(x).unique()) > 1, "the selector starts able to see"
    assert prove(layer) is not None


def test_the_base_gets_the_gradient_of_every_pixel() -> None:
    conv, x = plain_conv(), torch.randn(2, 6, 9, 9)
    layer = shared(conv)
    conv(x).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.kernel.grad, conv.weight.grad, rtol=1e-4, atol=1e-4)
    assert layer.further_kernels.grad is not None
    assert layer.further_kernels.grad.abs().sum(dim=(1, 2)).gt(0).all()


def test_argmax_trains_what_eval_selects_by_the_gradient_of_the_expected_loss() -> None:
    """The selector's gradient is that of sum_i softmax_i <g, K_i * x>, as of autograd on the mixture's linearization."""
    layer = shared().double().train()
    with torch.no_grad():
        layer.further_kernels.normal_()
    x = torch.randn(1, 6, 7, 7, dtype=torch.float64)
    logits = torch.randn(1, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    index, soft = layer._select(logits)
    assert soft is not None
    assert torch.equal(index, logits.argmax(1))
    layer.selector.forward = lambda _: logits
    y = layer(x)
    weight = torch.randn_like(y)
    (got,) = torch.autograd.grad((y * weight).sum(), logits)
    kernels = (layer.kernel, *layer._unpacked(layer._further_kernels()))
    responses = torch.stack([nn.functional.conv2d(x, k, padding=1) for k in kernels], 1).detach()
    expected = (logits.softmax(1)[:, :, None] * responses * weight[:, None]).sum()
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, wanted)


def test_the_norm_takes_a_single_pixel_in_training() -> None:
    """Batch 1 and one pixel: the running statistics serve, and stay."""
    layer = shared(nn.Conv2d(6, 5, 1)).train()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert torch.isfinite(layer(torch.randn(1, 6, 1, 1))).all()
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
