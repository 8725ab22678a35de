"""What surgeon.export leaves free: batch and image size, their bounds, and the reasons why not."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import ExportError
from surgeon.exporting.trace import _bounds, _sizes
from tests.support.export_models import Attention, Dense, Eights, Fixed, Patches, PerImage, Windows, onnx_run
from tests.support.layers.contract import awaken, relative_error

export_module = importlib.import_module("surgeon.exporting.export")  # `surgeon.export` is the function

pytestmark = pytest.mark.usefixtures("nothing_half_written")


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
    assert found.free["height"] == "multiples of 8; the model takes no 20x28: ValueError: sides must be multiples of 8"
    x = torch.randn(1, 3, 24, 40)
    half, mean = onnx_run(tmp_path / "m.onnx", x)
    assert torch.equal(half, x[:, :, ::2, ::2])
    assert relative_error(mean, x.mean((2, 3))) <= 1e-5


def test_sizes_of_other_patches_than_32_are_free(tmp_path: Path) -> None:
    found = surgeon.export(model := Patches(), tmp_path / "m.onnx", input_size=(3, 28, 42))
    assert {found.free["height"].split(";")[0], found.free["width"].split(";")[0]} == {"multiples of 14"}
    assert (3, 3, 56, 98) in {check.shape for check in found.checks}
    x = torch.randn(1, 3, 42, 70)
    assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-5


@pytest.mark.parametrize("side", [32, 24])
def test_sizes_are_no_multiples_where_only_torch_exports_solver_needs_them(side: int, tmp_path: Path) -> None:
    """ResNet-D: from `ceil_mode` it derives the divisor and the remainder of the example."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        Sum(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)),
        nn.AdaptiveAvgPool2d(1),
    )
    found = surgeon.export(model, tmp_path / "m.onnx", input_size=side)
    assert found.free == {"batch": "any", "height": "any, by trial", "width": "any, by trial"}
    assert (2, 3, side + 1, side + 3) in {check.shape for check in found.checks}
    for shape in ((1, 3, 17, 40), (2, 3, 100, 35)):
        x = torch.randn(shape)
        assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-5
    archive = surgeon.export(model, tmp_path / "m.pt2", input_size=side)
    least = int(archive.free["width"].removeprefix("at least ").removesuffix(", by trial"))
    assert archive.free["height"] == archive.free["width"]
    x = torch.randn(2, 3, least, least)
    run = torch.export.load(tmp_path / "m.pt2").module()
    assert relative_error(run(x), model(x)) <= 1e-5


def test_a_network_that_pads_where_it_must_takes_every_size_in_onnx(tmp_path: Path) -> None:
    """A file that was traced without padding takes only those sizes; ONNX is traced with it, where an archive has guards."""
    found = surgeon.export(Padded(), tmp_path / "m.pt2", input_size=(3, 16, 32))
    assert found.free["height"].startswith("multiples of 4; the exported file does not run at 2x3x17x35: ")
    assert "free      height, width: multiples of 4" in str(found)
    for size in ((3, 16, 32), (3, 18, 34)):
        found = surgeon.export(model := Padded(), tmp_path / "m.onnx", input_size=size, force=True)
        assert found.free["height"] == "any, by trial"
        assert found.input_shape == (2, *size)
        assert found.input_shape in {check.shape for check in found.checks}
        for shape in ((1, 3, 8, 12), (2, 3, 21, 7)):
            x = torch.randn(shape)
            assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-5


def test_a_grid_that_does_not_begin_at_its_step_is_spelled_out() -> None:
    side = 4 * torch.export.Dim("side") + 2
    program = torch.export.export(nn.ReLU(), (torch.randn(1, 3, 18, 8),), dynamic_shapes=({2: side},))
    assert _bounds(_sizes(program)[2], program, "reason") == "6, 10, 14, … (in steps of 4); reason"


