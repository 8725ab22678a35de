"""The GPU benchmark without a GPU: it says so, and what it measures runs on the CPU in small."""

from pathlib import Path

import pytest
import torch

from benchmarks import _gpu_operators, gpu

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_cuda_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--results", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error == "benchmarks.gpu needs a CUDA device, and this machine has none\n"
    assert not list(tmp_path.iterdir())


def test_operator_rows_on_small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step but those on Triton, which needs the interpreter here."""
    built = _gpu_operators._backends
    monkeypatch.setattr(_gpu_operators, "_backends", lambda *a: {k: v for k, v in built(*a).items() if k != "triton"})
    rows = list(gpu.operators(CPU, gpu.Deadline(5), {"A": (1, 2, 8)}, repeats=1))
    assert len(rows) == 10
    assert all({"torch", "unfold", "conv3"} <= set(row["steps"]) for row in rows)
    for row in rows:
        assert all(step["forward_ms"] > 0 and step["both_ms"] > 0 for step in row["steps"].values())
    lines = gpu.operator_lines(rows)
    assert lines[0][:2] == ("acda l=7 A bfloat16", "torch")


def test_targets_are_compared_where_there_are_numbers() -> None:
    steps = {
        "triton": {"forward_ms": 1.0, "both_ms": 2.0},
        "unfold": {"forward_ms": 8.0, "both_ms": 7.0},
        "conv7": {"error": "x"},
    }
    rows = [{"case": "acda l=7", "shape": "C", "dtype": dtype, "steps": steps} for dtype in ("bfloat16", "float32")]
    found = _gpu_operators.compare(rows)
    assert [(row["ratio"], row["met"]) for row in found] == [(8.0, True), (3.5, False)]


def test_what_time_does_not_allow_is_listed() -> None:
    deadline = gpu.Deadline(0)
    assert not list(gpu.operators(CPU, deadline, {"A": (1, 2, 8)}))
    assert not list(gpu.training(CPU, deadline))
    assert not list(gpu.memory(deadline, []))
    assert not list(gpu.search(CPU, deadline))
    assert "acda l=7 A bfloat16" in deadline.left_out
    assert "ad_resnet_s float32 on triton" in deadline.left_out
    assert deadline.left_out[-1] == "search under a memory budget"


@pytest.mark.slow
def test_training_and_search_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path))
    rows = list(gpu.training(CPU, gpu.Deadline(5), batch=2, size=64, backends=("torch",)))
    assert [row["what"] for row in rows] == ["ad_resnet_s float32 on torch", "ad_resnet_s AMP on torch"]
    assert all(row["time_ratio"] > 0 for row in rows)
    (row,) = gpu.search(CPU, gpu.Deadline(5), trials="2", steps="1", batch_size="4")
    assert row["exit"] == 0
    assert row["result"]
