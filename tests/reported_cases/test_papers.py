"""Where the product differed from its three papers. The ids in the docstrings are those of the table of cases."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
import surgeon.zoo as zoo
from surgeon.cli import main
from surgeon.errors import ConfigError, InputError
from surgeon.models.names import build_model
from surgeon.visualize.capture import Captured
from surgeon.visualize.pictures import selection_by_color
from surgeon.zoo.bayer import PATTERNS, bayer_mask
from surgeon.zoo.networks.vdn import _blurred
from surgeon.zoo.recipes import recipe_names, training_recipe
from surgeon.zoo.tasks import create_task
from tests.support.training.task_data import image_folders, masks, photo

_ITERATIVE = ("iterative_demosaic", "pafu_iterative_demosaic")
_TINY: dict[str, Any] = {"steps": 2, "depth": 1, "width": 16}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    image_folders(tmp_path)
    return tmp_path


# --- demosaicking ------------------------------------------------------------------------------------------------------


def silent(model: nn.Module) -> nn.Module:
    """The network without what it learns: interpolation, and the measured values put back."""
    for name in ("weight", "bias"):
        nn.init.zeros_(getattr(model.denoiser.exit, name))
    return model.eval()


def smooth(height: int, width: int) -> Tensor:
    """(1, 3, H, W), a plane in each color, which bilinear interpolation gets right inside."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    return torch.stack([0.2 + 0.5 * x + 0 * y, 0.7 - 0.3 * x * 1 + 0.2 * y, 0.3 + 0.4 * y + 0 * x])[None]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", _ITERATIVE)
def test_the_sensors_pattern_comes_from_the_task(name: str, pattern: str, folders: Path) -> None:
    """D3: the network put GRBG values back whatever the task's sensor was; on Kodak 9.5 dB instead of 31."""
    model = silent(zoo.create(name, **_TINY))
    create_task("demosaicking", data=folders, patch=16, pattern=pattern).bind(model)
    image = smooth(15, 18)
    with torch.no_grad():
        found = model(image * bayer_mask(pattern, 15, 18))
    torch.testing.assert_close(found[..., 2:-2, 2:-2], image[..., 2:-2, 2:-2])


@pytest.mark.parametrize("name", _ITERATIVE)
def test_defaults_of_network_task_and_recipe_are_one_sensor(name: str, folders: Path) -> None:
    """D3: without the recipe, network and task had different sensors."""
    task = create_task("demosaicking", data=folders, patch=16)
    assert task.config.pattern == "RGGB" == training_recipe("iterative_demosaic").task_options["pattern"]
    image = smooth(8, 8)
    with torch.no_grad():
        found = silent(zoo.create(name, **_TINY))(image * bayer_mask("RGGB", 8, 8))
    torch.testing.assert_close(found[..., 2:-2, 2:-2], image[..., 2:-2, 2:-2])


def test_a_network_made_for_one_sensor_refuses_the_task_of_another(folders: Path) -> None:
    """D3: a pattern that was chosen for the network is not overruled in silence."""
    task = create_task("demosaicking", data=folders, patch=16, pattern="GRBG")
    task.bind(zoo.create("iterative_demosaic", **_TINY, pattern="GRBG"))
    with pytest.raises(InputError, match="BGGR sensor, but the mosaics are GRBG; build the network with pattern=GRBG"):
        task.bind(nn.Sequential(zoo.create("iterative_demosaic", **_TINY, pattern="BGGR")))
    with pytest.raises(ConfigError, match=r"pattern must be one of RGGB, .*, got 'RGBG'"):
        zoo.create("iterative_demosaic", **_TINY, pattern="RGBG")


def test_the_sensors_pattern_is_kept_with_the_weights(folders: Path) -> None:
    """D3: a network trained for a sensor is that sensor's wherever its weights are loaded."""
    model = zoo.create("iterative_demosaic", **_TINY).eval()
    create_task("demosaicking", data=folders, patch=16, pattern="GBRG").bind(model)
    again = zoo.create("iterative_demosaic", **_TINY).eval()
    again.load_state_dict(model.state_dict())
    x = torch.rand(1, 3, 8, 8) * bayer_mask("GBRG", 8, 8)
    assert torch.equal(again(x), model(x))


# --- ADFNet, Table 4 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("adfnet_wo_dcb_mdcb", "7.71"),
        ("adfnet_wo_dcb", "7.64"),
        ("adfnet_wo_mdcb", "7.72"),
        ("adfnet_wo_mfi", "7.65"),
        ("adfnet_all", "7.30"),
        ("adfnet_encoder", "7.65"),
        ("adfnet", "7.65"),
    ],
)
def test_all_rows_of_table_4_have_their_parameters(name: str, published: str) -> None:
    """D4: dynamic in the encoder means at its three scales; with the coarsest, too, it had 7.36 M instead of 7.65 M."""
    with torch.device("meta"):
        net = zoo.create(name)
    counted = sum(p.numel() for key, p in net.named_parameters() if not key.endswith(("deform.weight", "deform.bias")))
    assert abs(counted / 1e6 - float(published)) < 0.008, counted  # Table 4 cuts some rows and rounds others


