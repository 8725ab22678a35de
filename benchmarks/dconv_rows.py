"""The rows of the operator benchmark that belong to DConv: applying given kernels, and the whole layer with its 1×1 convolution.

`steps(variant, shape)` gives what is compared, "ours" first, each with the tensors it starts from; `TARGETS` are the numbers to
beat; `rows()` measures and yields dictionaries; run as a program it prints them. Times are process CPU time on one thread,
medians of interleaved repetitions in one run, in milliseconds; memory is the growth of the peak resident set over one
forward and backward pass, each step in a fresh process.

    OMP_NUM_THREADS=1 PYTHONPATH=. python -P benchmarks/dconv_rows.py
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.layers.kernels.dconv import dconv, dconv_layer

SHAPES = {"A": (8, 64, 56), "B": (8, 128, 28), "C": (8, 256, 14), "D": (4, 32, 128)}
VARIANTS = ("apply", "layer")

Step = tuple[Callable[[], Tensor], tuple[Tensor, ...]]

# variant, measure, what is divided by what, sign, must by shape, aim by shape
TARGETS: list[tuple[str, str, str, str, str, dict[str, float], dict[str, float]]] = [
    ("apply", "forward", "unfold", "ours", ">=", {"A": 6, "B": 6, "D": 6}, {"A": 14, "B": 14, "D": 14}),
    ("apply", "forward", "ours", "conv3", "<=", {}, {"A": 0.75, "B": 0.75, "D": 0.75}),
    (
        "layer",
        "both",
        "unfold",
        "ours",
        ">=",
        {"A": 2.3, "B": 1, "C": 1, "D": 2.3},
        {"A": 3, "B": 1.3, "C": 1.3, "D": 3},
    ),
    ("layer", "peak", "ours", "unfold", "<=", {"A": 1 / 3, "D": 1 / 3}, {}),
]


def steps(variant: str, shape: str) -> dict[str, Step]:
    """Ours, the published way (unfold, multiply, sum) and a plain 3×3 convolution with as many channels out as in."""
    return _steps_of_size(variant, *SHAPES[shape])


def _steps_of_size(variant: str, images: int, channels: int, size: int) -> dict[str, Step]:
    torch.manual_seed(0)
    x = _parameter(images, channels, size, size)
    dense = _parameter(channels, channels, 3, 3)
    found = _apply_steps(x) if variant == "apply" else _layer_steps(x)
    return found | {"conv3": (lambda: F.conv2d(x, dense, padding=1), (x, dense))}


def _apply_steps(x: Tensor) -> dict[str, Step]:
    images, channels, height, width = x.shape
    kernels = _parameter(images, channels, 9, height, width)
    return {
        "ours": (lambda: dconv(x, kernels, (3, 3), padding=(1, 1)), (x, kernels)),
        "unfold": (lambda: _unfolded(x, kernels), (x, kernels)),
    }


def _layer_steps(x: Tensor) -> dict[str, Step]:
    channels = x.shape[1]
    features, weight = _parameter(*x.shape), _parameter(9 * channels, channels)
    static = _parameter(channels, 1, 3, 3)
    tensors = (x, features, weight, static)

    def published() -> Tensor:
        kernels = F.conv2d(features, weight[:, :, None, None], static.flatten())
        return _unfolded(x, kernels.unflatten(1, (channels, 9)))

    return {
        "ours": (lambda: dconv_layer(*tensors, padding=(1, 1)), tensors),
        "unfold": (published, tensors),
    }


def _unfolded(x: Tensor, kernels: Tensor) -> Tensor:
    return (F.unfold(x, 3, padding=1).view(kernels.shape) * kernels).sum(2)


def _parameter(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def interleaved_ms(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median process CPU time of each, in milliseconds, after one warm-up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def measure(variant: str, shape: str, repeats: int = 9, *, memory: bool = True) -> dict[str, dict[str, float]]:
    """For "forward", "both" (forward and backward), "saved" (bytes beyond the inputs) and "peak" (bytes): a value a step."""
    compared = steps(variant, shape)
    with torch.no_grad():
        found = {"forward": interleaved_ms({name: run for name, (run, _) in compared.items()}, repeats)}
    grad = torch.randn(SHAPES[shape][0], SHAPES[shape][1], SHAPES[shape][2], SHAPES[shape][2])

    def both(run: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(), inputs, grad)

    found["both"] = interleaved_ms({name: both(*step) for name, step in compared.items()}, repeats)
    found["saved"] = {name: _saved_beyond(*step) for name, step in compared.items()}
    if memory:
        found["peak"] = {name: _peak_elsewhere(variant, shape, name) for name in compared}
    return found


def _saved_beyond(run: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> int:
    known = {t.untyped_storage().data_ptr() for t in inputs}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()  # alive until the hooks are off, or storages could be used again
    del kept
    return sum(nbytes for pointer, nbytes in saved.items() if pointer not in known)


def _peak_elsewhere(variant: str, shape: str, name: str) -> int:
    """Growth of the peak resident set over one forward and backward pass, in bytes, in a fresh process."""
    command = [sys.executable, "-P", __file__, "--peak-of", variant, shape, name]
    done = subprocess.run(command, env=dict(os.environ), check=True, capture_output=True, text=True)
    peak: int = json.loads(done.stdout)
    return peak


def _peak_here(variant: str, shape: str, name: str) -> int:
    small, _ = _steps_of_size(variant, 1, 8, 8)[name]
    small().sum().backward()  # what the libraries take once: torch imports its compiler at the first call of an operator
    run, inputs = steps(variant, shape)[name]
    before = _peak_resident()
    y = run()
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    return _peak_resident() - before


def _peak_resident() -> int:
    """Peak resident set of this program, in bytes (Linux). `ru_maxrss` would do, but a new process inherits its parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status: peak memory is measured on Linux only (use --quick)")


def rows(repeats: int = 9, *, memory: bool = True) -> Iterator[dict[str, Any]]:
    """One row a variant and shape, with what was measured and every target's ratio."""
    for variant in VARIANTS:
        for shape in SHAPES:
            found = measure(variant, shape, repeats, memory=memory)
            ratios = []
            for of, quantity, top, bottom, sign, must, aim in TARGETS:
                if of != variant or quantity not in found or shape not in must | aim:
                    continue
                ratio = found[quantity][top] / found[quantity][bottom]
                bound = must.get(shape)
                met = None if bound is None else (ratio >= bound if sign == ">=" else ratio <= bound)
                name = f"{quantity} {top}/{bottom}"
                ratios.append({"ratio": ratio, "of": name, "must": bound, "aim": aim.get(shape), "met": met})
            yield {"operator": "dconv", "variant": variant, "shape": shape, **found, "ratios": ratios}


def main() -> int:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--peak-of"]:
        print(json.dumps(_peak_here(*sys.argv[2:5])))
        return 0
    for row in rows(memory="--quick" not in sys.argv):
        print(f"{row['variant']} {row['shape']}")
        for quantity in ("forward", "both", "saved", "peak"):
            if quantity in row:
                scale = 1e6 if quantity in ("saved", "peak") else 1
                values = ", ".join(f"{name} {value / scale:.1f}" for name, value in row[quantity].items())
                print(f"  {quantity:8} {'MB' if scale > 1 else 'ms'}: {values}")
        for ratio in row["ratios"]:
            print(
                f"  {ratio['of']}: {ratio['ratio']:.2f} (must {ratio['must']}, aim {ratio['aim']}, met {ratio['met']})"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
