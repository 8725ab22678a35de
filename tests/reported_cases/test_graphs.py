"""Graphs and `.pt2` files as people make them: casts, shared and aliased weights, weights made by convolutions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, fx, nn

import surgeon
from surgeon.cli import main
from surgeon.errors import NothingReplacedError, SelectionError
from surgeon.models.programs import read_program
from surgeon.passes import DynamicConvPass

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A forward that reads two weights, `a` (4, 3, 3, 3) and `b` (3, 3, 3, 3), and a norm."""

    def __init__(self, compute: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(3, 3, 3, 3))
        self.norm = nn.BatchNorm2d(3)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


class Aliased(nn.Module):
    """One convolution by two names, and classes of two images."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second, self.head = self.first, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).mean((2, 3)).view(2, 3))


def exported(model: nn.Module) -> fx.GraphModule:
    return torch.export.export(model.eval(), (X,)).module()


@pytest.fixture(scope="module")
def aliased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aliased") / "aliased.pt2"
    torch.manual_seed(0)
    torch.export.save(torch.export.export(Aliased().eval(), (X,)), path)
    return path


def test_settings_written_in_two_ways_are_the_same() -> None:
    graph = fx.symbolic_trace(Net(lambda net, x: F.conv2d(F.conv2d(x, net.b, padding=1), net.b, padding=(1, 1))))
    _, report = surgeon.convert(graph, layers="all", type="pafu", example_inputs=X)
    assert {entry.name: entry.calls for entry in report.replaced} == {"b_conv": 2}


def test_a_cast_weight_of_an_exported_program_is_replaced() -> None:
    """`torch.export` states before every cast what the tensor was; that statement is no other reader."""
    net = Net(lambda net, x: F.conv2d(x, net.a.to(x.dtype))).eval()
    net.a.data = net.a.data.double()
    converted, report = surgeon.convert(exported(net), layers="all", type="pafu")
    assert [entry.name for entry in report.replaced] == ["a_conv"]
    assert torch.allclose(converted(X), net(X), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("trace", [fx.symbolic_trace, exported])
def test_a_weight_convolved_with_itself_is_refused_and_the_graph_is_whole(
    trace: Callable[[nn.Module], fx.GraphModule],
) -> None:
    net = Net(lambda net, x: F.conv2d(net.b, net.b, padding=1) + x.mean())
    graph = trace(net.eval())
    before = graph.code, list(graph.state_dict())
    with pytest.raises(NothingReplacedError, match="also used by conv2d"):
        DynamicConvPass("all", "pafu", example_inputs=X)(graph)
    assert (graph.code, list(graph.state_dict())) == before
    assert torch.equal(graph(X), net(X))


def test_a_convolution_that_makes_the_weight_of_another_is_not_replaced_beside_it() -> None:
    net = Net(lambda net, x: F.conv2d(x, F.conv2d(net.a, net.b, padding=1)))
    converted, report = surgeon.convert(exported(net), layers="all", type="pafu")
    assert [entry.name for entry in report.replaced] == ["a_conv"]
    assert [(entry.name, entry.reasons) for entry in report.skipped] == [
        ("b_conv", ("it helps compute the weight of a_conv",))
    ]
    assert isinstance(converted, fx.GraphModule)
    assert "a_conv" in {node.target for node in converted.graph.nodes}


def test_a_norm_of_a_weight_counts_nothing_while_the_weight_is_computed() -> None:
    graph = fx.symbolic_trace(Net(lambda net, x: F.conv2d(x, net.norm(net.a))).train())
    surgeon.convert(graph, layers="all", type="pafu", example_inputs=X)
    assert int(graph.get_buffer("norm.num_batches_tracked")) == 0
    assert not graph.get_buffer("norm.running_mean").any()


def test_the_older_function_is_a_convolution_too() -> None:
    old = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, False, False, False, False)
    _, report = surgeon.convert(
        exported(Net(lambda net, x: torch._convolution(x, net.a, *old))), layers="all", type="pafu"
    )
    assert [entry.name for entry in report.replaced] == ["a_conv"]


def test_a_failure_half_way_through_raising_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = exported(Net(lambda net, x: F.conv2d(F.conv2d(x, net.b), net.a)))
    before = graph.code, list(graph.state_dict())
    real = fx.Graph.lint

    def broken(graph: fx.Graph) -> None:
        real(graph)
        if any(node.op == "call_module" and node.target == "a_conv" for node in graph.nodes):
            raise RuntimeError("no graph")

    monkeypatch.setattr(fx.Graph, "lint", broken)
    with pytest.raises(RuntimeError, match="no graph"):
        surgeon.convert(graph, layers="all", type="pafu", inplace=True)
    assert (graph.code, list(graph.state_dict())) == before


# --- .pt2 files -------------------------------------------------------------------------------------------------------


def test_a_convolution_by_two_names_is_replaced_in_a_program_and_its_file(aliased: Path, tmp_path: Path) -> None:
    run, less = tmp_path / "run", tmp_path / "less"
    expected = read_program(aliased)(X)
    arguments = ["convert", str(aliased), "--layers", "all", "--type", "acda", "-o", str(run), "--quiet"]
    assert main(arguments) == 0
    loaded = surgeon.load(run)
    assert not any(name.startswith("first") for name in loaded.state_dict())
    assert torch.allclose(loaded(X), expected, rtol=1e-5, atol=1e-6)
    assert main(["verify", str(run), "--quiet"]) == 0
    assert main(["revert", str(run), "--layers", "all", "-o", str(less), "--quiet"]) == 0
    assert torch.allclose(surgeon.load(less)(X), expected, rtol=1e-5, atol=1e-6)


def test_all_is_all_dynamic_layers() -> None:
    model, _ = surgeon.convert(nn.Sequential(nn.Conv2d(3, 3, 3)), layers="all", type="pafu", example_inputs=X)
    with pytest.raises(SelectionError, match="'any' is not a dynamic layer"):
        surgeon.revert(model, "any")
    assert type(surgeon.revert(model, "all")[0]) is nn.Conv2d


def test_training_a_program_takes_its_size_and_says_where_its_batch_is_fixed(
    aliased: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, name in ((split, name) for split in ("train", "val") for name in "ab"):
        folder = tmp_path / "images" / split / name
        folder.mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((20, 20, 3), 60 * i, np.uint8)).save(folder / f"{i}.png")
    run = tmp_path / "run"
    assert (
        main(["convert", str(aliased), "--layers", "all", "--type", "pafu", "-o", str(run), "--quiet", "--json"]) == 0
    )
    train = ["finetune", str(run), "--task", "classification", "--data", str(tmp_path / "images"), "--quiet"]
    train += ["--max-steps", "1", "--epochs", "1", "--workers", "0"]
    assert main([*train, "--batch-size", "2", "-o", str(tmp_path / "fits")]) == 0
    capsys.readouterr()
    assert main([*train, "--batch-size", "4", "-o", str(tmp_path / "not")]) == 2
    assert main([*train, "--batch-size", "4", "--eval-batch-size", "2", "-o", str(tmp_path / "step")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert all("does not run on a batch (4, 3, 16, 16) of task classification" in line for line in told)
