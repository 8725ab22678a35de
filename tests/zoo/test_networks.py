"""Every network of the zoo: it builds, trains, is saved and loaded, converts, and has its published size or the reason why not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
import surgeon.zoo as zoo
from surgeon.layers.acda import ACDAConv2d
from surgeon.layers.base import DynamicConv2d
from surgeon.layers.pafu import PAFUConv2d
from surgeon.models.names import build_model
from surgeon.records.recipe import Recipe
from surgeon.surgery.rewrite import dynamic_layers
from surgeon.zoo.networks import superres
from surgeon.zoo.networks.demosaicnet import grbg_mosaic
from surgeon.zoo.networks.restorer import KPN
from surgeon.zoo.networks.superres import LinearSR, SelfEnsemble
from surgeon.zoo.networks.vdn import NoisePosterior, _blurred, variational_loss
from surgeon.zoo.table import count_parameters

# Too large for the default run: seconds to build.
BIG = {
    "ad_resnet_l",
    "ad_resnet_l_conv",
    "ad_resnet_m",
    "ad_resnet_m_conv",
    "ad_resnet_s_conv",
    "ad_resnet_crowd_m",
    "ad_resnet_crowd_s",
    "ad_resnet_crowd_m_conv",
    "ad_resnet_crowd_s_conv",
    "adfnet_l",
    "pafu_pspnet",
    "pafu_resnet101",
    "pafu_resnet110_cifar100",
    "pafu_resnet50",
    "resnet32_cifar",
    "resnet44_cifar",
    "resnet56_cifar",
}
_ADFNET = {"widths": [8, 16]}
_RESTORER = {"width": 32, "inner": 8, "blocks": 2}
# Options that make a small network of the same blocks, for what need not be run at full size.
SMALL: dict[str, dict[str, Any]] = {
    **{name: _ADFNET for name in zoo.names() if name.startswith("adfnet")},
    **dict.fromkeys(("acda_sidd", "sidd_conv", "acda_realsr", "realsr_conv", "acda_vdn", "vdn_conv"), _RESTORER),
    **dict.fromkeys(("dfn_realsr", "condconv_realsr", "dyconv_realsr", "kpn", "kpn_l19"), _RESTORER),
    **{name: {"blocks": 3, "width": 8, "layers": 2} for name in ("rdn", "rdn_mdcb")},
    **{name: {"steps": 2, "depth": 2, "width": 8} for name in ("iterative_demosaic", "pafu_iterative_demosaic")},
    **{name: {"backbone": "resnet10t", "width": 16} for name in ("pspnet", "pafu_pspnet")},
    **{name: {"depth": 5, "width": 8} for name in ("dncnn", "dncnn_color", "dncnn_dconv")},
    "carn_m": {"width": 16},
    "demosaicnet": {"depth": 3, "width": 8},
}
# What these are made of runs under another name: for some the small network is the very same, see `test_repeated_names`.
SAME = {"adfnet_l": "adfnet", "adfnet_real": "adfnet", "acda_realsr": "acda_sidd", "realsr_conv": "sidd_conv"}
REPEATED = {*SAME, "adfnet_wo_dcb", "adfnet_wo_mdcb", "resnet110_cifar"}
SIZES = {"lenet": 32, "lenet_acda": 32, "demosaicnet": 32}
# Parameters that a forward pass does not use: upsamplers of other scales, the network for the noise.
IDLE = {"carn_m": "upsample.", "acda_vdn": "noise.", "vdn_conv": "noise."}


def tiers(names: list[str], big: set[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in big else name for name in names]


@pytest.mark.parametrize("name", tiers(zoo.names(), BIG))
def test_published_size_or_the_reason(name: str) -> None:
    found = zoo.entry(name)
    model = zoo.create(name)
    if found.published is not None and found.published.params is not None:
        counted = count_parameters(model, without=found.uncounted)
        off = abs(counted / found.published.params - 1)
        assert off <= 0.01 or found.difference, f"{name} has {counted}, published {found.published.params}"
        if found.uncounted:
            assert count_parameters(model) > counted
    assert found.summary
    assert found.summary.endswith(".")
    assert len(found.description) > len(found.summary) + 80


@pytest.mark.parametrize("name", tiers(zoo.names(), (BIG - set(SMALL)) | REPEATED | {"pafu_resnet110_cifar"}))
def test_trains_and_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    side = SIZES.get(name, 16)
    if name.startswith(("ad_resnet", "pafu_resnet5", "pafu_resnet101")):
        side = 64
    channels = zoo.entry(name).input_size[0]
    model, base = build_model(
        f"zoo/{name}", weights="random", options=SMALL.get(name), input_size=(channels, side, side)
    )
    assert base is not None
    assert base.source == "zoo"
    x = torch.rand(2, channels, side, side)
    model.train()
    out = model(x)
    out.square().mean().backward()
    assert bool(torch.isfinite(out).all())
    idle = {key for key, p in model.named_parameters() if p.grad is None}
    assert all(key.startswith(IDLE.get(name, "-")) for key in idle), idle
    assert bool(idle) == (name in IDLE)
    model.eval()
    surgeon.save(model, tmp_path / "run", base=base)
    again = surgeon.load(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


def test_repeated_names() -> None:
    """Training and converting them again would show nothing: the same modules with tensors of the same shapes."""
    for name, other in SAME.items():
        networks = [zoo.create(n, **SMALL[n]) for n in (name, other)]
        kinds = [[(key, type(m)) for key, m in net.named_modules()] for net in networks]
        shapes = [{key: t.shape for key, t in net.state_dict().items()} for net in networks]
        assert kinds[0] == kinds[1]
        assert shapes[0] == shapes[1]


CLASSES = {"pafu_resnet110_cifar100": {"num_classes": 100}}  # its plain network is that of CIFAR-10
DYNAMIC = [name for name in zoo.names() if zoo.entry(name).rules]


@pytest.mark.parametrize("name", tiers(DYNAMIC, BIG))
def test_the_recipe_makes_it_of_the_plain_network(name: str) -> None:
    """Surgery on the plain network by the stored recipe gives the entry's structure: the same layers, the same tensors."""
    found = zoo.entry(name)
    assert found.plain is not None
    options = SMALL.get(name, {}) | CLASSES.get(name, {})
    plain, base = build_model(found.plain, weights="random", options=options)
    assert not dynamic_layers(plain)
    made, _ = surgeon.convert(plain, recipe=Recipe.read(f"zoo/{name}"), input_size=found.input_size, check=False)
    created = zoo.create(name, **options)
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in created.state_dict().items()}
    expected = dynamic_layers(created)
    layers = dynamic_layers(made)
    assert list(layers) == list(expected)
    assert layers
    for key, layer in layers.items():
        assert (type(layer), layer.config, layer.geometry) == (
            type(expected[key]),
            expected[key].config,
            expected[key].geometry,
        )
    assert base is not None


BY_HAND = [name for name in zoo.names() if zoo.entry(name).plain and not zoo.entry(name).rules]


def test_what_is_made_by_hand_says_why() -> None:
    assert set(BY_HAND) == {"adfnet", "dncnn_dconv", "rdn_mdcb"}
    for name in BY_HAND:
        assert zoo.entry(name).plain in zoo.names()
        assert len(zoo.entry(name).by_hand) > 60
    assert not any(zoo.entry(name).by_hand for name in DYNAMIC)


@pytest.mark.parametrize("name", tiers(zoo.names(), (BIG - set(SMALL)) | REPEATED))
def test_converts(name: str) -> None:
    """Any network, dynamic ones too, can be converted further, and computes what it computed."""
    model = zoo.create(name, **SMALL.get(name, {})).eval()
    side, channels = SIZES.get(name, 16), zoo.entry(name).input_size[0]
    if name.startswith(("ad_resnet", "pafu_resnet5", "pafu_resnet101")):
        side = 64
    sites = surgeon.inspect(model, input_size=(channels, side, side))
    chosen = [site.name for site in sites if max(site.kernel_size) > 1 and site.groups == 1 and not site.reasons][:2]
    if not chosen:  # nothing but dynamic layers
        assert zoo.entry(name).rules
        return
    before = len(dynamic_layers(model))
    converted, report = surgeon.convert(model, layers=chosen, type="sekg", input_size=(channels, side, side))
    assert len(dynamic_layers(converted)) == before + len(report.replaced)
    assert report.replaced


def test_acda_layers_start_as_in_the_paper() -> None:
    """Trained from scratch: each atom is one basis element, not what is left of a random 3×3 kernel."""
    net = zoo.create("acda_sidd", **_RESTORER)
    layers = [m for m in net.modules() if isinstance(m, ACDAConv2d)]
    assert len(layers) == 2
    for layer in layers:
        alpha = layer.generator.static_output.view(6, 18)
        assert torch.equal(alpha, torch.eye(6, 18))
        assert layer.static_atoms.numel() == 0


