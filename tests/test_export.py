"""surgeon.export and the command: files that run without surgeon, checked, atomic, and clear words where it does not work."""

import errno
import importlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon import exported
from surgeon.cli import main
from surgeon.errors import ConfigError, ExportError
from tests.layer_contract import awaken, make, plain_conv, relative_error

export_module = importlib.import_module("surgeon.export")  # `surgeon.export` is the function

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("*.partial*")), "nothing half-written may stay"


def mixed() -> nn.Module:
    """All three layer types, with dynamic parts that do something."""
    layers = [awaken(make(kind, plain_conv(in_channels=c)), 0.1) for kind, c in (("acda", 6), ("pafu", 8), ("sekg", 8))]
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


class Fixed(nn.Module):
    """Takes images of one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(x).flatten(1))
        return y


class Eights(nn.Module):
    """Takes only sides that are multiples of 8, and gives two outputs."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError("sides must be multiples of 8")
        return {"half": x[:, :, ::2, ::2], "mean": x.mean((2, 3))}


class Patches(nn.Module):
    """Takes only sides that are multiples of 14, as DINOv2."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 14, 14)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 14 or x.shape[3] % 14:
            raise ValueError("sides must be multiples of 14")
        return self.embed(x).mean((2, 3))


class Dense(nn.Module):
    """Concatenates what a layer was given and what it made, as DenseNet does."""

    def __init__(self, kind: str, groups: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2))
        self.layer = awaken(make(kind, plain_conv(in_channels=8, groups=groups)), 0.1)
        self.after = nn.Sequential(nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.after(torch.cat([x, self.layer(x)], 1))
        return y


class Attention(nn.Module):
    """Attention with a bias, as in BEiT: fused kernels lay out its result as ONNX's formula does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 64, 4, 4)
        self.qkv = nn.Linear(64, 192)
        self.bias = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        n, length, width = tokens.shape
        q, k, v = self.qkv(tokens).view(n, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind()
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None].expand(n, -1, -1, -1))
        return y.transpose(1, 2).reshape(n, length, width)


class Windows(nn.Module):
    """Attention within windows, as in Hiera: its tensors have five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        n, length, width = tokens.shape
        q, k, v = self.qkv(tokens).view(n, 4, length // 4, 3, 2, width // 2).permute(3, 0, 4, 1, 2, 5).unbind()
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return y.permute(0, 2, 3, 1, 4).reshape(n, length, width)


class PerImage(nn.Module):
    """A kernel of its own for each image, as in CondConv: a convolution with as many groups as there are images."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernels = x.mean((2, 3)).view(n * c, 1, 1, 1).expand(-1, -1, 3, 3)
        return nn.functional.conv2d(x.reshape(1, n * c, h, w), kernels, groups=n * c).view(n, c, h - 2, w - 2)


class Untraceable(nn.Module):
    """Decides by the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class Wrong(nn.Module):
    """Computes something else while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.01 if torch.compiler.is_exporting() else 1.0)


def onnx_run(path: Path, x: Tensor) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]


def test_onnx_with_every_layer_type_and_free_sizes(tmp_path: Path) -> None:
    import onnx

    model = mixed()
    found = surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 32, 48))
    assert set(found.free) == {"batch", "height", "width"}
    assert found.fixed == {}
    assert found.foreign == []
    assert len(found.checks) == 4
    assert {c.shape[0] for c in found.checks} == {2, 3}
    assert {c.shape[2:] for c in found.checks} == {(32, 48), (64, 112)}
    file = onnx.load(tmp_path / "m.onnx")
    assert {node.domain for node in file.graph.node} == {""}
    assert not file.functions
    assert found.operators == len(file.graph.node)
    assert found.size == (tmp_path / "m.onnx").stat().st_size
    for shape in ((1, 3, 40, 24), (5, 3, 19, 33)):
        x = torch.randn(shape)
        assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-4


