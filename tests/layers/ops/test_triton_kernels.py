"""The Triton kernels without a GPU: interpreted against the definitions, and compiled for sm_80 and sm_90 without spills.

Both happen in processes of their own; on a GPU the `gpu` tests run the kernels themselves.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgeon.errors import BackendError
from surgeon.layers.acda.operator import ACDA_CONV, acda_conv
from surgeon.layers.ops.dispatch import ENVIRONMENT
from surgeon.layers.ops.triton import support
from surgeon.layers.pafu.operator import pafu_conv
from surgeon.layers.sekg.operator import DCONV, dconv, dconv_layer
from tests.support.layers.acda import problem
from tests.support.layers.pafu import make_case
from tests.support.layers.sekg import small, small_kernels
from tests.support.places import ROOT

needs_triton = pytest.mark.skipif(not support.HAS_TRITON, reason="needs triton")
OPERATORS = ("acda", "dconv", "dconv_layer", "pafu")


def run_module(module: str, *arguments: str, **environment: str) -> Any:
    """What a module of the tests prints as JSON, in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-P", "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def interpreted(*arguments: str) -> None:
    found = run_module("tests.support.layers.triton_interpreted", *arguments, TRITON_INTERPRET="1")
    assert len(found) > 10 * sum(name in OPERATORS for name in arguments)
    wrong = [f"{check}: {error}" for check, error in found.items() if error]
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
@needs_triton
def test_interpreted_kernels_are_the_definition() -> None:
    interpreted(*OPERATORS)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_interpreted_kernels_over_many_geometries(operator: str) -> None:
    interpreted(operator, "--all")


def assert_fit(rows: list[dict[str, Any]], kernels: int, shared: int) -> None:
    """No spills, and no more shared memory than a program may have, bytes."""
    assert len({(row["kernel"], json.dumps(row["constants"])) for row in rows}) >= kernels
    assert not [row for row in rows if row["spills"]]
    assert not [row for row in rows if row["shared"] > shared]


SHARED = {"80": 166_912, "90": 232_448}
BUILDS = [("80", "float32"), ("90", "bfloat16"), ("80", "bfloat16"), ("90", "float32"), ("90", "float16")]


@pytest.mark.long
@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype"), BUILDS[:1]
)  # the one with the least shared memory and the widest numbers
def test_kernels_compile_without_spills(capability: str, dtype: str, tmp_path: Path) -> None:
    rows = run_module("tests.support.layers.triton_ahead", capability, dtype, TRITON_CACHE_DIR=str(tmp_path))
    assert_fit(rows, 12, SHARED[capability])


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), BUILDS)
def test_every_configuration_compiles_without_spills(capability: str, dtype: str, tmp_path: Path) -> None:
    rows = run_module("tests.support.layers.triton_ahead", capability, dtype, "--all", TRITON_CACHE_DIR=str(tmp_path))
    assert_fit(rows, 12, SHARED[capability])
    assert len(rows) > 30


# --- which backend runs -------------------------------------------------------------------------------------------


def test_on_the_cpu_the_reason_is_the_device() -> None:
    (x, *rest), geometry = problem(dtype=torch.float32)
    assert ACDA_CONV.why_not("triton", x, *rest, *geometry) == ["it runs on CUDA; the tensors are on cpu"]
    assert ACDA_CONV.choose(x, *rest, *geometry).name in ("native", "torch")
    with pytest.raises(BackendError, match="it runs on CUDA; the tensors are on cpu"):
        acda_conv(x, *rest, *geometry, backend="triton")


def test_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "HAS_TRITON", False)
    x, kernels = small_kernels()
    reasons = DCONV.why_not("triton", x, kernels.float(), (3, 3), (1, 1), (1, 1), (1, 1))
    assert reasons == [
        "it runs on CUDA; the tensors are on cpu",
        "the package triton is not installed",
        "it computes in float32, bfloat16 and float16, not in torch.float64",
        "its tensors are of different dtypes (torch.float32, torch.float64)",
    ]


def test_an_image_beyond_32_bit_places_is_a_reason() -> None:
    huge = torch.empty(1, 64, 8192, 8192, device="meta")
    assert list(support.reasons_against([huge]))[-1] == "one image of (1, 64, 8192, 8192) spans more than 2^31 elements"
    assert not any("2^31" in reason for reason in support.reasons_against([huge[:, :16]]))


