"""A map divided into chunks with small scratch tensors: a few images, or a few rows of one image, at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

SCRATCH_BYTES = 32 << 20  # fits the L2 cache of the target GPUs, and is small for any image size


@dataclass(frozen=True)
class Chunk:
    """Images n0:n1, rows i0:i1."""

    n0: int
    n1: int
    i0: int
    i1: int

    @property
    def images(self) -> slice:
        return slice(self.n0, self.n1)

    @property
    def rows(self) -> int:
        return self.i1 - self.i0

    def part(self, map_NCHW: Tensor) -> Tensor:
        """The chunk of a map (N, C, H, W)."""
        return map_NCHW[self.n0 : self.n1, :, self.i0 : self.i1]


def chunks(images: int, height: int, width: int, bytes_per_pixel: int) -> Iterator[Chunk]:
    """Chunks of a map of height x width pixels, with `bytes_per_pixel` of scratch per pixel."""
    rows = max(1, SCRATCH_BYTES // max(bytes_per_pixel * width, 1))
    many = max(1, rows // max(height, 1))
    rows = min(rows, height)
    for n0 in range(0, images, many):
        for i0 in range(0, height, rows) if width else ():
            yield Chunk(n0, min(n0 + many, images), i0, min(i0 + rows, height))


def are_cut(cut: list[Chunk], height: int) -> bool:
    """Whether single images are cut, so that chunks share rows of the input."""
    return any(chunk.rows < height for chunk in cut)