def test_a_torch_archive_loads_where_surgeon_is_not_imported(tmp_path: Path) -> None:
    model, x = mixed(), torch.randn(3, 3, 20, 28)
    surgeon.export(model, tmp_path / "m.pt2", format="torch", input_size=(3, 32, 32))
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "y = torch.export.load('m.pt2').module()(torch.load('x.pt'))\n"
        "assert not [name for name in sys.modules if name.startswith('surgeon')]\n"
        "torch.save(y, 'y.pt')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-P", "-c", code], check=True, cwd=tmp_path)
    assert relative_error(torch.load(tmp_path / "y.pt"), model(x)) <= 1e-5


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    surgeon.export(model, tmp_path / "m.pt2", format="torch", input_size=(3, 16, 16))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_the_model_does_not_allow_is_fixed_and_said(tmp_path: Path) -> None:
    found = surgeon.export(Fixed(), tmp_path / "m.onnx", input_size=(3, 8, 8))
    assert set(found.free) == {"batch"}
    assert set(found.fixed) == {"height", "width"}
    assert "takes no other size" in found.fixed["height"]
    assert {c.shape for c in found.checks} == {(2, 3, 8, 8), (3, 3, 8, 8)}
    with pytest.raises(ExportError, match="does not run at 40x72 or 36x64, only at 8x8"):
        surgeon.export(Fixed(), tmp_path / "n.onnx", input_size=(3, 8, 8), free="size")
    assert not (tmp_path / "n.onnx").exists()


def test_bounds_that_the_code_sets_are_kept_and_told(tmp_path: Path) -> None:
    found = surgeon.export(Eights(), tmp_path / "m.onnx", input_size=(3, 16, 16))
    assert found.free["height"].startswith("multiples of 8")
    x = torch.randn(1, 3, 24, 40)
    half, mean = onnx_run(tmp_path / "m.onnx", x)
    assert torch.equal(half, x[:, :, ::2, ::2])
    assert relative_error(mean, x.mean((2, 3))) <= 1e-5


def test_sizes_of_other_patches_than_32_are_free(tmp_path: Path) -> None:
    found = surgeon.export(model := Patches(), tmp_path / "m.onnx", input_size=(3, 28, 42))
    assert {found.free["height"], found.free["width"]} == {"multiples of 14"}
    assert (3, 3, 56, 98) in {check.shape for check in found.checks}
    x = torch.randn(1, 3, 42, 70)
    assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-5


def test_sizes_that_strides_reduce_to_a_pixel_stay_free_from_a_bound_on(tmp_path: Path) -> None:
    """torch.export refuses sizes whose map may be one pixel, and suggests nothing (torchvision's ResNets)."""
    strided = [nn.Conv2d(3 if i == 0 else 4, 4, 3, stride=2, padding=1) for i in range(4)]
    model = nn.Sequential(*strided, nn.AdaptiveAvgPool2d(1))
    found = surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 64, 48))
    assert found.free == {"batch": "any", "height": "at least 17", "width": "at least 17"}
    for shape in ((1, 3, 17, 40), (2, 3, 100, 33)):
        x = torch.randn(shape)
        assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-4


@pytest.mark.parametrize(("kind", "groups"), [("acda", 1), ("pafu", 1), ("pafu", 8), ("sekg", 1)])
def test_layers_keep_the_memory_format_of_what_they_are_concatenated_with(
    kind: str, groups: int, tmp_path: Path
) -> None:
    """Where formats meet, torch.export compares strides of symbolic size, and refuses to leave the image size free."""
    found = surgeon.export(Dense(kind, groups).eval(), tmp_path / "m.pt2", format="torch", input_size=(3, 64, 64))
    assert set(found.free) == {"batch", "height", "width"}


