"""What users put around a model: DistributedDataParallel, functional_call, torch.compile of a whole step, CUDA graphs."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.layers import layer_types
from tests.support.layers.contract import VARIANTS, awaken, make, plain_conv, relative_error

every_kind = pytest.mark.parametrize("kind", [*layer_types(), *VARIANTS])


def network(kind: str) -> nn.Module:
    """Two plain convolutions, and a dynamic layer between them that does something."""
    layer = awaken(make(kind, plain_conv()), 0.1)
    return nn.Sequential(nn.Conv2d(3, 6, 3), layer, nn.ReLU(), nn.Conv2d(8, 4, 1))


@every_kind
def test_ddp_gives_the_gradients_of_the_bare_model(kind: str, tmp_path: Path) -> None:
    bare, x = network(kind), torch.randn(2, 3, 12, 11)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(bare))
            for model in (bare, wrapped):
                torch.manual_seed(1)  # PAFU samples in training
                model(x).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    for mine, theirs in zip(wrapped.parameters(), bare.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad)


@every_kind
def test_functional_call_takes_other_parameters_and_leaves_the_model_alone(kind: str) -> None:
    model, other, x = network(kind).eval(), network(kind).eval(), torch.randn(2, 3, 12, 11)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    before = model(x).detach()
    found = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(found, other(x))
    assert torch.equal(model(x).detach(), before)


@every_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch.compile
def test_a_training_step_compiles_whole_under_autocast(kind: str) -> None:
    torch.compiler.reset()
    model, x = network(kind).eval(), torch.randn(2, 3, 12, 11)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = model(x)
        return y.float().square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = []
    for function in (loss, compiled):
        model.zero_grad()
        function(x).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 4
    for mine, theirs in zip(found[1], found[0], strict=True):
        assert relative_error(mine, theirs) <= 5e-2
    torch.compiler.reset()


@every_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compiler_sees_the_formulas_where_they_are_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    model, x = network(kind).eval(), torch.randn(2, 3, 12, 11)
    expected = model(x)
    for name in ("torch", "portable"):
        torch.compiler.reset()
        called.clear()
        monkeypatch.setenv("SURGEON_BACKEND", name)
        assert relative_error(torch.compile(model, fullgraph=True, backend=backend)(x), expected) <= 1e-5
        assert any("surgeon" in target for target in called) == (name == "torch")
    torch.compiler.reset()


@every_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_shapes_compile_once(kind: str) -> None:
    """The second and third image size find the first one's graph."""
    torch.compiler.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model = network(kind).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for shape in ((2, 3, 12, 11), (3, 3, 17, 14), (4, 3, 23, 30)):
            x = torch.randn(shape)
            assert relative_error(compiled(x), model(x)) <= 1e-5
    assert graphs == 1
    torch.compiler.reset()


@pytest.mark.gpu
@every_kind
@pytest.mark.parametrize("training", [False, True])
def test_cuda_graphs_capture_and_replay(kind: str, training: bool) -> None:
    """A forward pass in eval mode, or one with its backward, on inputs that change between replays."""
    model = network(kind).cuda().eval()
    x = torch.randn(4, 3, 32, 32, device="cuda")

    def step() -> Tensor:
        y: Tensor = model(x)
        if training:
            for parameter in model.parameters():
                parameter.grad = None
            y.square().mean().backward()
        return y

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.set_grad_enabled(training):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.set_grad_enabled(training), torch.cuda.graph(graph):
        y = step()
    gradients = [p.grad for p in model.parameters()] if training else []
    for seed in range(2):
        torch.manual_seed(seed)
        fresh = torch.randn(4, 3, 32, 32, device="cuda")
        x.copy_(fresh)
        graph.replay()
        captured = [y.detach().clone(), *(g.clone() for g in gradients if g is not None)]
        with torch.set_grad_enabled(training):
            eager = step().detach()
        expected = [eager, *(p.grad for p in model.parameters() if p.grad is not None)] if training else [eager]
        for mine, theirs in zip(captured, expected, strict=True):
            assert relative_error(mine, theirs) <= 1e-3


def test_a_converted_model_takes_the_option_of_a_cheap_generator() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    converted, report = surgeon.convert(
        model, layers="2", type="acda", generator="lowrank", example_inputs=torch.randn(2, 3, 12, 12)
    )
    assert report.max_rel_error <= 1e-5
    assert converted[2].config.generator == "lowrank"
