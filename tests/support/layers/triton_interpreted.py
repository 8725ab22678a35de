"""Run the Triton kernels in Triton's interpreter, on CPU tensors, against the definitions: outputs and every gradient.

    TRITON_INTERPRET=1 python -m tests.support.layers.triton_interpreted OPERATOR … [--all]

A process of its own: the interpreter is chosen when Triton is imported. Prints one JSON object, check → None or what is wrong, with
the operator's name before each check; `--all` adds float16 and a sweep over geometries.
"""

import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from surgeon.errors import BackendError, GeometryError
from surgeon.layers.acda.operator import ACDA_CONV, acda_conv
from surgeon.layers.ops.triton import chunks
from surgeon.layers.pafu.operator import PAFU_CONV, pafu_conv
from surgeon.layers.sekg.operator import dconv, dconv_layer
from tests.support.layers.acda import problem
from tests.support.layers.pafu import make_case
from tests.support.layers.sekg import layer_tensors

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest number of a result
HALF = (torch.bfloat16, torch.float16)
Call = Callable[..., Tensor]
Check = tuple[str, Callable[[], None]]


def compare(call: Call, tensors: list[Tensor | None], scratch: int = 32 << 20) -> None:
    """Outputs and gradients on Triton against the definition in float64; `scratch` bytes a chunk."""
    dtype = next(t.dtype for t in tensors if t is not None)
    exact = results(call, [None if t is None else t.detach().double().requires_grad_() for t in tensors], "reference")
    before, chunks.SCRATCH_BYTES = chunks.SCRATCH_BYTES, scratch
    try:
        got = results(call, [None if t is None else t.detach().requires_grad_() for t in tensors], "triton")
    finally:
        chunks.SCRATCH_BYTES = before
    for place, (ours, theirs) in enumerate(zip(got, exact, strict=True)):
        assert ours.dtype == dtype, f"result {place} is {ours.dtype}"
        if theirs.numel():
            error = ((ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)).item()
            assert error <= TOLERANCE[dtype], f"result {place} is off by {error:.1e}"


def results(call: Call, tensors: list[Tensor | None], backend: str) -> list[Tensor]:
    """Output, and the gradient of every tensor, for a weighting that every dtype holds exactly."""
    y = call(*tensors, backend=backend)
    weights = (torch.arange(y.numel()) % 7 - 3).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t is not None], weights)]


def refused(run: Callable[[], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said)):
        run()


def last(values: Iterable[Any]) -> list[Any]:
    """With the channels last in memory where they are maps."""
    return [
        t.contiguous(memory_format=torch.channels_last) if isinstance(t, Tensor) and t.dim() == 4 else t for t in values
    ]


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# --- what every operator is asked ---------------------------------------------------------------------------------


