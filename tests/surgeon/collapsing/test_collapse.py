"""surgeon.collapse: what does not vary becomes a convolution with the same outputs, what varies stays, and all is told."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import surgeon
from surgeon.errors import (
    CheckpointError,
    ConfigError,
    NothingFoldedError,
    RecipeError,
    SelectionError,
    VerificationError,
)
from surgeon.layers import DynamicConv2d, PAFUConv2d
from surgeon.models.checkpoint import read_report
from surgeon.records.collapse_report import CollapseReport
from surgeon.records.recipe import Recipe, get_recipe
from surgeon.surgery.rewrite import dynamic_layers, folded_windows, plain_convolution
from tests.support.fake_layer import FakeConv2d
from tests.support.layers.constant import TYPES, hidden_from_input, images, network, output, shift_static, vary
from tests.support.layers.contract import (
    make,
    plain_conv,
    relative_error,
)

# --- a network ----------------------------------------------------------------------------------------------------


def test_units_that_select_one_kernel_each_become_plain_convolutions() -> None:
    original = timm.create_model("resnet18", num_classes=10).eval()
    x = images(2)
    model, _ = surgeon.convert(original, layers="all", type="pafu", group_size=3, example_inputs=x, check=False)
    for number, layer in enumerate(dynamic_layers(model).values()):
        assert isinstance(layer, PAFUConv2d)
        with torch.no_grad():
            layer.further_kernels.add_(0.3 * layer.further_kernels.std() * torch.randn_like(layer.further_kernels))
            layer.selector.expand.bias[number % 3] = 5.0
    folded, report = surgeon.collapse(model, example_inputs=x)
    assert len(report.folded) == len(report.layers) == 17
    assert not dynamic_layers(folded)
    assert repr(folded) == repr(original)
    assert {key: value.shape for key, value in folded.state_dict().items()} == {
        key: value.shape for key, value in original.state_dict().items()
    }
    assert relative_error(output(folded, x), output(model.eval(), x)) <= 1e-5
    assert report.max_rel_error is not None
    assert report.max_rel_error <= 1e-5
    plain = surgeon.cost(original, mode="infer", input_size=64)
    assert report.flops_after == plain.flops == surgeon.cost(folded, mode="infer", input_size=64).flops
    assert report.params_after == plain.params
    assert report.flops_before == surgeon.cost(model, mode="infer", input_size=64).flops
    assert f") at {report.input_size[1]}x{report.input_size[2]} (1 MAC = 2 FLOPs)" in report.to_text()
    macs = sum(layer.macs_after or 0 for layer in report.layers)
    assert report.flops_after - 2 * macs < 0.2 * report.flops_after  # the rest: stem, 1x1 shortcuts, the head


@pytest.mark.parametrize("kind", TYPES)
def test_layers_that_vary_are_kept(kind: str) -> None:
    model = network(kind)
    names = list(dynamic_layers(model))
    vary(dynamic_layers(model)[names[0]])
    x = images()
    folded, report = surgeon.collapse(model, calibration=x)
    assert [layer.name for layer in report.kept] == names[:1]
    assert list(dynamic_layers(folded)) == names[:1]
    kept = report.kept[0]
    assert kept.reason in (
        "variation over the images beyond the tolerance, 0",
        "variation that no tolerance folds: its static part is two convolutions, which differ from one near the borders",
    )
    assert kept.variation is not None
    assert kept.variation > 0
    assert (kept.params_after, kept.macs_after) == (kept.params_before, kept.macs_before)
    assert relative_error(output(folded, x), output(model, x)) <= 1e-5
    assert list(dynamic_layers(model)) == names, "the caller's model is untouched"


def test_no_tolerance_is_advised_for_a_layer_that_none_folds() -> None:
    model = network("sekg")
    for layer in dynamic_layers(model).values():
        vary(layer)
    with pytest.raises(NothingFoldedError) as caught:
        surgeon.collapse(model, calibration=images(), tolerance=0.5)
    assert "no tolerance folds" in str(caught.value)
    assert "varies least" not in str(caught.value)


def test_without_images_only_proofs_count() -> None:
    model = network("pafu")
    first, *rest = dynamic_layers(model)
    hidden_from_input(dynamic_layers(model)[first])
    folded, report = surgeon.collapse(model, example_inputs=images())
    assert [layer.name for layer in report.folded] == rest
    assert report.images == 0
    assert "no images were given" in report.kept[0].reason
    _, report = surgeon.collapse(folded, calibration=images())
    assert [(layer.name, layer.evidence, layer.told) for layer in report.folded] == [
        (first, "images", "kernel 2 at 100 % of the pixels")
    ]
    assert report.images == 3
    assert any("hold for these images" in note for note in report.notes)


@pytest.mark.parametrize("kind", TYPES)
def test_tolerance_is_monotonic_and_its_error_is_stated(kind: str) -> None:
    model = network(kind, **({"mode": "factorised"} if kind == "sekg" else {}))
    for i, layer in enumerate(dynamic_layers(model).values()):
        vary(layer, (0.2 if kind == "pafu" else 0.02) * (i + 1))
    x = images()
    with pytest.raises(NothingFoldedError, match="folds the layer that varies least") as caught:
        surgeon.collapse(model, calibration=x)
    assert isinstance(caught.value.report, CollapseReport)
    (proposed,) = re.findall(r"\. tolerance=(\S+) folds the layer", str(caught.value))
    assert len(surgeon.collapse(model, calibration=x, tolerance=float(proposed))[1].folded) >= 1
    seen = sorted(layer.variation or 0 for layer in caught.value.report.layers)
    counts, errors = [], []
    for limit in [seen[0], (seen[0] + seen[1]) / 2, seen[1], seen[2]]:
        _, report = surgeon.collapse(model, calibration=x, tolerance=limit)
        counts.append(len(report.folded))
        assert not report.exact
        assert report.max_rel_error is not None
        errors.append(report.max_rel_error)
        assert all((layer.variation or 0) <= limit for layer in report.folded)
    assert counts == [1, 1, 2, 3]
    assert errors[0] == errors[1] > 0
    assert "not exact by choice" in report.to_text()


def test_a_layer_folded_at_its_mean_has_the_error_that_is_stated() -> None:
    model = network("acda")
    for layer in dynamic_layers(model).values():
        vary(layer, 0.01)
    x = images()
    folded, report = surgeon.collapse(model, calibration=x, tolerance=0.9)
    error = relative_error(output(folded, x), output(model, x))
    assert report.max_rel_error == pytest.approx(error, rel=1e-3)
    assert report.params_after > report.params_before  # the 7x7 windows of three scales
    (note,) = [note for note in report.notes if note.startswith("LARGER than before")]
    assert f"x{report.params_after / report.params_before:.2f} parameters" in note
    assert "7x7 convolutions" in note
    assert "or no collapse at all" in note  # every layer grows
    assert "--scales 1" in note


def test_a_collapse_that_makes_smaller_has_no_such_note() -> None:
    model = network("pafu")
    _, report = surgeon.collapse(model, calibration=images(), tolerance=0.9)
    assert report.params_after < report.params_before
    assert not any(note.startswith("LARGER") for note in report.notes)


def test_layers_can_be_chosen_and_the_others_are_reported() -> None:
    model = network("pafu")
    names = list(dynamic_layers(model))
    folded, report = surgeon.collapse(model, layers="layer4", example_inputs=images())
    assert [layer.name for layer in report.layers] == names
    assert {layer.reason for layer in report.kept} == {"not selected"}
    assert list(dynamic_layers(folded)) == [name for name in names if not name.startswith("layer4")]
    with pytest.raises(SelectionError, match="'layer9' is not a dynamic layer"):
        surgeon.collapse(model, layers="layer9", example_inputs=images())


def test_a_layer_that_does_not_run_is_kept_unless_proved() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    model, _ = surgeon.convert(Idle(), layers="all", type="acda", example_inputs=images(1))
    both, report = surgeon.collapse(model, calibration=images(1))
    assert len(report.folded) == 2
    assert not dynamic_layers(both)
    vary(model.get_submodule("idle"))
    _, report = surgeon.collapse(model, calibration=images(1))
    assert [(layer.name, layer.reason) for layer in report.kept] == [("idle", "not reached by the forward pass")]


def test_a_type_that_does_not_say_what_varies_is_kept() -> None:
    model = nn.Sequential(make("acda", plain_conv()), FakeConv2d.from_conv(plain_conv(in_channels=8)))
    _, report = surgeon.collapse(model, calibration=torch.randn(2, 6, 9, 9))
    assert [(layer.name, layer.reason) for layer in report.kept] == [
        ("1", "layers of type fake do not expose what varies in them")
    ]


def test_a_dense_sekg_layer_that_left_the_identity_is_kept_with_the_reason() -> None:
    model = nn.Sequential(make("acda", plain_conv()), shift_static(make("sekg", plain_conv(in_channels=8))))
    _, report = surgeon.collapse(model, example_inputs=torch.randn(2, 6, 9, 9))
    assert len(report.folded) == 1
    assert "differ from one near the borders" in report.kept[0].reason


def test_a_wrong_folding_is_refused_and_the_model_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("pafu")
    names = list(dynamic_layers(model))
    make_conv = plain_convolution

    def flawed(layer: DynamicConv2d, name: str = "") -> nn.Conv2d:
        conv = make_conv(layer, name)
        with torch.no_grad():
            conv.weight.mul_(1.01)
        return conv

    monkeypatch.setattr(sys.modules["surgeon.collapsing.collapse"], "plain_convolution", flawed)
    with pytest.raises(VerificationError, match="is not equivalent to the original"):
        surgeon.collapse(model, example_inputs=images(), inplace=True)
    assert list(dynamic_layers(model)) == names


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan"), "half", True])
def test_a_tolerance_out_of_range_is_refused(tolerance: Any) -> None:
    with pytest.raises(ConfigError, match="tolerance"):
        surgeon.collapse(network("pafu"), tolerance=tolerance)


def test_there_must_be_a_dynamic_layer() -> None:
    with pytest.raises(SelectionError, match="nothing to collapse"):
        surgeon.collapse(nn.Conv2d(3, 4, 3))


def test_float64_settles_what_depth_amplifies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("acda")
    monkeypatch.setattr(sys.modules["surgeon.surgery.verify"], "TOLERANCE", 1e-12)
    _, report = surgeon.collapse(model, calibration=images())
    assert report.precision == "float64"
    assert report.max_rel_error is not None
    assert report.max_rel_error <= 1e-10


# --- on disk ------------------------------------------------------------------------------------------------------


def test_round_trip_of_a_collapsed_model(tmp_path: Path) -> None:
    model = network("acda")
    first, *_ = dynamic_layers(model)
    for name, layer in dynamic_layers(model).items():
        (vary if name == first else shift_static)(layer)
    x = images()
    folded, report = surgeon.collapse(model, calibration=x)
    windows = folded_windows(folded)
    assert len(windows) == 2
    assert set(windows.values()) == {(7, 7)}
    recipe = get_recipe(folded)
    assert recipe is not None
    assert [(rule.layers, rule.type) for rule in recipe.rules] == [
        (first, "acda"),
        *((name, "conv") for name in windows),
    ]
    surgeon.save(folded, tmp_path / "run", report=report)
    again = surgeon.load(tmp_path / "run")
    assert torch.equal(output(again, x), output(folded, x))
    assert repr(again) == repr(folded)
    assert folded_windows(again) == windows
    found = read_report(tmp_path / "run")
    assert isinstance(found, CollapseReport)
    assert found.to_dict() == report.to_dict()
    assert (tmp_path / "run" / "report.txt").read_text() == report.to_text()
    surgeon.save(again, tmp_path / "twice")
    assert torch.equal(output(surgeon.load(tmp_path / "twice"), x), output(folded, x))
    with pytest.raises(ConfigError, match="recipe is that of a collapsed model"):
        surgeon.convert(timm.create_model("test_resnet"), recipe=Recipe.read(tmp_path / "run"))


def test_odd_geometries_survive_the_round_trip(tmp_path: Path) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            timm.layers.create_conv2d(4, 4, 3, stride=2, padding="same"),
            timm.layers.StdConv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, 4, stride=2, padding=1, dilation=2, groups=2),
        )

    x = torch.randn(2, 3, 33, 30)
    model, _ = surgeon.convert(plain(), layers="all", type="acda", example_inputs=x)
    for layer in dynamic_layers(model).values():
        shift_static(layer)
    folded, report = surgeon.collapse(model, example_inputs=x)
    assert len(report.folded) == 4
    assert relative_error(output(folded, x), output(model, x)) <= 1e-5
    surgeon.save(folded, tmp_path / "run")
    again = surgeon.load(tmp_path / "run", base=plain())
    assert torch.equal(output(again, x), output(folded, x))


def test_verify_takes_a_collapsed_run(tmp_path: Path) -> None:
    original = nn.Sequential(timm.layers.StdConv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3))
    x = torch.randn(2, 3, 20, 20)
    model, _ = surgeon.convert(original, layers="all", type="acda", example_inputs=x)
    folded, _ = surgeon.collapse(model, example_inputs=x)
    assert type(folded[0]) is nn.Conv2d
    found = surgeon.verify(original, folded, x)
    assert found.exact
    assert list(found.layers) == ["0"]


@pytest.mark.parametrize("options", [{}, {"window": [3]}, {"window": [3, 0]}, {"window": "3x3"}, {"size": [3, 3]}])
def test_a_damaged_convolution_rule_is_refused(options: dict[str, Any]) -> None:
    rules = [{"layers": "layer1", "type": "conv", "options": options}]
    with pytest.raises(RecipeError, match="window"):
        Recipe.from_dict({"format": "surgeon-recipe", "version": 1, "rules": rules})


def test_a_convolution_rule_needs_a_convolution() -> None:
    from surgeon.models.checkpoint import apply_rules
    from surgeon.records.recipe import Rule

    rule = Rule(layers="0", type="conv", options={"window": [3, 3]})
    with pytest.raises(RecipeError, match="cannot become a 3x3 convolution"):
        apply_rules(nn.Sequential(nn.Linear(3, 3)), (rule,), "here")


def test_a_report_that_is_none_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not a report of a collapse"):
        CollapseReport.from_dict({"layers": [{"nonsense": 1}]})
