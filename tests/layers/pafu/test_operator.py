"""The kernel-selection operator against its reference: outputs and every gradient, over all geometries."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgeon.errors import BackendError, GeometryError
from surgeon.layers.pafu import frames as pafu_frames
from surgeon.layers.pafu import grouped as pafu_grouped
from surgeon.layers.pafu.frames import FrameProblem, Window
from surgeon.layers.pafu.operator import METHODS, PAFU_CONV, pafu_conv
from tests.support.layers.pafu import Case, make_case


def run(method: str, tensors: Mapping[str, Tensor | None], window: Window) -> Tensor:
    args = (*tensors.values(), window.stride, window.padding, window.dilation, window.groups)
    if method == "reference":
        return PAFU_CONV(*args, backend="reference")
    y: Tensor = torch.ops.surgeon.pafu_conv(*args, method)
    return y


def output_and_gradients(method: str, tensors: Mapping[str, Tensor], window: Window) -> dict[str, Tensor]:
    leaves = {
        name: t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
        for name, t in tensors.items()
    }
    y = run(method, leaves, window)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().view(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    return {"y": y.detach()} | {name: t.grad for name, t in leaves.items() if t.grad is not None}


def assert_same(method: str, case: Case, tolerance: float = 1e-12) -> None:
    expected = output_and_gradients("reference", *case)
    got = output_and_gradients(method, *case)
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        error = (got[name].double() - expected[name].double()).abs().max()
        assert error <= tolerance * expected[name].double().abs().max().clamp(min=1), name


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any geometry whose output is not empty."""
    pairs = {
        "size": st.integers(5, 9),
        "kernel": st.integers(1, 4),
        "stride": st.integers(1, 3),
        "padding": st.integers(0, 6),
        "dilation": st.integers(1, 2),
    }
    size, kernel, stride, padding, dilation = (draw(st.tuples(each, each)) for each in pairs.values())
    assume(min(Window(kernel, stride, padding, dilation, 1).output_size(*size)) > 0)
    return make_case(
        images=draw(st.integers(1, 3)),
        n=draw(st.integers(2, 5)),
        size=size,
        per_group=draw(st.sampled_from([(1, 1), (1, 2), (3, 2), (4, 5)])),
        groups=draw(st.integers(1, 3)),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        seed=draw(st.integers(0, 100)),
    )


def methods_for(case: Case) -> list[str]:
    depthwise = case[0]["kernel"].shape[1] == 1 and case[1].groups > 1
    return [method for method in ("auto", *METHODS) if method != "taps" or depthwise]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases(), small_chunks=st.booleans())
