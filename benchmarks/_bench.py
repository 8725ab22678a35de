"""Timing and memory for the benchmark programs: interleaved medians, saved bytes, peak memory in a separate process."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]


def interleaved(runs: Sequence[Run], repeats: int) -> list[tuple[float, float]]:
    """Median (process CPU time, wall time) in ms of each run, measured in turns so that drift hits all alike."""
    for run in runs:
        run()
    cpu: list[list[float]] = [[] for _ in runs]
    wall: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for i, run in enumerate(runs):
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            run()
            cpu[i].append((time.process_time() - cpu_start) * 1e3)
            wall[i].append((time.perf_counter() - wall_start) * 1e3)
    return [(sorted(c)[repeats // 2], sorted(w)[repeats // 2]) for c, w in zip(cpu, wall, strict=True)]


def saved_bytes(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for backward beyond the inputs; each storage counts once."""
    own = {t.untyped_storage().data_ptr() for t in inputs}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = forward()  # alive until the hooks are off, or storages could be used again
    del kept
    return sum(seen.values())


def peak_rss() -> int:
    """The highest resident memory of this process so far, in bytes.

    Linux: VmHWM, because `ru_maxrss` of a new process starts at its parent's. macOS counts `ru_maxrss` in bytes.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_subprocess(module: str, args: Sequence[str], threads: int) -> Any:
    """Run a program of this folder in a fresh process and read the JSON document it prints."""
    root = Path(__file__).resolve().parent.parent
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, *args], env=env, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }
