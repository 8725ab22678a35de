"""Pictures of layers: what is captured and measured is right, and what is drawn is there."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.collapsing.evidence import Watch
from surgeon.errors import InputError
from surgeon.layers import ACDAConv2d, DynamicConv2d, PAFUConfig, PAFUConv2d, SEKGConv2d
from surgeon.layers.acda.bases import basis_elements
from surgeon.surgery.rewrite import dynamic_layers
from surgeon.visualize.capture import Captured, capture
from surgeon.visualize.measures import FROM_WEIGHTS, alpha_by_scale, cosine_distance, kernel_energy, numbers
from surgeon.visualize.pictures import bases, pictures
from surgeon.visualize.sheet import Panel, limits, pixels, sheet
from tests.support.fake_layer import FakeConv2d
from tests.support.layers.contract import awaken, make, plain_conv


def alive(kind: str, **options: Any) -> DynamicConv2d:
    """A layer, 6 to 8 channels, that varies."""
    layer = awaken(make(kind, plain_conv(), **options)).eval()
    if isinstance(layer, PAFUConv2d):
        with torch.no_grad():
            layer.selector.set_static_output(torch.zeros(layer.config.group_size))
    return layer


def see(layer: nn.Module, size: tuple[int, int] = (16, 20)) -> tuple[Captured, Tensor]:
    """What is captured of a layer that is a whole model, and its input."""
    model = nn.Sequential(nn.Identity(), layer)
    x = torch.randn(6, *size, generator=torch.Generator().manual_seed(1))
    return capture(model, dynamic_layers(model), x)["1"], x


# --- capture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["acda", "pafu", "sekg"])
def test_what_is_captured_is_what_the_layer_computed(kind: str) -> None:
    layer = alive(kind)
    seen, x = see(layer)
    assert torch.equal(seen.input, x)
    with torch.no_grad():
        assert torch.equal(seen.output, layer(x[None])[0])
        layer.adaptive = False
        assert torch.equal(seen.static, layer(x[None])[0])
    assert not layer._forward_hooks
    watch = Watch(layer)
    watch.look(x[None])
    found = watch.evidence()
    assert found is not None
    assert seen.variation == found.variation > 0


def test_only_the_first_call_and_only_what_runs_is_captured() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = make("acda", plain_conv(in_channels=8))
            self.idle = make("acda", plain_conv(in_channels=8))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.twice(self.twice(x))
            return out

    model, x = Odd().train(), torch.randn(8, 9, 9)
    found = capture(model, dynamic_layers(model), x)
    assert list(found) == ["twice"]
    assert torch.equal(found["twice"].input, x)
    assert model.training


def test_a_layer_that_is_off_or_says_nothing_still_has_features() -> None:
    off = alive("acda")
    off.adaptive = False
    seen, _ = see(off)
    assert (seen.code, seen.variation) == (None, None)
    assert list(pictures(seen, np.zeros((16, 20, 3)))) == ["features"]
    seen, _ = see(FakeConv2d.from_conv(plain_conv()))
    assert numbers(seen) == {"name": "1", "type": "fake", "variation": None}
    assert list(pictures(seen, np.zeros((16, 20, 3)))) == ["features"]


def test_the_original_is_captured_beside() -> None:
    conv = plain_conv()
    model = nn.Sequential(awaken(make("sekg", conv)))
    x = torch.randn(6, 9, 9)
    found = capture(model, dynamic_layers(model), x, nn.Sequential(conv))["0"]
    assert found.original is not None
    with torch.no_grad():
        assert torch.allclose(found.original, conv(x))
    assert "features" in pictures(found, np.zeros((9, 9, 3)))
    with pytest.raises(InputError, match="has no layer '0'"):
        capture(model, dynamic_layers(model), x, conv)


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 40])
def test_the_cosine_distance_is_the_mean_over_all_pairs(count: int) -> None:
    vectors = torch.randn(5, count, dtype=torch.float64)
    pairs = [
        1 - float(F.cosine_similarity(vectors[:, i], vectors[:, j], dim=0))
        for i in range(count)
        for j in range(count)
        if i != j
    ]
    found = cosine_distance(vectors)
    assert found == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_the_cosine_distance_at_its_ends() -> None:
    same = torch.ones(4, 7)
    assert cosine_distance(same) == pytest.approx(0, abs=1e-12)
    opposite = torch.tensor([[1.0, -1.0]])
    assert cosine_distance(opposite) == pytest.approx(2)
    assert cosine_distance(torch.eye(6)) == pytest.approx(1)
    assert cosine_distance(torch.zeros(4, 7)) is None
    assert cosine_distance(torch.cat([same, torch.zeros(4, 3)], 1)) == pytest.approx(0, abs=1e-12)


def test_coefficients_are_dealt_to_their_scales() -> None:
    layer = alive("acda")
    assert isinstance(layer, ACDAConv2d)
    seen, _ = see(layer)
    assert seen.code is not None
    scales = alpha_by_scale(layer, seen.code)
    assert list(scales) == ["3x3", "5x5", "7x7", FROM_WEIGHTS]
    m, elements = layer.config.atoms, len(layer.psi)
    whole = torch.cat(list(scales.values()), 1)
    assert torch.equal(whole, seen.code.view(m, elements, *seen.code.shape[1:]))
    first = 0
    for name, alpha in scales.items():
        psi = layer.psi[first : first + alpha.shape[1]]
        first += alpha.shape[1]
        if name != FROM_WEIGHTS:
            side = int(name[0])
            margin = (7 - side) // 2
            assert float(psi[:, margin : margin + side, margin : margin + side].square().sum()) == pytest.approx(
                float(psi.square().sum())
            )
    found = numbers(seen)
    by_scale = found["cosine_distance_by_scale"]
    assert found["cosine_distance"] == pytest.approx(sum(by_scale[s] for s in ("3x3", "5x5", "7x7")) / 3)
    assert 0 < found["cosine_distance"] < 2


def test_a_layer_at_birth_varies_nowhere() -> None:
    acda, _ = see(make("acda", plain_conv()).eval())
    assert numbers(acda)["cosine_distance"] == pytest.approx(0, abs=1e-9)
    pafu, _ = see(make("pafu", plain_conv(), **PAFUConfig.paper).eval())
    assert numbers(pafu)["effective_kernels"] == pytest.approx(1, abs=1e-5)
    sekg, _ = see(make("sekg", plain_conv()).eval())
    assert numbers(sekg)["energy_about_mean"] == 0
    assert [numbers(seen)["variation"] for seen in (acda, pafu, sekg)] == [0, 0, 0]
    shared, _ = see(make("pafu", plain_conv()).eval())  # selects at random among equal kernels
    assert numbers(shared)["effective_kernels"] > 1.5
    assert numbers(shared)["variation"] == pytest.approx(0, abs=1e-6)


def test_shares_are_those_of_the_selection() -> None:
    layer = alive("pafu")
    assert isinstance(layer, PAFUConv2d)
    seen, x = see(layer)
    found = numbers(seen)
    counts = torch.bincount(layer.selection(x[None]).flatten(), minlength=3)
    assert found["shares"] == pytest.approx([float(c) / counts.sum().item() for c in counts], abs=1e-6)
    assert sum(found["shares"]) == pytest.approx(1)
    entropy = -sum(s * np.log(s) for s in found["shares"] if s)
    assert found["effective_kernels"] == pytest.approx(np.exp(entropy), rel=1e-4)


@pytest.mark.parametrize("kernel_groups", [8, 2])
def test_the_kernel_energy_is_that_of_the_kernels(kernel_groups: int) -> None:
    layer = alive("sekg", kernel_groups=kernel_groups)
    assert isinstance(layer, SEKGConv2d)
    with torch.no_grad():
        layer.dconv.static.add_(0.1 * torch.randn_like(layer.dconv.static))
    seen, _ = see(layer)
    assert seen.code is not None
    generated = seen.code.view(kernel_groups, 1, 9, -1).expand(-1, 8 // kernel_groups, -1, -1)
    energy = layer.dconv.static.detach().square().sum()
    about_static, about_mean = kernel_energy(layer, seen.code)
    assert torch.allclose(about_static.flatten(), generated.square().sum((0, 1, 2)) / energy, rtol=1e-4)
    away = generated - generated.mean(-1, keepdim=True)
    assert torch.allclose(about_mean.flatten(), away.square().sum((0, 1, 2)) / energy, rtol=1e-4)
    found = numbers(seen)
    assert found["energy_about_static"] >= found["energy_about_mean"] > 0


# --- drawing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"),
    [("acda", ["scales", "atoms", "features"]), ("pafu", ["selection", "features"]), ("sekg", ["kernels", "features"])],
)
@pytest.mark.parametrize("size", [(16, 20), (30, 10)])
def test_every_picture_can_be_drawn(kind: str, names: list[str], size: tuple[int, int]) -> None:
    for layer in (alive(kind), make(kind, plain_conv()).eval()):
        seen, _ = see(layer, size)
        found = pictures(seen, np.random.default_rng(0).random((*size, 3)))
        assert list(found) == names
        for figure in found.values():
            values = pixels(figure)
            assert values.ndim == 3
            assert values.shape[2] == 3
            assert values.std() > 5  # not an empty sheet


def test_a_difference_has_its_size_in_the_title() -> None:
    """Its color scale alone makes any difference look large."""
    seen, _ = see(alive("acda"))
    found = pictures(seen, np.zeros((16, 20, 3)))
    (title,) = (one for axes in found["features"].axes if (one := axes.get_title()).startswith("change"))
    share = 100 * float((seen.output - seen.static).square().mean().sqrt() / seen.static.square().mean().sqrt())
    assert title == f"change by the dynamic part, {share:.2g} %"
    norms = [axes.images[0] for axes in found["scales"].axes if axes.get_title().endswith(("bases", "elements"))]
    assert norms
    assert all(shown.norm.vmin == 0 for shown in norms)


def test_a_selection_mask_has_the_colors_of_the_selection() -> None:
    from matplotlib.colors import to_rgb

    from surgeon.visualize.pictures import PALETTE

    layer = alive("pafu")
    seen, x = see(layer)
    assert isinstance(layer, PAFUConv2d)
    figure = pictures(seen, np.zeros((16, 20, 3)))["selection"]
    mask = figure.axes[1].images[0]
    shown = mask.cmap(mask.norm(mask.get_array()))[..., :3]
    expected = np.array([to_rgb(PALETTE[int(i)]) for i in layer.selection(x[None])[0].flatten()]).reshape(16, 20, 3)
    assert np.allclose(shown, expected)


def test_bases_are_drawn_one_row_a_scale() -> None:
    layer = make("acda", plain_conv(), scales=2, basis_size=4)
    assert isinstance(layer, ACDAConv2d)
    figure = bases(layer)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert np.allclose(np.stack(shown), basis_elements((3, 3), 2, 4).numpy())
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["3x3", "5x5"]


def test_a_constant_map_looks_constant() -> None:
    assert limits(np.full((3, 3), 2.0)) == (0.0, 2.0)
    assert limits(np.full((3, 3), 2.0) + 1e-6 * np.eye(3)) == (0.0, 2.000001)
    assert limits(np.zeros((3, 3))) == (0.0, 1.0)
    assert limits(np.array([[1.0, 2.0]])) == (1.0, 2.0)
    assert limits(np.full((2, 2), -1.0)) == (-1.0, 0.0)
    assert pixels(sheet("zero", [[Panel(title="flat", values=np.zeros((4, 4)))]])).any()