def test_pafu_supports() -> None:
    layer = zoo.create("pafu_linear_demosaic_7x7").output
    assert isinstance(layer, PAFUConv2d)
    assert layer.window == (7, 7)
    sizes = layer._sizes()
    assert sizes.count((7, 7)) == 8
    assert sizes.count((5, 5)) == 7  # and kernel 0


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("depth", [5, 10, 15])
def test_dncnn_of_figure_7(depth: int, width: int) -> None:
    plain = zoo.create("dncnn", channels=3, depth=depth, width=width)
    dynamic = zoo.create("dncnn_dconv", depth=depth, width=width)
    middle = [m for m in dynamic.body if type(m).__name__ == "DConv2d"]
    assert len(middle) == 1
    # 9·C kernel elements from C features, their bias, two small branches, against 9·C·C weights
    assert count_parameters(dynamic) - count_parameters(plain) == 9 * width + 10 * width + 3


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("blocks", [3, 6, 9])
def test_rdn_of_figure_7(blocks: int, width: int) -> None:
    net = zoo.create("rdn_mdcb", blocks=blocks, width=width).eval()
    kinds = [[type(m).__name__ for m in block] if isinstance(block, nn.Sequential) else "RDB" for block in net.blocks]
    assert kinds.count("RDB") == blocks - 1
    assert kinds[blocks // 2] == ["MDCB"] * 3


def test_self_ensemble_turns_everything_back() -> None:
    """With a network that commutes with turning the ensemble is that network; otherwise it is the mean over all eight."""
    x = torch.rand(1, 3, 6, 4)
    enlarge = nn.Upsample(scale_factor=2)
    torch.testing.assert_close(SelfEnsemble(enlarge)(x), enlarge(x))
    net = LinearSR(2)
    ensemble = SelfEnsemble(net)(x)
    for turned in (x.flip(3), x.flip(2), x.rot90(1, (2, 3))):
        back = SelfEnsemble(net)(turned)
        restored = (
            back.flip(3)
            if turned.equal(x.flip(3))
            else back.flip(2)
            if turned.equal(x.flip(2))
            else back.rot90(-1, (2, 3))
        )
        torch.testing.assert_close(restored, ensemble)
    assert not torch.allclose(net(x), ensemble)


def test_iterative_demosaicking_keeps_a_flat_image() -> None:
    """A gray plane needs no denoising: with a silent denoiser the measured and the interpolated values are all the same."""
    net = zoo.create("iterative_demosaic", steps=3, depth=1, width=8, pattern="GRBG").eval()
    nn.init.zeros_(net.denoiser.exit.weight)
    nn.init.zeros_(net.denoiser.exit.bias)
    image = torch.full((1, 3, 8, 10), 0.25)
    torch.testing.assert_close(net(grbg_mosaic(image)), image)


def test_the_denoisers_residual_is_bounded() -> None:
    denoiser = zoo.create("iterative_demosaic", depth=1, width=8).denoiser
    x = 50 * torch.rand(2, 3, 6, 6)
    with torch.no_grad():
        residual = denoiser(x, torch.tensor([0.1, 1e6]))
    assert float(residual[0].norm()) == pytest.approx(0.1 * (3 * 36 - 1) ** 0.5, rel=1e-5)
    assert float(residual[1].norm()) < 1e6


def test_kernel_prediction_starts_at_the_identity() -> None:
    x = torch.rand(1, 3, 9, 10)
    torch.testing.assert_close(KPN(kernel_size=5, **_RESTORER)(x), x)


def test_pspnet_has_an_auxiliary_head_in_training() -> None:
    net = zoo.create("pspnet", backbone="resnet10t", width=8, num_classes=4, auxiliary=True)
    x = torch.rand(2, 3, 32, 40)
    first, second = net(x)
    assert first.shape == second.shape == (2, 4, 32, 40)
    assert net.eval()(x).shape == (2, 4, 32, 40)


# --- the variational loss -----------------------------------------------------------------------------------------------


def exact_posterior(noisy: Tensor, clean: Tensor, window: int) -> NoisePosterior:
    half = window * window / 2
    variance = torch.full_like(clean, 1e-6)
    beta = half * _blurred((noisy - clean).square(), window).clamp_min(1e-10)
    return NoisePosterior(clean, variance, torch.full_like(clean, half - 1), beta)


def test_divergences_vanish_at_the_prior() -> None:
    """Where the posterior is the prior only the likelihood is left."""
    clean = torch.rand(1, 3, 12, 12, dtype=torch.float64)
    noisy = clean + 0.1 * torch.randn_like(clean)
    found = exact_posterior(noisy, clean, 7)
    expected = 0.5 * (
        found.beta.log() - torch.digamma(found.alpha) + found.alpha / found.beta * ((noisy - clean).square() + 1e-6)
    )
    torch.testing.assert_close(variational_loss(found, noisy, clean), expected.mean())


@pytest.mark.parametrize("field", ["mean", "variance", "alpha", "beta"])
def test_divergences_grow_away_from_the_prior(field: str) -> None:
    """Eq. 13-14 are Kullback-Leibler divergences: against their definition, by sampling the distributions of torch."""
    clean = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    noisy = clean + 0.1 * torch.randn_like(clean)
    base = exact_posterior(noisy, clean, 5)
    moved = base._replace(**{field: getattr(base, field) * 1.01})

    def likelihood(p: NoisePosterior) -> Tensor:
        expected = p.beta.log() - torch.digamma(p.alpha)
        return 0.5 * (expected + p.alpha / p.beta * ((noisy - p.mean).square() + p.variance)).mean()

    divergence = variational_loss(moved, noisy, clean, window=5) - likelihood(moved)
    normal = torch.distributions.Normal
    gamma = torch.distributions.Gamma  # the divergence of inverse Gammas is that of the Gammas
    expected = torch.distributions.kl_divergence(
        normal(moved.mean, moved.variance.sqrt()), normal(base.mean, base.variance.sqrt())
    ) + torch.distributions.kl_divergence(gamma(moved.alpha, moved.beta), gamma(base.alpha, base.beta))
    torch.testing.assert_close(divergence, expected.mean(), rtol=1e-6, atol=1e-9)
    assert float(divergence) > 0


def test_the_variational_loss_trains_both_networks() -> None:
    net = zoo.create("acda_vdn", **_RESTORER)
    clean = torch.rand(1, 3, 16, 16)
    noisy = clean + 0.1 * torch.randn_like(clean)
    loss = variational_loss(net.posterior(noisy), noisy, clean)
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())
    assert torch.equal(net(noisy), net.posterior(noisy).mean)


