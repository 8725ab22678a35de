"""Models whose objects hold more than their modules: what a copy, a mode or a folder would lose is refused or told."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.errors import InputError, ModelError, ReadOnlyError, VerificationError
from surgeon.layers.registry import layer_types
from surgeon.models.weights import state_sha256

LAZY = "its parameters are not initialized yet: run the model once first"
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out


class Unregistered(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = [nn.Conv2d(8, 8, 3, padding=1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.more[0](super().forward(x))


class Closure(Net):
    def __init__(self) -> None:
        super().__init__()
        second = self.second
        self.call = lambda x: second(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.first(x).relu())


class Listening(Net):
    """A hook writes where the copy does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}
        seen = self.seen
        self.first.register_forward_hook(lambda module, args, out: seen.__setitem__("mean", out.mean()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.seen["mean"]


class Merged(nn.Conv2d):
    """An adapter that is added in training, and merged in eval mode."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.added = nn.Parameter(0.1 * torch.randn_like(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            return super().forward(input) + F.conv2d(input, self.added, padding=1)
        return self._conv_forward(input, self.weight + self.added, self.bias)


def converted(model: nn.Module, layers: str, **options: Any) -> Any:
    return surgeon.convert(model, layers=layers, type="pafu", example_inputs=X, **options)


def test_convolutions_outside_the_module_tree_are_told() -> None:
    _, report = converted(Unregistered().eval(), "second")
    (note,) = [note for note in report.notes if "outside the module tree" in note]
    assert "runs 1 convolution (8>8 3x3), which cannot be replaced, counted or saved" in note


def test_modules_that_a_copy_shares_with_the_original_are_told() -> None:
    _, report = converted(Closure().eval(), "first")
    (note,) = [note for note in report.notes if "are not copied" in note]
    assert note.startswith("second: the functions call hold modules of the given model")
    _, report = converted(Closure().eval(), "first", inplace=True)
    assert not [note for note in report.notes if "are not copied" in note or "module tree" in note]


def test_a_copy_that_computes_something_else_is_no_reference() -> None:
    model = Listening().eval()
    model(9 * X + 5)
    with pytest.raises(VerificationError, match="a copy of Listening computes something else"):
        converted(model, "second")
    with pytest.raises(InputError, match="KeyError: 'mean'"):
        converted(Listening().eval(), "second")


def test_a_convolution_of_ones_own_comes_back_as_it_was_read(tmp_path: Path) -> None:
    model = Net()
    model.second = Merged(8, 8, 3, padding=1)
    changed, report = converted(model.eval(), "second")
    assert list(report.replaced[0].notes) == [
        "the new layer computes what Merged does in eval mode, and has nothing else of it"
    ]
    surgeon.save(changed, tmp_path / "run", report=report)
    base = Net()
    base.second = Merged(8, 8, 3, padding=1)
    assert torch.equal(surgeon.load(tmp_path / "run", base=base)(X), changed(X))


def test_a_convolution_that_only_has_another_name_is_a_convolution() -> None:
    class Renamed(nn.Conv2d):
        pass

    model = Net()
    model.second = Renamed(8, 8, 3, padding=1)
    assert not converted(model.eval(), "second")[1].replaced[0].notes


@pytest.mark.parametrize("kind", layer_types())
def test_channels_last_models_collapse(kind: str) -> None:
    model = Net().eval().to(memory_format=torch.channels_last)
    changed, _ = surgeon.convert(model, layers="second", type=kind, example_inputs=X)
    _, report = surgeon.collapse(changed, input_size=16)
    assert [found.name for found in report.folded] == ["second"]


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups", "padding_mode"])
def test_the_geometry_of_a_layer_is_not_ignored_when_it_is_set(name: str) -> None:
    changed, _ = converted(Net().eval(), "second")
    with pytest.raises(ReadOnlyError, match=f"{name} of a dynamic layer is read-only"):
        setattr(changed.second, name, getattr(changed.second, name))


def test_a_lazy_first_layer_has_no_shape_yet() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    _, report = surgeon.convert(model.eval(), layers="all", type="pafu", input_size=16)
    assert [list(site.reasons) for site in report.skipped] == [[LAZY]]
    with pytest.raises(ModelError, match="Sequential has lazy layers whose parameters are not initialized yet"):
        state_sha256(model)
