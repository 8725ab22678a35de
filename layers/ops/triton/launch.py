"""Shared code of all Triton kernels: tuning, launching, precision of products, and geometry.

Every kernel runs on one axis of programs. None uses atomics: shared sums go through partial sums, so results do not
depend on the order of execution. Only the block size picked by tuning may differ between runs, and with it the order of
a sum; under `torch.use_deterministic_algorithms` the first configuration runs, and nothing is tuned.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from surgeon.layers.ops.triton.support import INTERPRETED


class Geometry(NamedTuple):
    """Window of a convolution: along either axis, tap t reads at pixel·stride + t·dilation - pad."""

    height: int
    width: int
    out_height: int
    out_width: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int

    @classmethod
    def of(
        cls,
        x: Tensor,
        out_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> "Geometry":
        height, width = x.shape[-2:]
        (out_height, out_width), (s_h, s_w), (p_h, p_w), (d_h, d_w) = out_size, stride, padding, dilation
        return cls(height, width, out_height, out_width, s_h, s_w, p_h, p_w, d_h, d_w)


def config(warps: int = 4, stages: int = 2, **blocks: int) -> Any:
    """One configuration: sizes of blocks, warps and stages."""
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


class Tuned(NamedTuple):
    """A kernel with its few configurations, tuned once for every combination of the key arguments."""

    half: Any
    single: Any

    def of(self, dtype: torch.dtype) -> Any:
        """Triton's autotuner for tensors of this dtype: `configs`, and the kernel `fn`."""
        return self.single if dtype == torch.float32 else self.half


def tuned(configs: list[Any], key: Sequence[str], single: list[Any] | None = None) -> Callable[[Any], Tuned]:
    """Decorator over `triton.jit`; `single` are the configurations for float32, whose exact products need many registers."""

    def decorate(kernel: Any) -> Tuned:
        return Tuned(
            triton.autotune(configs=configs, key=list(key))(kernel),
            triton.autotune(configs=single or configs, key=list(key))(kernel),
        )

    return decorate


def launch(
    kernel: Tuned, programs: Callable[[Mapping[str, int]], int], *args: Any, tune: bool = True, **constants: Any
) -> None:
    """Run a tuned kernel; `programs` maps the block sizes to the number of programs.

    Tuning runs a kernel many times: `tune` must be False if the kernel adds to existing values.
    """
    where = next(a for a in args if isinstance(a, Tensor))
    tuner = kernel.of(where.dtype)

    def grid(meta: Mapping[str, int]) -> tuple[int]:
        return (programs(meta),)

    with torch.cuda.device(where.device) if where.is_cuda else nullcontext():
        if not tune or _is_fixed(where):
            first = tuner.configs[0]
            tuner.fn[grid](*args, **constants, **first.all_kwargs(), enable_fp_fusion=True)
        else:
            tuner[grid](*args, **constants, enable_fp_fusion=True)


def _is_fixed(where: Tensor) -> bool:
    """Whether tuning is off: results must not depend on it, or nothing can be timed."""
    return (
        INTERPRETED
        or torch.are_deterministic_algorithms_enabled()
        or (where.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def precision(dtype: torch.dtype) -> str:
    """Precision of `product`: TF32 for float32 only if torch allows it for matrix products."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return "widened"
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a · b, summed in float32. The interpreter treats bfloat16 as integers here, so it gets float32 instead."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


def blocks(total: int, size: int) -> int:
    """Number of blocks of this size that cover the total."""
    return -(-total // size)


def power_of_two(size: int, *, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two not below `size`, between `least` and `most`."""
    return min(max(1 << max(size - 1, 0).bit_length(), least), most)
