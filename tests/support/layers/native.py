"""What the tests of the compiled operators share: windows to draw, gradients, closeness, NaN, half precision, threads."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from surgeon.layers.ops.native import half, support
from surgeon.layers.ops.native.compiler import why_no_library

NEEDS_LIBRARY = pytest.mark.skipif(bool(why_no_library()), reason="needs the compiled library")
PROPERTY = settings(deadline=None, derandomize=True, max_examples=80)
FEW = settings(deadline=None, derandomize=True, max_examples=25)
Pair = tuple[int, int]


def pairs(low: int, high: int) -> st.SearchStrategy[Pair]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


SPOILED: dict[str, st.SearchStrategy[Any]] = {
    "window": pairs(1, 4),
    "stride": pairs(1, 3),
    "padding": pairs(0, 2),
    "dilation": pairs(1, 2),
    "spare": pairs(0, 20),
    "where": st.floats(0, 1),
}  # geometries, and where in a tensor, for `check_spread`


def sizes(spare: Pair, window: Pair, stride: Pair, padding: Pair, dilation: Pair) -> tuple[list[int], list[int]]:
    """(H, W) of an input that is `spare` pixels larger than the window, and of the output."""
    size = [d * (k - 1) + 1 + more for k, d, more in zip(window, dilation, spare, strict=True)]
    return size, [(more + 2 * p) // s + 1 for more, p, s in zip(spare, padding, stride, strict=True)]


def gradients(y: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """For one fixed gradient of the output."""
    weight = ((torch.arange(y.numel()) % 7 - 3) / 4).view(y.shape).to(y.dtype)
    return torch.autograd.grad((y * weight).sum(), of)


def doubled(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def check_close(found: Iterable[Tensor], exact: Iterable[Tensor], least: float = 0.0) -> None:
    """float32, and within 1e-5 of the largest exact number, which counts as at least `least`."""
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.float32
        assert not b.numel() or (a - b).abs().max() <= 1e-5 * max(b.abs().max(), least)


def check_spread(
    call: Callable[[list[Tensor], str], Sequence[Tensor]],
    tensors: Sequence[Tensor],
    backends: Sequence[str],
    where: float,
) -> None:
    """A NaN or infinity at `where` (0 to 1) of a tensor reaches on all backends the same outputs and gradients, as the same."""
    for i, t in enumerate(tensors):
        for value in (float("nan"), float("inf")) if t.numel() else ():
            spoiled = [other.detach().clone() for other in tensors]
            place = torch.unravel_index(torch.tensor(int(where * (t.numel() - 1))), t.shape)
            spoiled[i][tuple(place)] = value
            found, *others = [call([s.requires_grad_() for s in spoiled], backend) for backend in backends]
            for other in others:
                for a, b in zip(found, other, strict=True):
                    assert torch.equal(a.isnan(), b.isnan())
                    assert torch.equal(a.isinf(), b.isinf())


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def check_half(
    call: Callable[[list[Tensor], str], Sequence[Tensor]], tensors: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """For inputs of that dtype: the reference's results in float64 rounded once, images converted at once and one by one."""
    given = [t.detach().to(dtype) for t in tensors]
    exact = call([t.double().requires_grad_() for t in given], "reference")
    for block in (half.BLOCK_BYTES, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(half, "BLOCK_BYTES", block)
            found = call([t.requires_grad_() for t in given], "native")
        for a, b in zip(found, exact, strict=True):
            assert a.dtype == dtype
            assert a.shape == b.shape
            rounding = torch.finfo(dtype).eps / 2 * b.abs() + torch.finfo(dtype).smallest_normal
            assert not b.numel() or ((a - b).abs() <= rounding + 1e-5 * max(b.abs().max(), 1)).all()


def check_threads(call: Callable[[], Sequence[Tensor]], *counts: int) -> None:
    """The same bits on these numbers of threads as on one; they are started for any work, however little."""
    before, least = torch.get_num_threads(), support.LEAST_MACS
    try:
        support.LEAST_MACS = 1
        torch.set_num_threads(1)
        expected = call()
        for threads in counts:
            torch.set_num_threads(threads)
            assert all(map(torch.equal, call(), expected))
    finally:
        support.LEAST_MACS = least
        torch.set_num_threads(before)
