"""The zoo's networks in circulation: exact sizes, shapes, and the weights that load into them; names and options."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import surgeon.zoo as zoo
from surgeon.errors import ConfigError, ModelError
from surgeon.models.weight_files import read_weights
from surgeon.zoo.foreign import translate
from surgeon.zoo.networks.demosaicnet import grbg_mosaic

SHIPPED = {
    "resnet20_cifar": "resnet20_cifar10.pth",
    "resnet56_cifar": "resnet56_cifar10.pth",
    "dncnn": "DnCNN-S-25.pth",
    "dncnn_color": "CDnCNN-S-25_color.pth",
    "carn_m": "carn_m_sr.pth",
    "demosaicnet": "demosaicnet_bayer.pth",
    "mcnn": "mcnn_shanghaitechA.pth",
}

# Published, in the unit of the paper's table; the exact numbers follow from the architecture.
PARAMETERS = {
    "resnet20_cifar": (269_722, 0.27e6),
    "resnet32_cifar": (464_154, 0.46e6),
    "resnet44_cifar": (658_586, 0.66e6),
    "resnet56_cifar": (853_018, 0.85e6),
    "resnet110_cifar": (1_727_962, 1.7e6),
    "dncnn": (556_032, 0.56e6),
    "dncnn_color": (668_227, 0.67e6),
    "carn_m": (414_787, 0.412e6),  # the paper's 412 K are the weights without the biases, see below
    "demosaicnet": (560_886, 0.56e6),
    "mcnn": (127_953, 0.13e6),
}


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name: str) -> None:
    exact, published = PARAMETERS[name]
    assert numbers(zoo.create(name)) == exact
    assert exact == pytest.approx(published, rel=0.02)


def test_carn_counts_weights_without_biases() -> None:
    assert sum(p.numel() for p in zoo.create("carn_m").parameters() if p.dim() > 1) == 412_032


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("resnet20_cifar", (2, 3, 32, 32), (2, 10)),
        ("dncnn", (1, 1, 33, 50), (1, 1, 33, 50)),
        ("dncnn_color", (1, 3, 20, 21), (1, 3, 20, 21)),
        ("carn_m", (1, 3, 11, 13), (1, 3, 44, 52)),
        ("demosaicnet", (1, 3, 80, 96), (1, 3, 18, 34)),
        ("mcnn", (1, 1, 65, 64), (1, 1, 17, 16)),
    ],
)
def test_output_shapes(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    with torch.no_grad():
        assert tuple(zoo.create(name).eval()(torch.rand(shape)).shape) == expected


def test_option_a_shortcut() -> None:
    """Every other pixel, eight zero channels on either side of the sixteen old ones."""
    model = zoo.create("resnet20_cifar")
    x = torch.rand(1, 16, 6, 6)
    out = model.layer2[0].shortcut(x)
    assert out.shape == (1, 32, 3, 3)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_dncnn_returns_the_image_without_the_noise() -> None:
    model = zoo.create("dncnn_color", depth=4, width=8)
    nn.init.zeros_(model.body[-1].weight)
    nn.init.constant_(model.body[-1].bias, 0.25)
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(model(x), x - 0.25)


def test_carn_scales() -> None:
    model = zoo.create("carn_m", scale=2, scales=(2, 3), width=16).eval()
    x = torch.rand(1, 3, 5, 7)
    with torch.no_grad():
        assert model(x).shape[-2:] == (10, 14)
        assert model(x, 3).shape[-2:] == (15, 21)
        with pytest.raises(ConfigError, match="x2, x3, not x4"):
            model(x, 4)


def test_grbg_mosaic() -> None:
    image = torch.arange(1.0, 13.0).view(1, 3, 2, 2)
    expected = torch.zeros_like(image)
    expected[0, 1, 0, 0], expected[0, 1, 1, 1] = image[0, 1, 0, 0], image[0, 1, 1, 1]
    expected[0, 0, 0, 1] = image[0, 0, 0, 1]
    expected[0, 2, 1, 0] = image[0, 2, 1, 0]
    assert torch.equal(grbg_mosaic(image), expected)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_loads_the_shipped_weights(name: str, data: Path) -> None:
    path = data / "weights" / SHIPPED[name]
    model = zoo.load_foreign(zoo.create(name), path, network=name)
    given = read_weights(path)[""]
    translated = translate(given, zoo.entry(name).layout)
    assert len(translated) == len(given) - (4 if name == "carn_m" else 0)  # CARN-M's constant mean shifts
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in translated.items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_own_weights_come_back(tmp_path: Path, suffix: str) -> None:
    model = zoo.create("resnet20_cifar")
    path = tmp_path / f"weights{suffix}"
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    else:
        save_file(state, path)
    other = zoo.load_foreign(zoo.create("resnet20_cifar"), path, network="resnet20_cifar")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_weights_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "dncnn.pth"
    torch.save(zoo.create("dncnn").state_dict(), path)
    with pytest.raises(ModelError, match=r"weights of another model: missing small\.0\.weight.* more"):
        zoo.load_foreign(zoo.create("mcnn"), path, network="mcnn")


def test_weights_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "resnet.pth"
    torch.save(zoo.create("resnet20_cifar", num_classes=100).state_dict(), path)
    with pytest.raises(ModelError, match=r"linear\.weight has shape \(100, 64\), expected \(10, 64\)"):
        zoo.load_foreign(zoo.create("resnet20_cifar"), path, network="resnet20_cifar")


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code ran",))


def test_no_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "harmful.pth"
    torch.save({"state_dict": _Harmful()}, path)
    with pytest.raises(ModelError, match=r"holds Python objects \(print\)"):
        read_weights(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}])
def test_not_a_state_dict(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(ModelError, match="contains no state dict"):
        read_weights(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no weights file"):
        read_weights(tmp_path / "none.pth")


# --- names ------------------------------------------------------------------------------------------------------------


def test_unknown_name() -> None:
    with pytest.raises(ModelError, match="Did you mean resnet20_cifar"):
        zoo.create("resnet20_cifr")


def test_unknown_option() -> None:
    with pytest.raises(ConfigError, match="'mcnn' cannot be built with depth=3"):
        zoo.create("mcnn", depth=3)


@pytest.mark.parametrize(
    ("name", "options"),
    [("dncnn", {"depth": 2}), ("carn_m", {"scale": 5}), ("carn_m", {"scales": ()}), ("demosaicnet", {"depth": 1})],
)
def test_bad_options(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="got "):
        zoo.create(name, **options)