def test_onnxscripts_search_for_pairs_of_slices_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time grows with the square of the operations. The rule is as it was afterwards, also after a failure."""
    from onnxscript.rewriter.rules.common import slice_split_rule

    asked: list[Any] = []
    monkeypatch.setattr(type(slice_split_rule), "try_rewrite", lambda self, *rest, **options: asked.append(self))
    model, _ = surgeon.convert(nn.Conv2d(3, 4, 3, padding=1), layers="all", type="sekg", input_size=(3, 16, 16))
    surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 16, 16))
    assert asked
    assert slice_split_rule not in asked
    with pytest.raises(ExportError, match="the conversion to ONNX refuses"):
        surgeon.export(PerImage().eval(), tmp_path / "n.onnx", input_size=(3, 16, 16), free="size")
    assert "try_rewrite" not in vars(slice_split_rule)


@pytest.mark.parametrize(("attention", "free"), [(Attention, {"batch"}), (Windows, {"batch", "height", "width"})])
def test_attention_as_onnx_does_not_have_it(attention: type[nn.Module], free: set[str], tmp_path: Path) -> None:
    model = attention().eval()
    found = surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 16, 16))
    assert set(found.free) == free
    x = torch.randn(5, 3, 16, 16)
    assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-5


@pytest.mark.parametrize("kind", ["sekg", None])
def test_conditions_that_torch_export_cannot_solve_leave_sizes_free(kind: str | None, tmp_path: Path) -> None:
    """Pooling with `ceil_mode`, as in GoogLeNet and SENet: named dimensions fail there with an error of torch.export's own."""
    model: nn.Module = nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, 3),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(1),
    ).eval()
    if kind is not None:
        model, _ = surgeon.convert(model, layers="2", type=kind, input_size=(3, 64, 64))
        awaken(model[2], 0.1)
    found = surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 64, 64))
    assert found.free["batch"] == "any"
    assert set(found.free) == {"batch", "height", "width"}
    assert "could not solve" in found.free["height"]
    x = torch.randn(1, 3, 101, 77)
    assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-5


def test_the_channels_of_a_converted_first_layer_are_known(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3))
    converted, _ = surgeon.convert(model, layers="0", type="sekg", input_size=(5, 16, 16))
    found = surgeon.export(converted, tmp_path / "m.pt2", format="torch")
    assert found.input_shape[1] == 5


