"""The compiled PAFU: the reference's numbers and gradients, the same whatever the threads and the cuts."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgeon.errors import GeometryError
from surgeon.layers.pafu import native
from surgeon.layers.pafu.operator import PAFU_CONV, pafu_conv
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
    gradients,
    pairs,
    sizes,
)

pytestmark = NEEDS_LIBRARY

Given = tuple[list[Tensor], Tensor, dict[str, Any]]  # x, kernel, further and soft; index; geometry


def problem(
    *,
    spare: Pair = (5, 6),
    window: Pair = (3, 3),
    stride: Pair = (1, 1),
    padding: Pair = (1, 1),
    dilation: Pair = (1, 1),
    group: Pair = (4, 5),
    groups: int = 1,
    n: int = 3,
    images: int = 2,
    last: bool = False,
    packed: bool = True,
) -> Given:
    """`group`: channels in and out; `last`: x is channels last; `packed`: the further kernels are, as in the layer."""
    torch.manual_seed(0)
    size, out = sizes(spare, window, stride, padding, dilation)
    x, kernel = torch.randn(images, group[0] * groups, *size), torch.randn(group[1] * groups, group[0], *window)
    further = torch.randn(n - 1, group[1] * groups, *window, group[0]).movedim(-1, 2)
    tensors = [
        x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format),
        kernel,
        further if packed else further.contiguous(),
        torch.randn(images, n, *out).softmax(1),
    ]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return [t.requires_grad_() for t in tensors], torch.randint(0, n, (images, *out)), options


def run(given: Given, backend: str) -> Tensor:
    (x, kernel, further, soft), index, options = given
    return pafu_conv(x, kernel, further, index, soft, **options, backend=backend)


def results(given: Given, backend: str = "native") -> list[Tensor]:
    y = run(given, backend)
    return [y, *gradients(y, given[0])]


def check(given: Given) -> None:
    """Against the reference in float64."""
    tensors, index, options = given
    exact = results(([t.detach().double().requires_grad_() for t in tensors], index, options), "reference")
    check_close(results(given), exact, least=1)


@PROPERTY
@given(
    window=pairs(1, 5),
    stride=pairs(1, 4),
    padding=pairs(0, 3),
    dilation=pairs(1, 3),
    spare=pairs(0, 25),
    group=st.sampled_from([(4, 1), (4, 5), (5, 16), (16, 4), (17, 33)]),
    groups=st.integers(1, 3),
    n=st.integers(2, 6),
    images=st.integers(1, 3),
    last=st.booleans(),
    packed=st.booleans(),
)
def test_native_is_the_reference(**options: Any) -> None:
    check(problem(**options))


@pytest.mark.parametrize("group", [(1, 1), (1, 7), (3, 64), (140, 70), (300, 20)])
def test_any_number_of_channels(group: Pair) -> None:
    check(problem(group=group, n=4))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("chunk", [700, 20_000])
def test_work_that_is_cut(chunk: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into chunks of rows or of images, and runs of pixels; the bits of the output are those of the whole."""
    given = problem(spare=(20, 17), window=(5, 3), padding=(4, 1), stride=(2, 1), images=5, last=last)
    whole = run(given, "native")
    monkeypatch.setattr(native, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(native, "SEGMENT", 10)
    assert torch.equal(run(given, "native"), whole)
    check(given)


@pytest.mark.parametrize("padding", [(1, 1), (9, 9)], ids=["some", "mostly padding"])
def test_one_kernel_everywhere(padding: Pair) -> None:
    for selected in (0, 2):
        tensors, index, options = problem(padding=padding)
        check((tensors, torch.full_like(index, selected), options))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    given = problem(spare=(40, 30), group=(70, 150), n=5, images=3)
    check_threads(lambda: results(given), 2, 5)


def test_only_inputs_are_saved_for_backward() -> None:
    given = problem()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(given, "native")
    assert saved
    assert {t.data_ptr() for t in saved} <= {t.data_ptr() for t in (*given[0], given[1])}


@pytest.mark.parametrize("wanted", range(4))
def test_a_gradient_alone_is_that_gradient(wanted: int) -> None:
    tensors, index, options = given = problem()
    expected = results(given)[1 + wanted]
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    y = run((alone, index, options), "native")
    assert torch.equal(gradients(y, [alone[wanted]])[0], expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": (2, 1), "last": True}, {"images": 0}])
def test_registration(options: dict[str, Any]) -> None:
    (x, kernel, further, soft), index, geometry = problem(**options)
    torch.library.opcheck(
        torch.ops.surgeon.pafu_conv.default, (x, kernel, further, index, soft, *geometry.values(), "native")
    )


def test_the_memory_format_of_the_input_is_kept() -> None:
    for last, kept in ((False, torch.contiguous_format), (True, torch.channels_last)):
        given = problem(last=last)
        y = run(given, "native")
        assert y.is_contiguous(memory_format=kept)
        assert gradients(y, given[0][:1])[0].is_contiguous(memory_format=kept)


@HALF
@pytest.mark.parametrize("options", [{"images": 3}, {"groups": 2, "stride": (2, 1), "last": True, "group": (5, 20)}])
def test_half_precision_is_computed_in_float32(options: dict[str, Any], dtype: torch.dtype) -> None:
    tensors, index, geometry = problem(**options)
    check_half(lambda given, backend: results((given, index, geometry), backend), tensors, dtype)
    half = [t.detach().to(dtype) for t in tensors[:3]]
    assert PAFU_CONV.choose(*half, index, None, *geometry.values()).name == "native"
    assert PAFU_CONV.why_not("native", half[0], *tensors[1:3], index, None, *geometry.values()) == [
        f"its tensors are of different dtypes ({dtype}, torch.float32)"
    ]


@FEW
@given(
    **SPOILED,
    group=st.sampled_from([(4, 5), (5, 3), (6, 20)]),
    groups=st.integers(1, 2),
    last=st.booleans(),
)
def test_what_is_no_number_spoils_only_what_sees_it(where: float, **options: Any) -> None:
    """As in torch; the reference multiplies what was not selected by zero."""
    tensors, index, geometry = problem(**options)
    *tensors, _ = tensors  # the scores have no part in outputs and gradients
    soft = torch.randn(index.shape[0], 3, *index.shape[1:])

    def call(given: list[Tensor], backend: str) -> list[Tensor]:
        scores = soft.requires_grad_()
        y = pafu_conv(*given, index, scores, **geometry, backend=backend)
        return [y, *gradients(y, [*given, scores])]

    check_spread(call, tensors, ("torch", "native"), where)


def test_it_is_the_default_in_float32_and_says_why_not() -> None:
    (x, kernel, further, soft), index, options = problem()
    rest = (index, soft, *options.values())
    assert PAFU_CONV.choose(x, kernel, further, *rest).name == "native"
    double = [t.double() for t in (x, kernel, further)]
    assert PAFU_CONV.why_not("native", *double, *rest) == ["it computes in float32, not in torch.float64"]
    (x, kernel, further, soft), index, options = problem(group=(1, 1), groups=4)
    few = (x, kernel, further, index, soft, *options.values())
    assert PAFU_CONV.why_not("native", *few) == ["torch is faster with fewer than 4 channels per group"]
    assert PAFU_CONV.choose(*few).name == "torch"


def test_an_index_that_names_no_kernel_is_an_error() -> None:
    tensors, index, options = problem()
    for wrong in (-1, 3):
        with pytest.raises(GeometryError, match=f"index {wrong} is out of range, there are 3 kernels"):
            run((tensors, torch.full_like(index, wrong), options), "native")