def general(call: Call, tensors: list[Tensor | None], operator: Any, arguments: tuple[Any, ...]) -> Iterator[Check]:
    """Registration, formats, determinism, one derivative; `arguments` are those of the operator's overload for these tensors."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]

    @cache
    def usual() -> list[Tensor]:
        return results(call, leaves, "triton")

    def registered() -> None:
        for form in (list, last):
            given = [t.detach().requires_grad_() if _is_real(t) else t for t in form(arguments)]
            torch.library.opcheck(
                operator, tuple(given), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
            )

    def channels_last_is_kept() -> None:
        y, grad_x, *_ = results(
            call, [t if t is None else t.detach().requires_grad_() for t in last(tensors)], "triton"
        )
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert grad_x.is_contiguous(memory_format=torch.channels_last)

    def any_strides() -> None:
        wide = [
            None if t is None else torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_() for t in tensors
        ]
        for ours, theirs in zip(results(call, wide, "triton"), usual(), strict=True):
            torch.testing.assert_close(ours, theirs)

    def deterministic() -> None:
        torch.use_deterministic_algorithms(True)
        try:
            again = results(call, leaves, "triton")
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(usual(), again, strict=True))

    def saves_inputs_only() -> None:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            call(*leaves, backend="triton")
        inputs = {t.untyped_storage().data_ptr() for t in (*leaves, *arguments) if isinstance(t, Tensor)}
        assert {t.untyped_storage().data_ptr() for t in saved} <= inputs

    def differentiable_once() -> None:
        (grad,) = torch.autograd.grad(call(*leaves, backend="triton").square().sum(), leaves[0], create_graph=True)
        refused(lambda: grad.sum().backward(), BackendError, "can be differentiated once")

    def autocast() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = call(*leaves, backend="triton")
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().sum(), [t for t in leaves if t is not None])
        assert all(g.dtype == torch.float32 for g in grads)

    def empty_batch() -> None:
        images = tensors[0].shape[0]
        none = [t[:0] if t is not None and t.dim() > 3 and t.shape[0] == images else t for t in tensors]
        y, *grads = results(call, [None if t is None else t.detach().requires_grad_() for t in none], "triton")
        assert y.shape[0] == 0
        assert not any(g.any() for g in grads)

    checks = (
        registered,
        channels_last_is_kept,
        any_strides,
        deterministic,
        saves_inputs_only,
        differentiable_once,
        autocast,
    )
    yield from ((check.__name__, check) for check in checks)
    if operator is not torch.ops.surgeon.pafu_conv.default:  # there the index has images of its own
        yield "empty_batch", empty_batch


# --- operators ----------------------------------------------------------------------------------------------------


def acda(sweep: bool) -> Iterator[Check]:
    small = {"size": (4, 5), "dtype": torch.float32}

    def case(name: str, scratch: int = 32 << 20, **options: Any) -> Check:
        operands, geometry = problem(**(small | options))
        return name, lambda: compare(
            lambda *t, backend: acda_conv(*t, *geometry, backend=backend), [*operands], scratch
        )

    yield case("plain")
    yield case("stride, dilation, groups, a 2x3 window", stride=(2, 1), dilation=(1, 2), groups=2, window=(2, 3))
    yield case("rows cut into chunks", scratch=700, images=1, padding=(2, 0), stride=(2, 1), size=(5, 3))
    yield case("images cut into chunks", scratch=6000, images=3, static=0)
    yield case("more atoms than a block", atoms=7, static=3, elements=2, window=(1, 2), padding=(0, 0))
    yield case("an even window, depthwise", window=(4, 2), padding=(2, 1), groups=4, multiplier=1)
    for dtype in HALF if sweep else HALF[:1]:
        yield case(f"{dtype}", dtype=dtype, static=1)
    operands, geometry = problem(size=(3, 4), dtype=torch.float32)

    def of_two_dtypes() -> None:
        x, *others = operands
        y, grad_x, *grads = results(
            lambda *t, backend: acda_conv(*t, *geometry, backend=backend),
            [x.detach().bfloat16().requires_grad_(), *others],
            "triton",
        )
        assert (y.dtype, grad_x.dtype) == (torch.bfloat16, torch.bfloat16)
        assert all(g.dtype == torch.float32 for g in grads)

    def environment() -> None:
        os.environ["SURGEON_BACKEND"] = "reference"
        assert ACDA_CONV.choose(*operands, *geometry).name == "reference"
        os.environ["SURGEON_BACKEND"] = "triton"
        double = [t.double() for t in operands]
        refused(
            lambda: acda_conv(*double, *geometry), BackendError, "float32, bfloat16 and float16, not in torch.float64"
        )
        del os.environ["SURGEON_BACKEND"]
        assert ACDA_CONV.choose(*operands, *geometry).name == "triton"  # the interpreter is asked for

    yield "operands of two dtypes", of_two_dtypes
    yield "the environment's choice", environment
    arguments = (*operands, *geometry, "triton")

    def call(*tensors: Tensor, backend: str) -> Tensor:
        return acda_conv(*tensors, *geometry, backend=backend)

    yield from general(call, [*operands], torch.ops.surgeon.acda_conv.default, arguments)
    pairs = [(1, 1), (2, 1), (1, 3)]
    for window, stride, dilation, groups in (
        itertools.product([(1, 1), (2, 3), (5, 4)], pairs, pairs, (1, 2)) if sweep else ()
    ):
        size = tuple(d * (k - 1) + 3 for k, d in zip(window, dilation, strict=True))
        options = {"window": window, "stride": stride, "dilation": dilation, "groups": groups, "size": size}
        yield case(f"{options}", images=1, padding=(1, 0), **options)


def _dconv_case(**options: Any) -> dict[str, Any]:
    case = {"x": (2, 4, 4, 5), "outputs": 4, "groups": 4, "features": 3, "kernel": (3, 2), "bias": True, "seed": 0}
    case |= {"geometry": {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}} | options
    g = case["geometry"]
    sizes = zip(case["x"][2:], g["padding"], g["dilation"], case["kernel"], g["stride"], strict=True)
    return case | {"out": tuple((s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, d, k, t in sizes)}


STRIDED = {"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}


def dconv_apply(sweep: bool) -> Iterator[Check]:
    def make(dtype: torch.dtype, **options: Any) -> tuple[Call, list[Tensor | None]]:
        case = _dconv_case(**options)
        torch.manual_seed(0)
        kernels = torch.randn(
            case["x"][0], case["groups"], case["kernel"][0] * case["kernel"][1], *case["out"], dtype=dtype
        )
        x = torch.randn(case["x"], dtype=dtype)
        return lambda x, k, backend: dconv(x, k, case["kernel"], **case["geometry"], backend=backend), [x, kernels]

    def check(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Check:
        call, tensors = make(dtype, **options)
        return name, lambda: compare(call, tensors)

    yield check("plain")
    yield check("stride, dilation, shared kernels", groups=2, geometry=STRIDED)
    yield check("several kernels a channel", groups=8)
    for dtype in HALF if sweep else HALF[:1]:
        yield check(f"{dtype}", dtype)
    call, tensors = make(torch.float32)
    arguments = (*tensors, (3, 2), (1, 1), (1, 1), (1, 1), "triton")
    yield from general(call, tensors, torch.ops.surgeon.dconv.default, arguments)
    pairs = [(1, 1), (2, 1), (1, 3)]
    for kernel, stride, dilation, groups in (
        itertools.product([(1, 1), (2, 3), (4, 5)], pairs, pairs, (1, 4)) if sweep else ()
    ):
        geometry = {"stride": stride, "padding": (2, 1), "dilation": dilation}
        x = (1, 4, *(d * (k - 1) + 2 for k, d in zip(kernel, dilation, strict=True)))
        yield check(f"{kernel} {geometry} {groups}", kernel=kernel, geometry=geometry, groups=groups, x=x)


def dconv_fused(sweep: bool) -> Iterator[Check]:
    def make(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Call, list[Tensor | None]]:
        case = _dconv_case(**options)

        def call(*tensors: Tensor, backend: str) -> Tensor:
            return dconv_layer(*tensors, **case["geometry"], backend=backend)

        return call, [None if t is None else t.detach() for t in layer_tensors(case, dtype)]

    def check(name: str, dtype: torch.dtype = torch.float32, scratch: int = 32 << 20, **options: Any) -> Check:
        call, tensors = make(dtype, **options)
        return name, lambda: compare(call, tensors, scratch)

    yield check("plain")
    yield check("stride, dilation, shared kernels, no bias", groups=2, geometry=STRIDED, bias=False)
    yield check("several kernels a channel", groups=8, outputs=8)
    yield check("more outputs than kernels", groups=2, outputs=8, x=(1, 4, 3, 3))
    yield check("rows cut into chunks", scratch=400, x=(1, 4, 5, 2), geometry=STRIDED | {"dilation": (1, 1)})
    for dtype in HALF if sweep else HALF[:1]:
        yield check(f"{dtype}", dtype)
    call, tensors = make()
    arguments = (*tensors, (1, 1), (1, 1), (1, 1), "triton")
    yield from general(call, tensors, torch.ops.surgeon.dconv_layer.default, arguments)
    for groups, outputs, scratch in itertools.product((1, 2, 4, 8), (8, 16), (300, 1500)) if sweep else ():
        options = {"groups": groups, "outputs": outputs, "geometry": STRIDED, "x": (2, 4, 5, 5)}
        yield check(f"{options} {scratch}", scratch=scratch, **options)


def pafu(sweep: bool) -> Iterator[Check]:
    def make(**options: Any) -> tuple[Call, list[Tensor | None], tuple[Any, ...]]:
        case, window = make_case(**({"images": 1, "size": (2, 3), "kernel": (2, 2), "dtype": torch.float32} | options))
        index = case["index"]
        geometry = {
            "stride": window.stride,
            "padding": window.padding,
            "dilation": window.dilation,
            "groups": window.groups,
        }

        def call(x: Tensor, kernel: Tensor, further: Tensor, soft: Tensor, *, backend: str) -> Tensor:
            return pafu_conv(x, kernel, further, index, soft, **geometry, backend=backend)

        return (
            call,
            [case[name] for name in ("x", "kernel", "further", "soft")],
            (*case.values(), *geometry.values(), "triton"),
        )

    def check(name: str, **options: Any) -> Check:
        call, tensors, _ = make(**options)
        return name, lambda: compare(call, tensors)

    yield check("plain", images=2)
    window = {"stride": (2, 1), "dilation": (1, 2), "groups": 2, "kernel": (1, 2)}
    yield check("stride, dilation, groups, an oblong kernel", size=(3, 3), n=2, **window)
    yield check("more channels than a block", per_group=(33, 65), size=(1, 2), kernel=(1, 2), padding=(0, 0), n=2)
    for dtype in HALF if sweep else HALF[:1]:
        yield check(f"{dtype}", dtype=dtype, n=2)
    call, tensors, arguments = make(size=(1, 2), n=2)
    yield from general(call, tensors, torch.ops.surgeon.pafu_conv.default, arguments)

    def refusals() -> None:
        case, window = make_case(dtype=torch.float32, per_group=(1, 1), groups=3)
        reasons = PAFU_CONV.why_not("triton", *case.values(), *window[1:])
        assert reasons == ["it multiplies matrices, and a depthwise convolution has none"]
        case, _ = make_case(dtype=torch.float32)
        wrong = case | {"index": case["index"] + 1}
        refused(lambda: pafu_conv(**wrong, padding=(1, 1), backend="triton"), GeometryError, "index 3 is out of range")

    yield "refusals", refusals
    pairs = [(1, 1), (2, 1), (1, 3)]
    kernels = [(1, 1), (3, 2), (2, 3), (3, 3)]
    for kernel, stride, dilation, groups in itertools.product(kernels, pairs, pairs, (1, 2)) if sweep else ():
        options = {"kernel": kernel, "stride": stride, "dilation": dilation, "groups": groups}
        yield check(f"{options}", size=(7, 6), **options)


OPERATORS = {"acda": acda, "dconv": dconv_apply, "dconv_layer": dconv_fused, "pafu": pafu}


def main(arguments: list[str]) -> int:
    torch.set_num_threads(1)
    found: dict[str, str | None] = {}
    for operator in (name for name in OPERATORS if name in arguments):
        for name, check in OPERATORS[operator]("--all" in arguments):
            try:
                check()
                found[f"{operator}: {name}"] = None
            except (Exception, pytest.fail.Exception):
                found[f"{operator}: {name}"] = traceback.format_exc(limit=-3)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