# --- weights in circulation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.", "dncnn.", "module.model."])
def test_dncnn_files_of_every_layout_load(prefix: str, tmp_path: Path) -> None:
    """D8: files of the KAIR layout ("model.0.weight") were refused."""
    net = zoo.create("dncnn", depth=3, width=4, batch_norm=False).eval()
    path = tmp_path / "dncnn.pth"
    torch.save({key.replace("body.", prefix): value for key, value in net.state_dict().items()}, path)
    again = zoo.load_foreign(zoo.create("dncnn", depth=3, width=4, batch_norm=False), path, network="dncnn").eval()
    x = torch.rand(1, 1, 6, 6)
    assert torch.equal(again(x), net(x))


# --- options and pictures that the papers have --------------------------------------------------------------------------


class Shares(nn.Module):
    """Logits that depend on the size of the picture, so that every scale counts."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0], x[:, 1] * x.shape[-1] / 20, x[:, 2] * 0], 1)


def test_segmentation_is_judged_at_several_scales(tmp_path: Path) -> None:
    """D10: multi-scale testing (PAFU, Table 6) had no option; it is the mean of the classes' shares over the sizes."""
    options = masks(tmp_path)
    one, two = (create_task("segmentation", **options, test_scales=scales) for scales in ((1.0,), [0.5, 1.5]))
    plain = create_task("segmentation", **options)
    x, model = torch.randn(2, 3, 12, 20), Shares()
    assert torch.equal(one.predict(model, {"input": x}), plain.predict(model, {"input": x}))
    expected = torch.zeros(2, 3, 12, 20)
    for size in ((6, 10), (18, 30)):
        logits = model(F.interpolate(x, size, mode="bilinear"))
        expected += F.interpolate(logits, (12, 20), mode="bilinear").softmax(1) / 2
    torch.testing.assert_close(two.predict(model, {"input": x}).exp(), expected)
    with pytest.raises(ConfigError, match=r"test_scales must be positive factors"):
        create_task("segmentation", **options, test_scales=(0.0,))


def test_selections_are_drawn_by_the_sensors_colors(tmp_path: Path) -> None:
    """D10: PAFU's Figure 3 has the masks split by Bayer color."""
    model, base = build_model("zoo/pafu_linear_demosaic", weights="random", input_size=(3, 16, 16))
    surgeon.save(model, tmp_path / "run", base=base)
    picture = photo(tmp_path / "a.png", 20, 20)
    arguments = ["visualize", str(tmp_path / "run"), str(picture), "-o", str(tmp_path / "out"), "--quiet", "--bayer"]
    assert main([*arguments, "RGGB"]) == 0
    assert [path.name for path in (tmp_path / "out").rglob("*selection-RGGB.png")] == ["output-selection-RGGB.png"]
    assert main([*arguments, "RGBG", "--force"]) == 2


def test_each_mask_holds_the_pixels_of_its_color() -> None:
    """D10: the place in the cell decides the panel."""
    code = torch.zeros(4, 6, 8)
    for i in range(4):
        code[i, i // 2 :: 2, i % 2 :: 2] = 1
    layer = zoo.create("pafu_linear_demosaic").output
    seen = Captured(name="x", layer=layer, input=code, output=code, static=code, code=code, variation=None)
    figure = selection_by_color(seen, np.zeros((6, 8, 3)), "GRBG")
    panels = {axes.get_title()[0] + str(i): axes.images[0].get_array() for i, axes in enumerate(figure.axes[1:3])}
    assert set(panels) == {"G0", "R1"}
    assert (panels["G0"] == 0).all()
    assert (panels["R1"] == 1).all()


# --- the variational loss ------------------------------------------------------------------------------------------------


def test_the_window_of_the_noise_is_the_authors() -> None:
    """D11: a Gaussian of 3 pixels in the 7x7 window, not 1.4."""
    x = torch.zeros(1, 1, 15, 15)
    x[..., 7, 7] = 1
    found = _blurred(x, 7)[0, 0]
    assert float(found[7, 10] / found[7, 7]) == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert float(found[7, 11]) == 0


def test_the_posterior_has_the_authors_limits() -> None:
    """D11: logarithms between those of 1e-8 and 1e4."""
    net = zoo.create("vdn_conv", width=32, inner=8, blocks=1)
    for layer in (net.noise[-1], [m for m in net.denoiser.modules() if isinstance(m, nn.Conv2d)][-1]):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, 50.0)
    high = net.posterior(torch.rand(1, 3, 8, 8))
    assert float(high.alpha.detach().max()) == pytest.approx(1e4, rel=1e-4)
    nn.init.constant_(net.noise[-1].bias, -50.0)
    assert float(net.posterior(torch.rand(1, 3, 8, 8)).beta.detach().min()) == pytest.approx(1e-8, rel=1e-4)


# --- what is said ----------------------------------------------------------------------------------------------------------


def test_the_weight_of_the_decorrelation_is_said_to_be_ours() -> None:
    """D5: recipes said that the paper does not give the weight; equation 4 does."""
    told = {
        name: training_recipe(name).assumed
        for name in recipe_names()
        if training_recipe(name).source.startswith("PAFU")
    }
    assert len(told) == 8
    for text in told.values():
        assert "weight of the decorrelation is 1 (eq. 4" in text
        assert "here 1e-3, because" in text
