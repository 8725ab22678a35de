"""The compiled ACDA operator: the reference's numbers, the same whatever the threads, and safe wherever torch is."""

import os
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgeon.errors import BackendError
from surgeon.layers.acda import native
from surgeon.layers.acda.operator import ACDA_CONV, acda_conv
from surgeon.layers.ops.native import compiler, support
from tests.support.layers.native import (
    FEW,
    HALF,
    NEEDS_LIBRARY,
    PROPERTY,
    SPOILED,
    Pair,
    check_close,
    check_half,
    check_spread,
    check_threads,
    doubled,
    gradients,
    pairs,
    sizes,
)

pytestmark = NEEDS_LIBRARY


def problem(
    *,
    spare: Pair = (4, 5),
    window: Pair = (3, 3),
    stride: Pair = (1, 1),
    padding: Pair = (1, 1),
    dilation: Pair = (1, 1),
    groups: int = 1,
    group: int = 3,
    multiplier: int = 1,
    images: int = 2,
    atoms: int = 2,
    static: int = 1,
    elements: int = 3,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Operands in float32 that require gradients, and the geometry."""
    torch.manual_seed(0)
    size, out = sizes(spare, window, stride, padding, dilation)
    channels = group * groups
    shapes = [
        (images, channels, *size),
        (images, atoms * elements, *out),
        (elements, *window),
        (static, *window),
        (channels * multiplier, group, atoms + static),
    ]
    return tuple(torch.randn(s, requires_grad=True) for s in shapes), (stride, padding, dilation, groups)


def results(operands: tuple[Tensor, ...], geometry: tuple[Any, ...], backend: str) -> list[Tensor]:
    """Output and the gradients of all operands."""
    y = acda_conv(*operands, *geometry, backend=backend)
    return [y, *gradients(y, operands)]


def check(operands: tuple[Tensor, ...], geometry: tuple[Any, ...]) -> None:
    """Against the reference in float64."""
    check_close(results(operands, geometry, "native"), results(tuple(doubled(operands)), geometry, "reference"))


@PROPERTY
@given(
    window=pairs(1, 5),
    stride=pairs(1, 4),
    padding=pairs(0, 3),
    dilation=pairs(1, 3),
    spare=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    groups=st.integers(1, 3),
    group=st.integers(1, 6),
    multiplier=st.integers(1, 3),
    images=st.integers(1, 3),
    atoms=st.integers(1, 9),
    static=st.integers(0, 2),
    elements=st.integers(1, 5),
)
def test_native_is_the_reference(**options: Any) -> None:
    check(*problem(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"spare": (70, 50), "window": (7, 7), "padding": (3, 3), "group": 48, "images": 1, "atoms": 6},
        {"spare": (14, 14), "padding": (1, 1), "group": 130, "multiplier": 2, "images": 3},
        {"spare": (90, 6), "window": (5, 1), "stride": (2, 3), "group": 70, "images": 1},
        {"padding": (9, 9), "spare": (0, 0)},
    ],
    ids=["several bands", "many channels", "tall bands", "mostly padding"],
)
def test_sizes_that_are_cut(options: dict[str, Any]) -> None:
    check(*problem(**options))


@pytest.mark.parametrize("wanted", range(5))
def test_a_gradient_alone_is_that_gradient(wanted: int) -> None:
    operands, geometry = problem()
    expected = results(operands, geometry, "native")[1 + wanted]
    alone = tuple(t.detach().requires_grad_(i == wanted) for i, t in enumerate(operands))
    y = acda_conv(*alone, *geometry, backend="native")
    assert torch.equal(gradients(y, [alone[wanted]])[0], expected)


def test_gradients_of_many_coefficients_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    operands, geometry = problem(groups=2)
    y, *own = results(operands, geometry, "native")
    monkeypatch.setattr(native, "MOST_COEFFICIENTS", 8)
    many = results(operands, geometry, "native")
    assert torch.equal(many[0], y)
    for found, expected, close in zip(many[1:], results(operands, geometry, "torch")[1:], own, strict=True):
        assert torch.equal(found, expected)
        torch.testing.assert_close(found, close, rtol=1e-4, atol=1e-5)


def test_only_inputs_are_saved_for_backward() -> None:
    operands, geometry = problem()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        acda_conv(*operands, *geometry, backend="native")
    inputs = {t.data_ptr() for t in operands}
    assert saved
    assert all(t.data_ptr() in inputs for t in saved)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_registration() -> None:
    for options in ({"groups": 2, "stride": (2, 1)}, {"static": 0, "images": 0}):
        operands, geometry = problem(**options)
        torch.library.opcheck(torch.ops.surgeon.acda_conv.default, (*operands, *geometry, "native"))


def test_compiled_is_one_graph_that_calls_it() -> None:
    operands, geometry = problem()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *t: acda_conv(*t, *geometry).sin(), fullgraph=True, backend=keep)
    got, expected = compiled(*operands), acda_conv(*operands, *geometry, backend="native").sin()
    assert torch.equal(got, expected)
    (node,) = (node for node in graphs[0].graph.nodes if "acda_conv" in str(node.target))
    assert "native" in node.args


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    operands, geometry = problem(spare=(40, 30), window=(5, 5), padding=(2, 2), group=24, images=3, atoms=4)
    check_threads(lambda: results(operands, geometry, "native"), 2, 3, 8)


def test_several_python_threads_at_once() -> None:
    operands, geometry = problem(spare=(20, 20), group=16)
    detached = [t.detach() for t in operands]
    expected = acda_conv(*detached, *geometry, backend="native")
    found: list[bool] = []

    def work() -> None:
        for _ in range(20):
            found.append(torch.equal(acda_conv(*detached, *geometry, backend="native"), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of threads of the test's own process, from Python 3.12
def test_a_forked_child_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another thread of the parent held the locks at that moment."""
    operands, geometry = problem()
    detached = [t.detach() for t in operands]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(support, "LEAST_MACS", 1)
    expected = acda_conv(*detached, *geometry, backend="native")
    with support._scratch.lock, compiler._state.lock:
        child = os.fork()
        if child == 0:
            same = torch.equal(acda_conv(*detached, *geometry, backend="native"), expected)
            os._exit(0 if same else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_error_in_a_thread_is_raised() -> None:
    def work(part: int, scratch: Tensor) -> None:
        raise ValueError(f"part {part}")

    with pytest.raises(ValueError, match="part"):
        support.in_parallel(work, 5, 10, 3)


def test_threads_are_started_for_work_that_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small layer took several times as long on two threads as on one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    least = support.LEAST_MACS
    assert [support.threads_for(macs) for macs in (0, least - 1, 2 * least, 9 * least)] == [1, 1, 2, 3]


def test_scratch_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # of two, one may end before the other asks for a buffer
    operands, geometry = problem(spare=(30, 30), group=32)
    detached = [t.detach() for t in operands]
    acda_conv(*detached, *geometry, backend="native")
    before = {t.data_ptr() for t in support._scratch.free}
    acda_conv(*detached, *geometry, backend="native")
    assert {t.data_ptr() for t in support._scratch.free} == before


def test_any_layout_is_the_same_numbers() -> None:
    operands, geometry = problem()
    detached = [t.detach() for t in operands]
    expected = acda_conv(*detached, *geometry, backend="native")
    apart = [torch.stack([t, t], -1)[..., 0] for t in detached]
    assert not apart[0].is_contiguous()
    assert torch.equal(acda_conv(*apart, *geometry, backend="native"), expected)
    last = detached[0].contiguous(memory_format=torch.channels_last)
    assert torch.equal(acda_conv(last, *detached[1:], *geometry, backend="native"), expected)


@HALF
@pytest.mark.parametrize("options", [{"images": 3}, {"groups": 2, "stride": (2, 1), "static": 0}])
def test_half_precision_is_computed_in_float32(options: dict[str, Any], dtype: torch.dtype) -> None:
    operands, geometry = problem(**options)
    check_half(lambda given, backend: results(tuple(given), geometry, backend), operands, dtype)


@HALF
def test_half_precision_beside_float32_and_under_autocast(dtype: torch.dtype) -> None:
    (x, *others), geometry = problem()
    mixed = (x.detach().to(dtype).requires_grad_(), *others)
    found = results(mixed, geometry, "native")
    exact = results(tuple(doubled(mixed)), geometry, "reference")
    for a, b, t in zip(found, exact, (x.to(dtype), *mixed), strict=True):
        assert a.dtype == t.dtype
        assert (a - b).abs().max() <= torch.finfo(a.dtype).eps * b.abs().max() + 1e-5 * b.abs().max()
    with torch.autocast("cpu", dtype):
        y = acda_conv(x, *others, *geometry)
    assert ACDA_CONV.choose(*mixed, *geometry).name == "native"
    assert torch.equal(y, found[0])


@FEW
@given(
    **SPOILED,
    groups=st.integers(1, 2),
    group=st.integers(1, 4),
    atoms=st.integers(1, 3),
    static=st.integers(0, 2),
)
def test_what_is_no_number_spoils_only_what_sees_it(where: float, **options: Any) -> None:
    operands, geometry = problem(**options)
    backends = ("reference", "native", "torch")
    check_spread(lambda given, backend: results(tuple(given), geometry, backend), operands, backends, where)


def test_it_says_why_not() -> None:
    operands, geometry = problem()
    double = [t.double() for t in operands]
    assert ACDA_CONV.why_not("native", *double, *geometry) == ["it computes in float32, not in torch.float64"]
    meta = [t.to("meta") for t in operands]
    assert ACDA_CONV.why_not("native", *meta, *geometry) == ["it runs on the CPU; the tensors are on meta"]
    with pytest.raises(BackendError, match=r"it computes in float32, not in torch\.float64"):
        acda_conv(double[0], *operands[1:], *geometry, backend="native")
    assert ACDA_CONV.choose(*operands, *geometry).name == "native"