def test_every_method_is_the_reference(case: Case, small_chunks: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if small_chunks:
            patch.setattr(pafu_frames, "CHUNK_BYTES", 700)
            patch.setattr(pafu_grouped, "BLOCK_BYTES", 700)
        for method in methods_for(case):
            assert_same(method, case)


@pytest.mark.parametrize("method", ["auto", "grouped", "dense"])
def test_one_kernel_everywhere(method: str) -> None:
    for selected in (0, 2):
        tensors, window = make_case()
        assert_same(method, (tensors | {"index": torch.full_like(tensors["index"], selected)}, window))


@pytest.mark.parametrize("per_group", [(4, 5), (1, 1)])
def test_an_empty_batch_gives_an_empty_output(per_group: tuple[int, int]) -> None:
    tensors, window = make_case(images=0, per_group=per_group, groups=2)
    got = output_and_gradients("auto", tensors, window)
    assert got["y"].shape == (0, 2 * per_group[1], 7, 9)
    assert not got["kernel"].any()


@pytest.mark.parametrize("groups", [1, 4])
def test_gradients_are_those_of_finite_differences(groups: int) -> None:
    per_group = (2, 3) if groups == 1 else (1, 1)
    tensors, window = make_case(images=1, size=(4, 5), per_group=per_group, groups=groups, stride=(2, 1))
    index = tensors["index"]
    leaves = [tensors[name].requires_grad_() for name in ("x", "kernel", "further")]
    for method in methods_for((tensors, window)):

        def conv(x: Tensor, kernel: Tensor, further: Tensor, method: str = method) -> Tensor:
            given = {"x": x, "kernel": kernel, "further": further, "index": index, "soft": None}
            return run(method, given, window)

        assert torch.autograd.gradcheck(conv, leaves)


def test_the_gradient_of_the_soft_selection_scores_every_kernel() -> None:
    """d/d soft_i = <g, K_i * x> at every pixel, also where kernel i was not selected (straight-through, §3.4)."""
    tensors, window = make_case()
    soft = tensors["soft"].requires_grad_()
    y = run("auto", tensors, window)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    kernels = [tensors["kernel"], *tensors["further"]]
    expected = [(F.conv2d(tensors["x"], kernel, padding=1) * grad).sum(1) for kernel in kernels]
    torch.testing.assert_close(soft.grad, torch.stack(expected, 1))


def test_identical_kernels_give_the_selector_no_gradient() -> None:
    """Through a softmax, equal scores cancel: this is why the kernels of a new group are perturbed."""
    tensors, window = make_case()
    same = tensors | {"further": tensors["kernel"].expand_as(tensors["further"]).contiguous()}
    for each, silent in ((tensors, False), (same, True)):
        logits = torch.zeros_like(tensors["soft"]).requires_grad_()
        run("auto", each | {"soft": logits.softmax(1)}, window).square().sum().backward()
        assert logits.grad is not None
        assert bool(logits.grad.abs().max() < 1e-10) is silent


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("method", ["grouped", "taps", "dense"])
def test_other_dtypes(method: str, dtype: torch.dtype, tolerance: float) -> None:
    per_group, groups = ((1, 2), 3) if method == "taps" else ((8, 8), 1)
    tensors, window = make_case(dtype=dtype, per_group=per_group, groups=groups)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    expected = output_and_gradients("reference", exact, window)
    got = output_and_gradients(method, tensors, window)
    for name, value in expected.items():
        assert got[name].dtype == dtype
        assert (got[name].double() - value).abs().max() <= tolerance * value.abs().max(), name


def test_the_memory_format_of_the_input_is_kept() -> None:
    for selected in (None, 0, 1):
        tensors, window = make_case(dtype=torch.float32)
        if selected is not None:
            tensors["index"].fill_(selected)
        x = tensors["x"].to(memory_format=torch.channels_last).requires_grad_()
        y = run("auto", tensors | {"x": x}, window)
        torch.testing.assert_close(y, run("reference", tensors, window))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert run("auto", tensors, window).is_contiguous()
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_autocast_takes_the_products_in_its_dtype() -> None:
    tensors, _ = make_case(dtype=torch.float32)
    x = tensors["x"].requires_grad_()
    args = (tensors["kernel"], tensors["further"], tensors["index"], tensors["soft"])
    expected = pafu_conv(x, *args, padding=(1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pafu_conv(x, *args, padding=(1, 1))
        double = pafu_conv(x.double(), *(t.double() if t.is_floating_point() else t for t in args), padding=(1, 1))
    assert y.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    assert (y.float() - expected).abs().max() <= 2e-2 * expected.abs().max()
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # in opcheck's own code
@pytest.mark.parametrize("soft", [True, False])
def test_it_is_a_well_formed_torch_operator(soft: bool) -> None:
    tensors, window = make_case(size=(4, 5), dtype=torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = tensors | {"x": tensors["x"].to(memory_format=memory_format)} | ({} if soft else {"soft": None})
        leaves = [t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in given.values()]
        args = (*leaves, window.stride, window.padding, window.dilation, window.groups, "auto")
        torch.library.opcheck(torch.ops.surgeon.pafu_conv, args)


def test_nothing_is_saved_but_inputs() -> None:
    tensors, window = make_case(dtype=torch.float32)
    leaves = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in tensors.items()}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        run("auto", leaves, window)
    assert set(saved) <= {t.data_ptr() for t in leaves.values()}


def test_temporaries_stay_small() -> None:
    """Chunks hold at most 8 MiB of input and output, whatever the size of the image."""
    tensors, window = make_case(images=1, size=(300, 301), per_group=(64, 64), dtype=torch.float32)
    x, kernel, further, index, _ = tensors.values()
    problem = FrameProblem.of(x, kernel, further, index, window)
    chunks = list(problem.chunks(pafu_grouped._pixel_bytes(problem, 2)))
    assert len(chunks) > 1
    assert [row for chunk in chunks for row in range(chunk.rows.start, chunk.rows.stop)] == list(range(300))
    for chunk in chunks:
        assert chunk.read(x, x.dtype).nbytes + 2 * chunk.outputs(x).numel() * 4 <= 9 << 20


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": torch.zeros(2, 4, 7, 9)}, "groups"),
        ({"x": torch.zeros(3, 7, 9)}, "do not fit"),
        ({"further": torch.zeros(2, 4, 3, 3, 5)}, "further kernels"),
        ({"index": torch.zeros(2, 7, 8, dtype=torch.int64)}, r"should be \(2, 7, 9\)"),
        ({"soft": torch.zeros(2, 4, 7, 9)}, "soft"),
        ({"index": torch.full((2, 7, 9), 3)}, "3 is out of range, there are 3 kernels"),
    ],
)
def test_wrong_shapes_are_one_clear_error(changes: dict[str, Tensor], said: str) -> None:
    tensors, _ = make_case(dtype=torch.float32)
    with pytest.raises(GeometryError, match=said):
        pafu_conv(**(tensors | changes), padding=(1, 1))


def test_an_unknown_backend_is_named() -> None:
    tensors, _ = make_case(dtype=torch.float32)
    with pytest.raises(BackendError, match="no backend 'cuda'; it has triton, native, torch, portable, reference"):
        pafu_conv(**tensors, padding=(1, 1), backend="cuda")
    torch.testing.assert_close(
        pafu_conv(**tensors, padding=(1, 1), backend="reference"), pafu_conv(**tensors, padding=(1, 1))
    )
