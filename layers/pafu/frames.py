"""Chunks of the kernel-selection operator, and the input region of each chunk.

Legend: N batch, B images of a chunk, C channels, H W input size, P Q output size, n kernels per group, O output channels,
k l kernel size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from surgeon.errors import GeometryError
from surgeon.layers.geometry import Pair

CHUNK_BYTES = 8 << 20  # input and output per chunk; measured, with all temporaries below 32 MB


class Window(NamedTuple):
    """Window of a (k, l) kernel sliding over the input."""

    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    @classmethod
    def of(
        cls, kernel: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
    ) -> "Window":
        """The window of a kernel (..., k, l)."""
        size, stride, padding, dilation = ((v[0], v[1]) for v in (kernel.shape[-2:], stride, padding, dilation))
        return cls(size, stride, padding, dilation, groups)

    def output_size(self, height: int, width: int) -> Pair:
        """(P, Q) for an input of this size."""
        rows, columns = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (height, width), self.size, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return rows, columns


@dataclass(frozen=True)
class FrameProblem:
    """The operator's arguments: x (N, C, H, W), kernel 0 (O, C/G, k, l), further kernels (n - 1, O, C/G, k, l), index (N, P, Q).

    `present` lists the kernels that are selected somewhere.
    """

    x: Tensor
    kernel: Tensor
    further: Tensor
    index: Tensor
    window: Window
    present: list[int]

    @classmethod
    def of(cls, x: Tensor, kernel: Tensor, further: Tensor, index: Tensor, window: Window) -> "FrameProblem":
        """Raises `GeometryError` if the index contains a kernel that does not exist."""
        if index.numel() and int(index.min()) < 0:
            raise GeometryError(
                f"pafu_conv: index {int(index.min())} is out of range, there are {1 + len(further)} kernels"
            )
        counts = torch.bincount(index.flatten(), minlength=1 + len(further)).tolist()
        if len(counts) > 1 + len(further):
            raise GeometryError(
                f"pafu_conv: index {len(counts) - 1} is out of range, there are {1 + len(further)} kernels"
            )
        return cls(x, kernel, further, index, window, [i for i, count in enumerate(counts) if count])

    @property
    def n(self) -> int:
        return 1 + len(self.further)

    @property
    def outputs(self) -> int:
        return self.kernel.shape[0]

    @property
    def is_depthwise(self) -> bool:
        return self.window.groups > 1 and self.kernel.shape[1] == 1

    @property
    def compute_dtype(self) -> torch.dtype:
        """CPUs emulate half precision; on CUDA its products accumulate in float32 and are fast."""
        return torch.float32 if self.x.dtype.itemsize < 4 and self.x.device.type == "cpu" else self.x.dtype

    @property
    def sum_dtype(self) -> torch.dtype:
        """Dtype of accumulators: at least float32."""
        return torch.float32 if self.x.dtype.itemsize < 4 else self.x.dtype

    def chunks(self, bytes_per_pixel: int, most: int | None = None) -> "Iterator[FrameChunk]":
        """Groups of whole images if they fit in `most` bytes (`CHUNK_BYTES`), otherwise groups of rows of one image."""
        most = CHUNK_BYTES if most is None else most
        images, rows, columns = self.index.shape
        row_bytes = max(columns * bytes_per_pixel, 1)
        many = max(most // (row_bytes * rows), 1)
        few_rows = rows if many > 1 else max(min(rows, most // row_bytes), 1)
        for first in range(0, images, many):
            for top in range(0, rows, few_rows):
                yield FrameChunk.of(
                    self, slice(first, min(first + many, images)), slice(top, min(top + few_rows, rows))
                )


class Grads(NamedTuple):
    """Gradient accumulators, initially zero; None if not needed.

    `kernels` are n of (O, k, l, C/G), channels last; `scores` (N, P, Q, n) are <g, K_i * x> at every pixel.
    """

    x: Tensor | None
    kernels: list[Tensor] | None
    scores: Tensor | None


class FrameChunk(NamedTuple):
    """Output rows `rows` of the images `images`, the part of a problem being processed, and its frame.

    The frame is the zero-padded input of these rows, (B, height, width, C): the part inside the input is its rows `inside` and
    columns `across`, placed at (`top`, `left`) of the frame.
    """

    images: slice
    rows: slice
    height: int
    width: int
    inside: slice
    across: slice
    top: int
    left: int

    @classmethod
    def of(cls, problem: FrameProblem, images: slice, rows: slice) -> "FrameChunk":
        window = problem.window
        (s_h, s_w), (p_h, p_w), (d_h, d_w), (k_h, k_w) = window.stride, window.padding, window.dilation, window.size
        in_h, in_w = problem.x.shape[-2:]
        height = (rows.stop - rows.start - 1) * s_h + d_h * (k_h - 1) + 1
        width = (problem.index.shape[-1] - 1) * s_w + d_w * (k_w - 1) + 1
        first = rows.start * s_h - p_h
        top = min(max(-first, 0), height)
        start = min(max(first, 0), in_h)
        stop = max(min(first + height, in_h), start)
        left = min(p_w, width)
        return cls(images, rows, height, width, slice(start, stop), slice(0, min(width - left, in_w)), top, left)

    def part(self, frame: Tensor) -> Tensor:
        """View of the part of a frame that is inside the input."""
        rows, columns = self.inside.stop - self.inside.start, self.across.stop
        return frame[:, self.top : self.top + rows, self.left : self.left + columns]

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The frame, channels last."""
        part = x[self.images, :, self.inside, self.across].movedim(1, -1)
        frame = x.new_zeros((part.shape[0], self.height, self.width, x.shape[1]), dtype=dtype)
        self.part(frame).copy_(part)
        return frame

    def add_to(self, grad: Tensor, frame: Tensor) -> None:
        """Inverse of `read` for gradients: add the part inside the input to grad (N, C, H, W)."""
        grad[self.images, :, self.inside, self.across].add_(self.part(frame).movedim(-1, 1))

    def outputs(self, y: Tensor) -> Tensor:
        """The view (B, rows, Q, O) of an output-shaped tensor (N, O, P, Q)."""
        return y[self.images, :, self.rows].movedim(1, -1)
