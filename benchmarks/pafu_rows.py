"""The rows of the operator benchmark that belong to PAFU: eval against one convolution, a step against dense selection.

`rows()` yields them as dictionaries; run as a program it prints them. Times are process CPU time on one thread, medians of
interleaved repetitions in one run, in milliseconds. `ratio` is ours / other for eval and other / ours for a step.
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


def _case(shape: tuple[int, int, int], n: int) -> dict[str, Tensor]:
    images, channels, size = shape
    torch.manual_seed(0)
    return {
        "x": torch.randn(images, channels, size, size),
        "kernel": torch.randn(channels, channels, 3, 3) * 0.05,
        "further": (torch.randn(n - 1, channels, 3, 3, channels) * 0.05).movedim(-1, 2),
        "index": torch.randint(0, n, (images, size, size)),
    }


def eval_row(name: str, n: int, repeats: int) -> dict[str, Any]:
    """The selected kernels, drawn evenly at random (the worst case), against one plain 3×3 convolution."""
    case = _case(SHAPES[name], n)
    with torch.no_grad():
        ms = interleaved_ms(
            {
                "ours": lambda: pafu_conv(**case, padding=(1, 1)),
                "conv 3x3": lambda: F.conv2d(case["x"], case["kernel"], padding=1),
            },
            repeats,
        )
    return _row("eval", name, n, ms, ms["ours"] / ms["conv 3x3"], MOST_OF_A_CONVOLUTION.get(name))


def step_row(name: str, n: int, repeats: int) -> dict[str, Any]:
    """Forward and backward with the straight-through gradient of every kernel's score, against the better dense way."""
    case = _case(SHAPES[name], n)
    leaves = {key: value.requires_grad_() if value.is_floating_point() else value for key, value in case.items()}
    soft = torch.randn(case["index"].shape[0], n, *case["index"].shape[1:]).softmax(1).requires_grad_()
    stacked = torch.cat([case["kernel"][None], case["further"]]).detach().flatten(0, 1).requires_grad_()
    grad = torch.randn_like(case["x"])

    def one_hot() -> Tensor:
        return F.one_hot(case["index"], n).movedim(-1, 1).float() + soft - soft.detach()

    def dense_stacked() -> None:
        y = F.conv2d(case["x"], stacked, padding=1).unflatten(1, (n, -1))
        (y * one_hot()[:, :, None]).sum(1).backward(grad)

    def dense_one_by_one() -> None:
        z = one_hot()
        parts = [F.conv2d(case["x"], k, padding=1) * z[:, i : i + 1] for i, k in enumerate(stacked.chunk(n))]
        sum(parts[1:], parts[0]).backward(grad)

    def ours() -> None:
        pafu_conv(**leaves, soft=soft, padding=(1, 1)).backward(grad)

    runs = {"ours": ours, "dense stacked": dense_stacked, "dense one by one": dense_one_by_one}
    ms = interleaved_ms(runs, repeats)
    best = min(ms["dense stacked"], ms["dense one by one"])
    row = _row("step", name, n, ms, best / ms["ours"], LEAST_SPEED_UP.get(n))
    return row | {"saved_bytes_beyond_inputs": _saved_beyond(leaves | {"soft": soft})}


def _saved_beyond(inputs: dict[str, Tensor]) -> int:
    known = {t.untyped_storage().data_ptr() for t in inputs.values()}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pafu_conv(**inputs, padding=(1, 1))
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
            yield step_row(name, n, max(repeats // 3, 1))


def main() -> None:
    for row in rows():
        times = ", ".join(f"{name} {value:.1f}" for name, value in row["ms"].items())
        must = "" if row["must"] is None else f"  must {row['must']}: {'met' if row['met'] else 'MISSED'}"
        print(
            f"{row['what']:4}  {row['case']:16}  n={row['n']:<2}  ratio {row['ratio']:.2f}  ({times} ms){must}",
            flush=True,
        )


if __name__ == "__main__":
    main()
