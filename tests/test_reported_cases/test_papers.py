"""Where the product differed from its three papers. The ids in the docstrings are those of the table of cases."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon.zoo as zoo
from surgeon.errors import ConfigError, InputError
from surgeon.zoo.bayer import PATTERNS, bayer_mask
from surgeon.zoo.recipes import training_recipe
from surgeon.zoo.tasks import create_task
from tests.task_data import image_folders

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
    with pytest.raises(InputError, match="BGGR sensor, the mosaics are GRBG; make the network with pattern=GRBG"):
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