def test_sizes_that_strides_reduce_to_a_pixel_stay_free_from_a_bound_on(tmp_path: Path) -> None:
    """torch.export refuses sizes whose map may be one pixel, and suggests nothing (torchvision's ResNets)."""
    strided = [nn.Conv2d(3 if i == 0 else 4, 4, 3, stride=2, padding=1) for i in range(4)]
    model = nn.Sequential(*strided, nn.AdaptiveAvgPool2d(1))
    found = surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 64, 48))
    assert found.free == {"batch": "any", "height": "at least 17", "width": "at least 17"}
    for shape in ((1, 3, 17, 40), (2, 3, 100, 33)):
        x = torch.randn(shape)
        assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-4


def test_control_flow_by_values_is_one_error_with_its_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.mean() > 0 else x

    with pytest.raises(ExportError, match=r"data-dependent.* at .*test_trace\.py:\d+: return x \* 2 if .*; nothing"):
        surgeon.export(Branch(), tmp_path / "m.pt2", input_size=(3, 8, 8))
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
@pytest.mark.parametrize(("kind", "groups"), [("acda", 1), ("pafu", 1), ("pafu", 8), ("sekg", 1)])
def test_layers_keep_the_memory_format_of_what_they_are_concatenated_with(
    kind: str, groups: int, tmp_path: Path
) -> None:
    """Where formats meet, torch.export compares strides of symbolic size, and refuses to leave the image size free."""
    found = surgeon.export(Dense(kind, groups).eval(), tmp_path / "m.pt2", format="torch", input_size=(3, 64, 64))
    assert set(found.free) == {"batch", "height", "width"}


