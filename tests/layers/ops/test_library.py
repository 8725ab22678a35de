"""Calls of operators that torch need not see go to the function itself; all others through its dispatcher."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from surgeon.layers.ops.library import nothing_to_record
from surgeon.layers.sekg.operator import dconv

ONE = torch.ones(1)


def given() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 2, 4, 4), torch.randn(1, 2, 9, 4, 4)


def apply(x: Tensor, kernels: Tensor) -> Tensor:
    return dconv(x, kernels, (3, 3), padding=(1, 1))


def test_numbers_alone_have_nothing_to_record() -> None:
    weight = nn.Parameter(torch.ones(1))
    assert nothing_to_record(ONE, None, (1, 1))
    assert not nothing_to_record(ONE, weight)
    with torch.no_grad():
        assert nothing_to_record(ONE, weight)
    with torch.inference_mode():
        assert nothing_to_record(torch.ones(1), weight)


@pytest.mark.parametrize(
    "observer",
    [
        lambda: FlopCounterMode(display=False),
        BaseTorchFunctionMode,
        FakeTensorMode,
        forward_ad.dual_level,
        torch.autograd.profiler.profile,
    ],
    ids=["counter", "function mode", "fake", "forward gradients", "profiler"],
)
def test_observers_see_it(observer: type) -> None:
    with observer():
        assert not nothing_to_record(ONE)
    assert nothing_to_record(ONE)


def test_tensors_that_are_more_than_their_memory_are_not_read_directly() -> None:
    x, kernels = given()
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    assert not nothing_to_record(negated)
    assert torch.equal(apply(negated, kernels), apply(x, kernels))
    assert not nothing_to_record(ONE.to("meta"))


def test_a_graph_has_one_node() -> None:
    x, kernels = given()
    graph = make_fx(apply)(x, kernels).graph
    assert [node.target for node in graph.nodes if "surgeon" in str(node.target)] == [torch.ops.surgeon.dconv.default]