def test_sizes_at_which_the_file_does_not_run_are_fixed_and_said(tmp_path: Path) -> None:
    """ONNX has no adaptive pooling; what stands for it reaches over the edge of some maps (PSPNet's pyramid)."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(6))
    stages: list[str] = []
    found = surgeon.export(
        model, tmp_path / "m.onnx", input_size=(3, 20, 20), progress=lambda stage, done, total: stages.append(stage)
    )
    assert set(found.free) == {"batch"}
    assert found.fixed.keys() == {"height", "width"}
    assert "does not run at 2x3x52x84" in found.fixed["height"]
    assert stages.count("convert") == 2, "what is known to fail is not tried again"
    assert {c.shape for c in found.checks} == {(2, 3, 20, 20), (3, 3, 20, 20)}
    x = torch.randn(4, 3, 20, 20)
    assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-5
    with pytest.raises(ExportError, match="does not run at 2x3x52x84"):
        surgeon.export(model, tmp_path / "n.onnx", input_size=(3, 20, 20), free="size")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_what_only_the_format_does_not_allow_is_fixed_and_said(tmp_path: Path) -> None:
    found = surgeon.export(PerImage(), tmp_path / "m.onnx", input_size=(3, 16, 16))
    assert set(found.free) == {"height", "width"}
    assert found.fixed.keys() == {"batch"}
    assert "the conversion to ONNX refuses the model" in found.fixed["batch"]
    x = torch.randn(2, 3, 9, 14)
    assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], PerImage()(x)) <= 1e-5
    found = surgeon.export(PerImage(), tmp_path / "m.pt2", format="torch", input_size=(3, 16, 16))
    assert set(found.free) == {"batch", "height", "width"}
    with pytest.raises(ExportError, match="the conversion to ONNX refuses the model"):
        surgeon.export(PerImage(), tmp_path / "n.onnx", input_size=(3, 16, 16), free="size")


def test_less_may_be_asked_for(tmp_path: Path) -> None:
    found = surgeon.export(nn.Conv2d(3, 4, 3), tmp_path / "a.pt2", format="torch", input_size=(3, 9, 9), free="batch")
    assert set(found.free) == {"batch"}
    found = surgeon.export(nn.Conv2d(3, 4, 3), tmp_path / "b.pt2", format="torch", input_size=(3, 9, 9), free="none")
    assert found.free == {}
    assert found.fixed == dict.fromkeys(("batch", "height", "width"), "asked for")
    assert len(found.checks) == 1


@pytest.mark.parametrize(
    ("model", "said"), [(Untraceable(), "torch.export refuses Untraceable"), (Wrong(), "relative error 1.0e-02")]
)
def test_nothing_is_written_of_a_model_that_is_refused_or_differs(model: nn.Module, said: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(ExportError, match=said):
        surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 8, 8), force=True)
    assert (tmp_path / "m.onnx").read_text() == "old"


def test_a_model_of_other_inputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="only models of one batch of images"):
        surgeon.export(nn.Bilinear(2, 2, 2), tmp_path / "m.onnx", example_inputs=(torch.ones(1, 2), torch.ones(1, 2)))


def test_weights_that_one_onnx_file_cannot_hold_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "LARGE", 1000)
    model, path = mixed(), tmp_path / "m.onnx"
    for force in (False, True):
        made = surgeon.export(model, path, input_size=(3, 24, 24), free="batch", force=force)
        assert made.data == f"{path}.data"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
        assert made.size == sum(file.stat().st_size for file in tmp_path.iterdir())
        x = torch.randn(3, 3, 24, 24)
        assert relative_error(onnx_run(path, x)[0], model(x)) <= 1e-5
    before = [file.read_bytes() for file in sorted(tmp_path.iterdir())]
    monkeypatch.setattr(export_module, "read", lambda path, format: lambda images: [torch.zeros(len(images), 8)])
    with pytest.raises(ExportError, match="does not compute what the model computes"):
        surgeon.export(model, path, input_size=(3, 24, 24), free="none", force=True)
    assert [file.read_bytes() for file in sorted(tmp_path.iterdir())] == before
    path.unlink()
    with pytest.raises(ConfigError, match=r"m\.onnx\.data exists; choose another with -o"):
        surgeon.export(model, path, input_size=(3, 24, 24))
    monkeypatch.undo()
    made = surgeon.export(model, path, input_size=(3, 24, 24), free="none", force=True)
    assert made.data is None
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"], "weights of the one that was replaced"


def test_a_full_disk_is_no_refusal_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onnx.checker.check_model", full)
    with pytest.raises(ExportError, match=r"cannot write .*m\.onnx: No space left on device"):
        surgeon.export(Fixed(), tmp_path / "m.onnx", input_size=(3, 8, 8), free="none")


@pytest.mark.parametrize(("kind", "good_from", "draws"), [("pafu", 3, 3), ("pafu", 9, None), ("sekg", 3, None)])
def test_where_rounding_selects_another_kernel_other_images_are_drawn(
    kind: str, good_from: int, draws: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selection that is tied comes out otherwise in another program, which is wrong there; a wrong file is wrong everywhere."""
    read, asked = exported.read, 0

    def tied(path: Path, format: str) -> exported.Runner:
        runner = read(path, format)

        def run(images: Tensor) -> list[Tensor]:
            nonlocal asked
            asked += 1
            (found,) = runner(images)
            if asked < good_from:
                found = found.clone()
                found[0, 0, 2, 3] += 0.1
            return [found]

        return run

    monkeypatch.setattr(export_module, "read", tied)
    model, _ = surgeon.convert(nn.Conv2d(3, 4, 3, padding=1), layers="all", type=kind, input_size=(3, 16, 16))
    path = tmp_path / "m.pt2"
    if draws is None:
        with pytest.raises(ExportError, match="does not compute what the model computes"):
            surgeon.export(model, path, format="torch", input_size=(3, 16, 16), free="none")
        assert not path.exists()
    else:
        found = surgeon.export(model, path, format="torch", input_size=(3, 16, 16), free="none")
        assert [check.draws for check in found.checks] == [draws]
        assert found.checks[0].max_rel <= 1e-5
        assert found.to_dict()["checks"][0]["draws"] == draws