def test_layers_of_the_zoo_are_the_libraries() -> None:
    net = zoo.create("lenet_acda")
    assert all(isinstance(layer, DynamicConv2d) for layer in (net.conv1, net.conv2))


@pytest.mark.parametrize("name", ["adfnet_wo_dcb", "acda_sidd", "pafu_espcnn", "rdn_mdcb", "pafu_linear_sr_7x7_x2"])
def test_a_network_made_in_python_is_known_again(name: str, tmp_path: Path) -> None:
    """Saved without being told what it is; its class and its shapes tell."""
    model = zoo.create(name).eval()
    surgeon.save(model, tmp_path / "run")
    again = surgeon.load(tmp_path / "run")
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


@pytest.mark.long
def test_the_iterative_network_exports_with_everything_free(tmp_path: Path) -> None:
    """Its bound depends on the number of pixels, which must not become a constant."""
    model = zoo.create("pafu_iterative_demosaic", steps=1, depth=1, width=16).eval()
    found = surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 24, 24))
    assert set(found.free) == {"batch", "height", "width"}


@pytest.mark.parametrize("name", ["espcnn", "pafu_espcnn"])
@pytest.mark.parametrize("made", ["create", "factory"])
def test_a_network_with_options_is_rebuilt_after_surgery(
    name: str, made: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = zoo.create(name, scale=2) if made == "create" else getattr(superres, name)(2)
    surgeon.save(network.eval(), tmp_path / "network")
    loaded = surgeon.load(tmp_path / "network")
    plain = surgeon.revert(loaded) if name == "pafu_espcnn" else loaded
    surgeon.save(plain, tmp_path / "plain")
    x = torch.rand(1, 3, 12, 12)
    assert "no way to rebuild" not in caplog.text
    again = surgeon.load(tmp_path / "plain")
    assert torch.equal(again(x), plain(x))
    base = Recipe.read(tmp_path / "plain").base
    assert base is not None
    assert base.kwargs == {"scale": 2}