@pytest.mark.long
def test_onnxscripts_search_for_pairs_of_slices_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time grows with the square of the operations. The rule is as it was afterwards, also after a failure."""
    from onnxscript.rewriter.rules.common import slice_split_rule

    asked: list[Any] = []
    monkeypatch.setattr(type(slice_split_rule), "try_rewrite", lambda self, *rest, **options: asked.append(self))
    model, _ = surgeon.convert(nn.Conv2d(3, 4, 3, padding=1), layers="all", type="sekg", input_size=(3, 16, 16))
    surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 16, 16), free="none")
    assert asked
    assert slice_split_rule not in asked
    with pytest.raises(ExportError, match="the conversion to ONNX refuses"):
        surgeon.export(PerImage().eval(), tmp_path / "n.onnx", input_size=(3, 16, 16), free="size")
    assert "try_rewrite" not in vars(slice_split_rule)


@pytest.mark.long
@pytest.mark.parametrize(("attention", "free"), [(Attention, {"batch"}), (Windows, {"batch", "height", "width"})])
def test_attention_as_onnx_does_not_have_it(attention: type[nn.Module], free: set[str], tmp_path: Path) -> None:
    model = attention().eval()
    found = surgeon.export(model, tmp_path / "m.onnx", input_size=(3, 16, 16))
    assert set(found.free) == free
    x = torch.randn(5, 3, 16, 16)
    assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-5


@pytest.mark.long
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
    assert found.free["height"].endswith("by trial")
    x = torch.randn(1, 3, 101, 77)
    assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-5


def test_a_size_that_the_code_fixes_is_an_error_where_it_was_asked_to_be_free(tmp_path: Path) -> None:
    class Fixing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * int(x.shape[2]) * int(x.shape[3])

    with pytest.raises(
        ExportError, match="the image size cannot be free: the model's code fixes it at 16; nothing was"
    ):
        surgeon.export(Fixing(), tmp_path / "m.pt2", input_size=(3, 16, 16), free="size")
    assert not list(tmp_path.iterdir())
    assert set(surgeon.export(Fixing(), tmp_path / "m.pt2", input_size=(3, 16, 16)).free) == {"batch"}


class Sum(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (branch(x) for branch in self.branches)
        return first + second


class Padded(nn.Module):
    """Pads to multiples of 4 if it must, as restorers do before they reduce an image."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 4, stride=4)
        self.up = nn.ConvTranspose2d(8, 3, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height % 4 or width % 4:
            x = nn.functional.pad(x, (0, -width % 4, 0, -height % 4))
        return x[..., :height, :width] + self.up(self.down(x))[..., :height, :width]


class Enlarged(nn.Module):
    """A restorer with a bicubic skip, as super-resolution has it: torch.export cannot solve what a factor does to a size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = nn.functional.interpolate(x, scale_factor=2, mode="bicubic")
        return skip + nn.functional.pixel_shuffle(self.conv(x), 2)


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_skip_that_is_interpolated_by_a_factor_leaves_sizes_free(suffix: str, tmp_path: Path) -> None:
    found = surgeon.export(model := Enlarged().eval(), tmp_path / f"m.{suffix}", input_size=(3, 48, 48))
    assert set(found.free) == {"batch", "height", "width"}
    x = torch.randn(1, 3, 61, 45)
    if suffix == "onnx":
        assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-5
    else:
        assert relative_error(torch.export.load(tmp_path / "m.pt2").module()(x), model(x)) <= 1e-6


def test_the_channels_of_a_converted_first_layer_are_known(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3))
    converted, _ = surgeon.convert(model, layers="0", type="sekg", input_size=(5, 16, 16))
    found = surgeon.export(converted, tmp_path / "m.pt2", format="torch")
    assert found.input_shape[1] == 5


@pytest.mark.long
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
    assert stages.count("write onnx") == 2, "what is known to fail is not tried again"
    assert {c.shape for c in found.checks} == {(2, 3, 20, 20), (3, 3, 20, 20)}
    x = torch.randn(4, 3, 20, 20)
    assert relative_error(onnx_run(tmp_path / "m.onnx", x)[0], model(x)) <= 1e-5
    with pytest.raises(ExportError, match="does not run at 2x3x52x84"):
        surgeon.export(model, tmp_path / "n.onnx", input_size=(3, 20, 20), free="size")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.long
def test_what_only_the_format_does_not_allow_is_fixed_and_said(tmp_path: Path) -> None:
    found = surgeon.export(PerImage(), tmp_path / "m.onnx", input_size=(3, 16, 16))
    assert set(found.free) == {"height", "width"}
    assert found.fixed.keys() == {"batch"}
    assert "the conversion to ONNX refuses the model" in found.fixed["batch"]
    assert found.fixed["batch"].endswith("; for 1 image at a time")
    x = torch.randn(1, 3, 9, 14)
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
    assert found.fixed == dict.fromkeys(("height", "width"), "asked for") | {
        "batch": "asked for; for 1 image at a time"
    }
    assert [check.shape for check in found.checks] == [(1, 3, 9, 9)]


@pytest.mark.long
def test_a_fixed_batch_is_one_image_unless_it_is_the_callers_or_the_models_own(tmp_path: Path) -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * int(x.shape[0])

    found = surgeon.export(Counts(), tmp_path / "a.onnx", input_size=(3, 9, 9))
    assert set(found.free) == {"height", "width"}
    assert found.fixed == {"batch": "the model's code fixes it; for 1 image at a time"}
    x = torch.randn(1, 3, 9, 9)
    assert onnx_run(tmp_path / "a.onnx", x)[0].equal(x)
    found = surgeon.export(Counts(), tmp_path / "b.onnx", example_inputs=torch.randn(3, 3, 9, 9), free="none")
    assert found.fixed["batch"] == "asked for; for 3 images at a time"
    program: Any = torch.export.export(Counts(), (torch.randn(2, 3, 9, 9),)).module()
    assert surgeon.export(program, tmp_path / "c.onnx", free="none").input_shape == (2, 3, 9, 9)


def test_free_batch_is_still_tried_after_free_sizes_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = export_module.traced

    def no_sizes(model: nn.Module, shapes: Any, names: tuple[str, ...]) -> Any:
        if "height" in names:
            raise ExportError("no")
        return traced(model, shapes, names)

    monkeypatch.setattr(export_module, "traced", no_sizes)
    found = surgeon.export(nn.Conv2d(3, 4, 3), tmp_path / "m.pt2", input_size=(3, 9, 9))
    assert [check.shape for check in found.checks] == [(2, 3, 9, 9), (3, 3, 9, 9)]