class Sharp(nn.Module):
    """Magnifies what float32 rounds of its input by 1e5."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1e5 * x)


@pytest.mark.parametrize(("wrong_by", "allowed"), [(1e-3, True), (0.9, False)])
def test_a_model_that_magnifies_rounding_is_allowed_what_it_does_to_itself(
    wrong_by: float, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = exported.read

    def other(path: Path, format: str) -> exported.Runner:
        runner = read(path, format)
        return lambda images: [output + wrong_by for output in runner(images)]

    monkeypatch.setattr(export_module, "read", other)
    words: Any = {"format": "torch", "input_size": (3, 16, 16), "free": "none"}
    if allowed:
        (check,) = surgeon.export(Sharp(), tmp_path / "m.pt2", **words).checks
        assert check.own is not None
        assert 1e-4 < check.max_rel <= 10 * check.own
        return
    with pytest.raises(
        ExportError, match=r"at most 0\.0001, or 10 times the .*e-0\d by which float32 moves the model itself"
    ):
        surgeon.export(Sharp(), tmp_path / "m.pt2", **words)


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (left := tmp_path / f".m.pt2.partial-{socket.gethostname()}-4194305").mkdir()  # a process that cannot be
    (left / "m.pt2").write_bytes(b"half")
    surgeon.export(Fixed(), tmp_path / "m.pt2", format="torch", input_size=(3, 8, 8), free="none")
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]


def test_a_missing_package_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = exported.importlib.util.find_spec
    monkeypatch.setattr(
        exported.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(
        ConfigError, match=r"needs onnxscript, .*pip install onnxscript, or pip install 'surgeon\[export\]'"
    ):
        surgeon.export(Fixed(), tmp_path / "m.onnx")
    surgeon.export(Fixed(), tmp_path / "m.pt2", format="torch", input_size=(3, 8, 8))  # needs none


def test_where_it_cannot_be_written_is_said_before_work_starts(tmp_path: Path) -> None:
    (tmp_path / "there.onnx").write_text("mine")
    for path, said in (("there.onnx", "exists"), (".", "is a folder"), ("no/such/m.onnx", "there is no folder")):
        with pytest.raises(ConfigError, match=said):
            surgeon.export(Fixed(), tmp_path / path)
    with pytest.raises(ConfigError, match="free must be one of"):
        surgeon.export(Fixed(), tmp_path / "m.onnx", free="all")
    with pytest.raises(ConfigError, match="the format must be one of"):
        surgeon.export(Fixed(), tmp_path / "m.onnx", format="tensorrt")
    assert (tmp_path / "there.onnx").read_text() == "mine"


# --- the command --------------------------------------------------------------------------------------------------


def converted() -> str:
    given = [
        "convert",
        "test_resnet",
        "--weights",
        "random",
        "--input-size",
        "64",
        "--layers",
        "stage3",
        "--type",
        "sekg",
    ]
    assert main(["convert", *given[1:], "--quiet", "--json", "-o", "run"]) == 0
    return "run"


def test_the_command_writes_and_tells(capsys: Capture) -> None:
    run = converted()
    capsys.readouterr()
    assert main(["export", run, "-o", "m.onnx", "--quiet", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["run"] == run
    assert found["input_shape"] == [2, 3, 64, 64]
    assert set(found["free"]) == {"batch", "height", "width"}
    assert all(check["rel_error"] <= 1e-4 for check in found["checks"])
    x = torch.randn(1, 3, 96, 64)
    assert relative_error(onnx_run(Path("m.onnx"), x)[0], surgeon.load(run)(x)) <= 1e-4
    assert main(["export", run, "-o", "m.onnx", "--quiet"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["export", run, "-o", "m.pt2", "--free", "none", "--quiet"]) == 0
    told = capsys.readouterr().out
    for part in ("torch, ", "(2, 3, 64, 64)", "fixed", "asked for", "written to"):
        assert part in told


def test_wrong_usage_is_said(capsys: Capture) -> None:
    cases = [
        (["lenet", "-o", "m.bin"], 2, "does not say the format"),
        (["zoo/lenet", "-o", "m.pt2", "--opset", "18"], 2, "--opset belongs to ONNX"),
        (["zoo/lenet", "-o", "m.onnx", "--opset", "0"], 2, "--opset must be at least 1"),
        (["zoo/lenett", "-o", "m.onnx", "--weights", "random"], 2, "lenett"),
        (["zoo/lenet", "-o", "m.pt2", "--weights", "random", "--free", "size"], 1, "does not run at"),
    ]
    for words, code, said in cases:
        assert main(["export", *words, "--quiet"]) == code, words
        assert said in capsys.readouterr().err
    assert not list(Path().iterdir())
