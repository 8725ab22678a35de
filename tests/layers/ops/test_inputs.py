"""What the operators say to bad input: one clear error on every backend, or the right answer; never a crash or nonsense."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from surgeon.errors import BackendError, GeometryError
from surgeon.layers.acda.operator import acda_conv
from surgeon.layers.pafu.operator import pafu_conv
from surgeon.layers.sekg.operator import dconv, dconv_layer
from tests.support.layers.native import NEEDS_LIBRARY

BACKENDS = ["torch", "reference"]
Given = dict[str, Any]


def acda() -> Given:
    x, alpha = torch.randn(2, 4, 7, 8), torch.randn(2, 6, 7, 8)
    window = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    tensors = {"x": x, "alpha": alpha, "psi": torch.randn(3, 3, 3), "static": torch.randn(1, 3, 3)}
    return {"call": acda_conv, **tensors, "coeff": torch.randn(8, 4, 3), **window}


def apply() -> Given:
    x, kernels = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 7, 8)
    return {"call": dconv, "x": x, "kernels": kernels, "kernel_size": (3, 3), "padding": (1, 1)}


def layer() -> Given:
    tensors = {"x": torch.randn(2, 4, 7, 8), "features": torch.randn(2, 3, 7, 8), "weight": torch.randn(36, 3)}
    return {
        "call": dconv_layer,
        **tensors,
        "static": torch.randn(4, 1, 3, 3),
        "bias": torch.randn(4),
        "padding": (1, 1),
    }


def pafu() -> Given:
    tensors = {"x": torch.randn(2, 4, 7, 8), "kernel": torch.randn(4, 4, 3, 3), "further": torch.randn(2, 4, 4, 3, 3)}
    return {"call": pafu_conv, **tensors, "index": torch.randint(0, 3, (2, 7, 8)), "padding": (1, 1)}


OPERATORS = {"acda": acda, "dconv": apply, "dconv_layer": layer, "pafu": pafu}
EACH = [
    *(pytest.param(make, backend, id=f"{name}-{backend}") for name, make in OPERATORS.items() for backend in BACKENDS),
    *(pytest.param(OPERATORS[name], "native", id=f"{name}-native", marks=NEEDS_LIBRARY) for name in OPERATORS),
]
MAPS = ("x", "alpha", "kernels", "features", "index")  # of images, their last dimensions being pixels


def run(given: Given, backend: str) -> Tensor:
    given = dict(given)
    y: Tensor = given.pop("call")(**given, backend=backend)
    return y


def refused(given: Given, backend: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)):
        run(given, backend)


@pytest.mark.parametrize(("make", "backend"), EACH)
class TestEveryOperator:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"stride": (0, 1)}, "stride must be two integers >= 1 (vertical, horizontal), got (0, 1)"),
            ({"dilation": (1, 0)}, "dilation must be two integers >= 1"),
            ({"padding": (-1, 0)}, "padding must be two integers >= 0 (vertical, horizontal), got (-1, 0)"),
        ],
    )
    def test_impossible_windows(self, make: Callable[[], Given], backend: str, change: Given, said: str) -> None:
        refused(make() | change, backend, GeometryError, said)

    def test_wrong_rank(self, make: Callable[[], Given], backend: str) -> None:
        given = make()
        refused(given | {"x": given["x"][0]}, backend, GeometryError, "(4, 7, 8)")

    def test_wrong_channels(self, make: Callable[[], Given], backend: str) -> None:
        given = make()
        with pytest.raises(GeometryError):
            run(given | {"x": given["x"][:, :3]}, backend)

    def test_wrong_size(self, make: Callable[[], Given], backend: str) -> None:
        given = make()
        with pytest.raises(GeometryError):
            run(given | {"x": given["x"][..., :5]}, backend)

    def test_an_image_without_pixels(self, make: Callable[[], Given], backend: str) -> None:
        given = make()
        empty = {key: value[..., :0, :] for key, value in given.items() if key in MAPS}
        refused(given | empty, backend, GeometryError, "an image must have channels and pixels, got x (2, 4, 0, 8)")

    def test_an_image_smaller_than_the_kernel(self, make: Callable[[], Given], backend: str) -> None:
        given = make()
        small = {"x": given["x"][..., :2, :2], "padding": (0, 0)}
        refused(given | small, backend, GeometryError, "a 3x3 kernel of dilation (1, 1) does not fit an input of 2x2")

    def test_integers(self, make: Callable[[], Given], backend: str) -> None:
        given = make()
        integers = {key: value.long() for key, value in given.items() if isinstance(value, Tensor)}
        refused(given | integers, backend, BackendError, "needs a floating-point input, got torch.int64")

    def test_no_images_give_no_images(self, make: Callable[[], Given], backend: str) -> None:
        given = make()
        y = run(given | {key: value[:0] for key, value in given.items() if key in MAPS}, backend)
        assert y.shape == (0, *run(given, backend).shape[1:])

    def test_any_strides_are_the_same_numbers(self, make: Callable[[], Given], backend: str) -> None:
        given = make()
        apart = {k: torch.stack([v, v], -1)[..., 0] for k, v in given.items() if isinstance(v, Tensor)}
        assert not apart["x"].is_contiguous()
        torch.testing.assert_close(run(given | apart, backend), run(given, backend))

    def test_dtypes_that_do_not_mix(self, make: Callable[[], Given], backend: str) -> None:
        given = make()
        mixed = given | {"x": given["x"].double()}
        if make is acda and backend == "native":
            refused(mixed, backend, BackendError, "it computes in float32, not in torch.float64")
        elif make is acda:  # its operands may be of different precision
            assert run(mixed, backend).dtype == torch.float64
        else:
            refused(mixed, backend, BackendError, "different dtypes (torch.float32, torch.float64)")


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
def test_enormous_sizes_cost_nothing_on_meta(make: Callable[[], Given]) -> None:
    """Shapes are found without numbers: a gigapixel needs no memory to be counted."""
    given = make()
    huge = {k: v.to("meta") for k, v in given.items() if isinstance(v, Tensor)}
    for key in MAPS:
        if key in huge:
            huge[key] = torch.empty((*huge[key].shape[:-2], 30_000, 40_000), dtype=huge[key].dtype, device="meta")
    y = run(given | huge, "torch")
    assert y.shape[2:] == (30_000, 40_000)


def test_groups() -> None:
    given = acda()
    refused(given | {"groups": 0}, "torch", GeometryError, "groups must be at least 1, got 0")
    refused(given | {"groups": 3}, "torch", GeometryError, "must be multiples of groups 3")
    refused(pafu() | {"groups": 0}, "torch", GeometryError, "do not fit for 0 groups")
    thirds = {"x": torch.randn(2, 12, 7, 8), "groups": 3}
    refused(pafu() | thirds, "torch", GeometryError, "do not fit for 3 groups")


def test_a_bias_of_another_size() -> None:
    refused(layer() | {"bias": torch.randn(2)}, "torch", GeometryError, "expects a bias (4), got (2,)")
    refused(layer() | {"bias": torch.randn(4, 1)}, "torch", GeometryError, "expects a bias (4), got (4, 1)")


def test_a_window_or_basis_of_nothing() -> None:
    given = acda()
    empty = {"psi": torch.randn(3, 0, 3), "static": torch.randn(1, 0, 3)}
    refused(given | empty, "torch", GeometryError, "kernel must be two integers >= 1")
    refused(given | {"psi": torch.randn(0, 3, 3)}, "torch", GeometryError, "alpha must be")
    refused(layer() | {"static": torch.randn(4, 1, 0, 3)}, "torch", GeometryError, "a weight")


def test_an_index_that_is_none() -> None:
    given = pafu()
    refused(given | {"index": given["index"].int()}, "torch", GeometryError, "index must be int64, got torch.int32")
    refused(given | {"index": given["index"] - 3}, "torch", GeometryError, "is out of range, there are 3 kernels")
    refused(given | {"index": given["index"] + 3}, "torch", GeometryError, "is out of range, there are 3 kernels")
