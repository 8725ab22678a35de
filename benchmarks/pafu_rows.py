"""The rows of the operator benchmark that belong to PAFU: eval against one convolution, a training step against dense selection.

`eval_steps` and `train_steps` give what is compared, "ours" first, each with the tensors it starts from; `rows()` measures them and
yields dictionaries; run as a program it prints them. Times are process CPU time on one thread, medians of interleaved
repetitions in one run, in milliseconds. `ratio` is ours / other for eval and other / ours for training.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.layers.kernels.pafu import pafu_conv

SHAPES = {"A": (8, 64, 56), "B": (8, 128, 28), "C": (8, 256, 14), "D": (4, 32, 128)}
GROUP_SIZES = (4, 8, 16)
MOST_OF_A_CONVOLUTION = {"A": 2.6, "B": 1.8, "C": 1.7}
LEAST_SPEED_UP = {8: 1.35, 16: 1.6}

Step = tuple[Callable[[], Tensor], tuple[Tensor, ...]]


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


def eval_steps(shape: str, n: int) -> dict[str, Step]:
    """The selected kernels, drawn evenly at random (the worst case), against one plain 3×3 convolution."""
    case = _case(shape, n)
    x, kernel, further, index = case
    return {
        "ours": (lambda: pafu_conv(*case, padding=(1, 1)), (x, kernel, further, index)),
        "conv3": (lambda: F.conv2d(x, kernel, padding=1), (x, kernel)),
    }


def train_steps(shape: str, n: int) -> dict[str, Step]:
    """Selection with the straight-through gradient of every kernel's score, against two dense ways to the same gradients."""
    case = _case(shape, n)
    x, kernel, further, index = case
    soft = torch.randn(index.shape[0], n, *index.shape[1:]).softmax(1).requires_grad_()
    kernels = torch.cat([kernel[None], further]).detach().flatten(0, 1).requires_grad_()

    def one_hot() -> Tensor:
        return F.one_hot(index, n).movedim(-1, 1).float() + soft - soft.detach()

    def stacked() -> Tensor:
        y = F.conv2d(x, kernels, padding=1).unflatten(1, (n, -1))
        return (y * one_hot()[:, :, None]).sum(1)

    def one_by_one() -> Tensor:
        z = one_hot()
        parts = [F.conv2d(x, k, padding=1) * z[:, i : i + 1] for i, k in enumerate(kernels.chunk(n))]
        return sum(parts[1:], parts[0])

    return {
        "ours": (lambda: pafu_conv(*case, soft, padding=(1, 1)), (x, kernel, further, index, soft)),
        "dense stacked": (stacked, (x, kernels, soft)),
        "dense one by one": (one_by_one, (x, kernels, soft)),
    }


def _case(shape: str, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, channels, size = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(images, channels, size, size, requires_grad=True)
    kernel = (torch.randn(channels, channels, 3, 3) * 0.05).requires_grad_()
    further = (torch.randn(n - 1, channels, 3, 3, channels) * 0.05).movedim(-1, 2).requires_grad_()
    return x, kernel, further, torch.randint(0, n, (images, size, size))


def eval_row(shape: str, n: int, repeats: int) -> dict[str, Any]:
    """Forward only."""
    with torch.no_grad():
        ms = interleaved_ms({name: run for name, (run, _) in eval_steps(shape, n).items()}, repeats)
    return _row("eval", shape, n, ms, ms["ours"] / ms["conv3"], MOST_OF_A_CONVOLUTION.get(shape))


def train_row(shape: str, n: int, repeats: int) -> dict[str, Any]:
    """Forward and backward, and the bytes that are kept in between beyond the inputs."""
    steps = train_steps(shape, n)
    grad = torch.randn(SHAPES[shape][0], SHAPES[shape][1], *(SHAPES[shape][2],) * 2)
    runs = {name: lambda run=run: run().backward(grad) for name, (run, _) in steps.items()}
    ms = interleaved_ms(runs, repeats)
    row = _row(
        "train", shape, n, ms, min(ms[name] for name in ms if name != "ours") / ms["ours"], LEAST_SPEED_UP.get(n)
    )
    return row | {"saved_bytes_beyond_inputs": _saved_beyond(*steps["ours"])}


def _saved_beyond(run: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> int:
    known = {t.untyped_storage().data_ptr() for t in inputs}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(nbytes for pointer, nbytes in saved.items() if pointer not in known)


def _row(what: str, name: str, n: int, ms: dict[str, float], ratio: float, must: float | None) -> dict[str, Any]:
    images, channels, size = SHAPES[name]
    met = None if must is None else (ratio <= must if what == "eval" else ratio >= must)
    case = f"{name} {images}x{channels}x{size}x{size}"
    return {
        "operator": "pafu_conv",
        "what": what,
        "case": case,
        "n": n,
        "ms": ms,
        "ratio": ratio,
        "must": must,
        "met": met,
    }


def rows(repeats: int = 9) -> Iterator[dict[str, Any]]:
    """Every row; sets torch to one thread."""
    torch.set_num_threads(1)
    for name in SHAPES:
        for n in GROUP_SIZES:
            yield eval_row(name, n, repeats)
    for name in SHAPES:
        for n in GROUP_SIZES:
            yield train_row(name, n, max(repeats // 3, 1))


def main() -> None:
    for row in rows():
        times = ", ".join(f"{name} {value:.1f}" for name, value in row["ms"].items())
        must = "" if row["must"] is None else f"  must {row['must']}: {'met' if row['met'] else 'MISSED'}"
        print(
            f"{row['what']:5}  {row['case']:16}  n={row['n']:<2}  ratio {row['ratio']:.2f}  ({times} ms){must}",
            flush=True,
        )


if __name__ == "__main__":
    main()
