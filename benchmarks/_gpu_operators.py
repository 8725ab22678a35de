"""The operator rows of the GPU benchmark: shapes, timing method and targets.

Forward, and forward with backward, of our operators on Triton, in plain torch, the published one (unfold), and convolutions of
the same channels in channels-last memory (cuDNN). Times are medians of replays of a CUDA graph that runs over several copies of the
tensors in turn, so launches do not count and the L2 cache is cold; what cannot be captured is timed eagerly and marked.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.layers.acda.operator import acda_conv
from surgeon.layers.pafu.operator import pafu_conv
from surgeon.layers.sekg.operator import dconv, dconv_layer

SHAPES = {
    "A": (32, 64, 56),
    "B": (32, 128, 28),
    "C": (64, 256, 14),
    "D": (8, 32, 128),
}  # images, channels, height = width
COLD_BYTES = 128 << 20  # of inputs that are gone through before one is used again: more than an L2 cache
Maker = Callable[..., Tensor]


@dataclass(frozen=True)
class Timed:
    """A computation and the tensors that its gradient is taken by; `capturable`: whether it never waits for the GPU."""

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    capturable: bool = True


@dataclass(frozen=True)
class GpuCase:
    """`build` makes fresh tensors and the named steps, of which "triton" and "torch" are ours."""

    name: str
    shape: str
    build: Callable[[Maker], dict[str, Timed]]


def cases(shapes: dict[str, tuple[int, int, int]] | None = None) -> Iterator[GpuCase]:
    """Every operator on every shape (images, channels, height = width)."""
    for key, size in (shapes or SHAPES).items():
        yield GpuCase("acda l=7", key, partial(_acda, size))
        yield GpuCase("dconv apply", key, partial(_dconv_apply, size))
        yield GpuCase("dconv layer", key, partial(_dconv_layer, size))
        yield GpuCase("pafu eval n=8", key, partial(_pafu, size, False))
        yield GpuCase("pafu train n=8", key, partial(_pafu, size, True))


def maker(device: torch.device, dtype: torch.dtype) -> Maker:
    """Makes random parameters on the device."""

    def make(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) * 0.1).to(dtype).requires_grad_()

    return make


def _convolution(make: Maker, x: Tensor, k: int) -> Timed:
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = make(x.shape[1], x.shape[1], k, k).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    return Timed(partial(F.conv2d, last, weight, padding=k // 2), (last, weight))


def _backends(
    run: Callable[..., Tensor], inputs: tuple[Tensor, ...], lean_is_capturable: bool = True
) -> dict[str, Timed]:
    """Ours on both backends, and the definition, which is the published way."""
    return {
        "triton": Timed(partial(run, backend="triton"), inputs),
        "torch": Timed(partial(run, backend="torch"), inputs, lean_is_capturable),
        "unfold": Timed(partial(run, backend="reference"), inputs, lean_is_capturable),
    }


def _acda(size: tuple[int, int, int], make: Maker) -> dict[str, Timed]:
    n, c, s = size
    x, alpha, coeff = make(n, c, s, s), make(n, 108, s, s), make(c, c, 6)
    psi, static = make(18, 7, 7).detach(), make(0, 7, 7).detach()
    run = partial(acda_conv, x, alpha, psi, static, coeff, (1, 1), (3, 3), (1, 1), 1)
    return _backends(run, (x, alpha, coeff)) | {"conv3": _convolution(make, x, 3), "conv7": _convolution(make, x, 7)}


def _dconv_apply(size: tuple[int, int, int], make: Maker) -> dict[str, Timed]:
    n, c, s = size
    x, kernels = make(n, c, s, s), make(n, c, 9, s, s)
    run = partial(dconv, x, kernels, (3, 3), padding=(1, 1))
    copied = Timed(lambda: kernels.clone(), (kernels,))  # what the memory can do: the kernels, read and written
    return _backends(run, (x, kernels)) | {"copy": copied, "conv3": _convolution(make, x, 3)}


def _dconv_layer(size: tuple[int, int, int], make: Maker) -> dict[str, Timed]:
    n, c, s = size
    tensors = (make(n, c, s, s), make(n, c, s, s), make(9 * c, c), make(c, 1, 3, 3))
    steps = _backends(partial(dconv_layer, *tensors, padding=(1, 1)), tensors)
    return steps | {"conv3": _convolution(make, tensors[0], 3)}


def _pafu(size: tuple[int, int, int], train: bool, make: Maker) -> dict[str, Timed]:
    n, c, s = size
    x, kernel, further = make(n, c, s, s), make(c, c, 3, 3), make(7, c, c, 3, 3)
    index = torch.randint(0, 8, (n, s, s), device=x.device)
    soft = make(n, 8, s, s) if train else None
    inputs = (x, kernel, further) if soft is None else (x, kernel, further, soft)
    steps = _backends(partial(pafu_conv, x, kernel, further, index, soft, padding=(1, 1)), inputs, False)
    return steps | {"conv3": _convolution(make, x, 3)}


def measure(case: GpuCase, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, dict[str, float | str]]:
    """Per step: milliseconds of forward and of both directions, peak bytes of one training step, or the error it ended with."""
    make = maker(device, dtype)
    found: dict[str, dict[str, float | str]] = {}
    for name in case.build(make):
        try:
            found[name] = _measure_step(partial(_step, case, make, name), device, repeats)
        except torch.OutOfMemoryError:
            found[name] = {"error": "out of memory"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _step(case: GpuCase, make: Maker, name: str) -> Timed:
    return case.build(make)[name]


def _measure_step(build: Callable[[], Timed], device: torch.device, repeats: int) -> dict[str, float | str]:
    first = build()
    size = sum(t.nbytes for t in first.inputs)
    copies = [first, *(build() for _ in range(min(COLD_BYTES // size, 7) if device.type == "cuda" else 0))]
    forward, way = median_ms([partial(_without_grad, step) for step in copies], device, repeats, first.capturable)
    both, _ = median_ms([partial(_with_grad, step) for step in copies], device, repeats, first.capturable)
    return {
        "forward_ms": forward,
        "both_ms": both,
        "timed": way,
        "peak_bytes": _peak(partial(_with_grad, first), device),
    }


def _without_grad(step: Timed) -> Tensor:
    with torch.no_grad():
        return step.forward()


def _with_grad(step: Timed) -> tuple[Tensor, ...]:
    y = step.forward()
    return torch.autograd.grad(y, [t for t in step.inputs if t.requires_grad], torch.ones_like(y))


def _peak(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that a run needs beyond what is there."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def median_ms(
    runs: list[Callable[[], object]], device: torch.device, repeats: int, capturable: bool
) -> tuple[float, str]:
    """Median milliseconds of one run, and how it was timed: "graph", "eager", or "cpu" without a GPU."""
    for run in runs:
        run()  # compiles, tunes and allocates
    if device.type != "cuda":
        return _median(lambda: [run() for run in runs], repeats, time.perf_counter, 1e3 / len(runs)), "cpu"
    torch.cuda.synchronize()
    if not capturable:
        return _events(lambda: [run() for run in runs], repeats) / len(runs), "eager"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    return _events(graph.replay, repeats) / len(runs), "graph"


def _median(run: Callable[[], object], repeats: int, clock: Callable[[], float], scale: float) -> float:
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append((clock() - start) * scale)
    return statistics.median(times)


def _events(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


# case, measure, a, b, sign, must, aim, shapes: TARGETS for an H200, bf16
TARGETS = (
    ("acda l=7", "forward_ms", "unfold", "triton", ">=", 7, 12, "ABCD"),
    ("acda l=7", "both_ms", "unfold", "triton", ">=", 4, 6, "ABCD"),
    ("acda l=7", "forward_ms", "triton", "conv7", "<=", 0.7, 0.4, "C"),
    ("dconv apply", "forward_ms", "unfold", "triton", ">=", 3, 3.3, "ABCD"),
    ("pafu eval n=8", "forward_ms", "triton", "conv3", "<=", 1.8, 1.4, "ABCD"),
)


def compare(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The targets that the bf16 rows have numbers for, with the ratio and whether it is met."""
    found: list[dict[str, object]] = []
    for name, measure_of, a, b, sign, must, aim, shapes in TARGETS:
        for row in rows:
            if row["case"] != name or row["shape"] not in shapes or row["dtype"] != "bfloat16":
                continue
            steps = row["steps"]
            assert isinstance(steps, dict)
            over, under = (steps.get(step, {}).get(measure_of) for step in (a, b))
            if over is None or under is None:
                continue
            ratio = over / under
            met = ratio >= must if sign == ">=" else ratio <= must
            what = f"{name} {row['shape']}: {measure_of.removesuffix('_ms')}, {a} / {b}"
            found.append({"what": what, "ratio": ratio, "must": f"{sign} {must}", "aim": f"{sign} {aim}", "met": met})
    return found
