"""Block patterns: residual blocks become DCBs, exactly, in trees and in graphs."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, fx, nn

import surgeon
from surgeon.cli import main
from surgeon.errors import ConfigError, SelectionError
from surgeon.passes import DynamicConvPass
from surgeon.surgery.blocks import find_blocks
from surgeon.surgery.rewrite import dynamic_layers
from tests.support.forks import Fork

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
FIRST = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3, 4) for block in (0, 1)]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("how", ["tree", pytest.param("fx", marks=pytest.mark.slow), "export"])
def test_residual_blocks_of_a_resnet_become_dcbs(how: str) -> None:
    model = timm.create_model("resnet18", num_classes=10).eval()
    given: nn.Module = model
    if how != "tree":
        given = fx.symbolic_trace(model) if how == "fx" else torch.export.export(model, (X,)).module()
    converted, report = surgeon.convert(given, pattern="dcb", example_inputs=X)
    assert [entry.name for entry in report.replaced] == FIRST
    assert {(layer.type_name, layer.config.mode) for layer in dynamic_layers(converted).values()} == {("sekg", "dense")}
    with torch.no_grad():
        assert relative(model(X), converted(X)) <= 1e-5


def test_patterns_are_narrowed_by_selections_and_work_in_the_pass() -> None:
    graph = fx.symbolic_trace(timm.create_model("resnet18").eval())
    own = DynamicConvPass("stage3", pattern="dcb", kernel_groups=4, example_inputs=X)
    own(graph)
    assert list(dynamic_layers(graph)) == ["layer3.0.conv1", "layer3.1.conv1"]
    with pytest.raises(SelectionError, match="contains no first convolution of a residual block"):
        surgeon.convert(timm.create_model("resnet18"), layers="conv1", pattern="dcb", example_inputs=X)


def test_only_residual_blocks_match() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.e, self.f = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.b(torch.relu(self.a(x)))  # a block
            inner = torch.relu(self.c(y))
            z = y + self.d(inner) + inner  # its inside is read elsewhere
            return self.f(torch.relu(self.e(z))) + torch.ones(1)  # adds a constant

    assert find_blocks(Net(), "dcb") == {"a": "b"}
    with pytest.raises(SelectionError, match="has no residual block"):
        find_blocks(nn.Sequential(nn.Conv2d(3, 3, 3)), "dcb")


def load_and_compare(arguments: Sequence[str]) -> None:
    run, expected = arguments
    x, y = torch.load(expected)
    torch.testing.assert_close(surgeon.load(run)(x), y, rtol=1e-5, atol=1e-6)


def test_a_folder_with_blocks_is_rebuilt_in_a_fresh_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["convert", "resnet18", "--weights", "random", "--pattern", "dcb", "--layers", "stage2", "-o", str(run)]
    assert main([*arguments, "--input-size", "64", "--quiet"]) == 0
    expected = surgeon.load(run)(X)
    torch.save((X, expected.detach()), tmp_path / "expected.pth")
    child = Fork(load_and_compare, [str(run), str(tmp_path / "expected.pth")])
    _, error = child.communicate()
    assert child.returncode == 0, error


def test_what_a_pattern_cannot_be_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model("resnet18")
    with pytest.raises(ConfigError, match="dense block cannot become an equivalent MDCB"):
        surgeon.convert(model, pattern="mdcb", example_inputs=X)
    with pytest.raises(ConfigError, match="a pattern is one of dcb, mdcb"):
        surgeon.convert(model, pattern="cb", example_inputs=X)
    with pytest.raises(ConfigError, match="leave out type"):
        surgeon.convert(model, pattern="dcb", type="acda", example_inputs=X)
    assert main(["convert", "resnet18", "--pattern", "dcb", "--type", "acda", "--quiet"]) == 2
    assert "leave out --type" in capsys.readouterr().err