def test_an_older_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Turing:
        name, major, minor = "T4", 7, 5

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Turing)
    assert support._device_reasons(["cuda"], torch.device("cuda")) == ["it needs compute capability 8.0, T4 has 7.5"]
    Turing.major, Turing.minor = 9, 0
    assert support._device_reasons(["cuda"], torch.device("cuda")) == []
    assert support._device_reasons(["cpu", "cuda"], torch.device("cuda")) != []


def test_the_environment_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    operands, geometry = problem(dtype=torch.float32)
    monkeypatch.setenv(ENVIRONMENT, "reference")
    assert ACDA_CONV.choose(*operands, *geometry).name == "reference"
    assert ACDA_CONV.choose(*operands, *geometry, backend="torch").name == "torch"
    monkeypatch.setenv(ENVIRONMENT, "")
    assert ACDA_CONV.choose(*operands, *geometry).name in ("native", "torch")
    monkeypatch.setenv(ENVIRONMENT, "triton")
    with pytest.raises(BackendError, match="the tensors are on cpu"):
        acda_conv(*operands, *geometry)
    on_meta = [t.to("meta") for t in operands]
    assert acda_conv(*on_meta, *geometry).shape == (2, 8, 7, 8)
    monkeypatch.setenv(ENVIRONMENT, "cutlass")
    with pytest.raises(BackendError, match=f"{ENVIRONMENT} is 'cutlass', but acda_conv has only triton, native, torch"):
        acda_conv(*operands, *geometry)


def test_the_environment_is_read_by_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "torch")
    operands, geometry = problem(size=(5, 6), dtype=torch.float32)
    compiled = torch.compile(lambda *t: acda_conv(*t, *geometry).sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*operands), acda_conv(*operands, *geometry).sin())


def test_triton_is_not_imported_before_it_runs() -> None:
    """timm imports triton itself, so that what counts is that none of our modules does."""
    code = "import sys, surgeon.layers; print(*sorted(name for name in sys.modules if '.triton' in name and 'surgeon' in name))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    package = "surgeon.layers.ops.triton"
    assert done.stdout.split() == [package, f"{package}.support"]


# --- on a GPU -----------------------------------------------------------------------------------------------------


def outputs_and_gradients(call: Any, tensors: list[Tensor | None], backend: str) -> list[Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = call(*leaves, backend=backend)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).cos().view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], weights)]


def gpu_case(operator: str) -> tuple[Any, list[Tensor | None]]:
    """A call and its tensors, float32 on the CPU, large enough for many programs."""
    if operator == "acda":
        operands, geometry = problem(
            size=(23, 19), window=(7, 7), padding=(3, 3), stride=(2, 1), channels=40, elements=18, dtype=torch.float32
        )
        return lambda *t, backend: acda_conv(*t, *geometry, backend=backend), [*operands]
    if operator == "dconv":
        x, kernels = torch.randn(3, 24, 21, 17), torch.randn(3, 24, 9, 21, 17)
        return lambda x, k, backend: dconv(x, k, (3, 3), padding=(1, 1), backend=backend), [x, kernels]
    if operator == "dconv_layer":
        return lambda *t, backend: dconv_layer(*t, padding=(1, 1), backend=backend), small(torch.float32)
    case, window = make_case(size=(19, 23), per_group=(40, 72), groups=2, n=5, dtype=torch.float32)
    index = case["index"].cuda()

    def call(x: Tensor, kernel: Tensor, further: Tensor, soft: Tensor, *, backend: str) -> Tensor:
        return pafu_conv(x, kernel, further, index, soft, padding=window.padding, groups=2, backend=backend)

    return call, [case[name] for name in ("x", "kernel", "further", "soft")]


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_on_a_gpu(operator: str, dtype: torch.dtype, tolerance: float, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    call, tensors = gpu_case(operator)
    given = [None if t is None else t.detach().to("cuda", dtype) for t in tensors]
    given = [t.contiguous(memory_format=memory_format) if t is not None and t.dim() == 4 else t for t in given]
    exact = outputs_and_gradients(call, [None if t is None else t.double() for t in given], "reference")
    for ours, theirs in zip(outputs_and_gradients(call, given, "triton"), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_on_a_gpu_deterministic_and_captured(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(0)
    call, tensors = gpu_case(operator)
    given = [None if t is None else t.detach().cuda() for t in tensors]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (outputs_and_gradients(call, given, "triton") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    expected = call(*given, backend="triton")  # tunes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*given, backend="triton")
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected)
