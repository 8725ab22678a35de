"""A model of PyTorch's CUDA caching allocator: the device memory reserved by a sequence of allocations.

Constants and policy of `c10/cuda/CUDACachingAllocator.cpp`, default settings: sizes are rounded to 512 bytes; requests up to
1 MiB are cut from 2 MiB segments, below 10 MiB from 20 MiB segments, larger ones get their own segment, rounded to 2 MiB; best
fit; freed neighbors merge; segments are kept.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

BLOCK = 512
SMALL_REQUEST = 2**20
SMALL_SEGMENT = 2 * 2**20
LARGE_SEGMENT = 20 * 2**20
OWN_SEGMENT = 10 * 2**20
SEGMENT_ROUND = 2 * 2**20


def round_block(nbytes: int) -> int:
    """Bytes occupied by a tensor of this size."""
    return -(-nbytes // BLOCK) * BLOCK


def segment_size(nbytes: int) -> int:
    """Bytes of the new segment created for a (rounded) request if no free block fits."""
    if nbytes <= SMALL_REQUEST:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if nbytes < OWN_SEGMENT else -(-nbytes // SEGMENT_ROUND) * SEGMENT_ROUND


@dataclass(eq=False)
class _Block:
    start: int  # address; segments are apart, so only blocks of one segment are adjacent
    size: int
    free: bool
    segment: list[int]  # [bytes, blocks in use], shared by the blocks of one segment
    before: "_Block | None" = None
    after: "_Block | None" = None


class CachingAllocator:
    """Replays allocations. Bytes: `allocated` by tensors, `reserved` in segments, `pinned` in segments that contain a tensor.

    Memory that is reserved but not pinned is released before an allocation fails; the device must have `peak_pinned`.
    """

    def __init__(self) -> None:
        self.allocated = 0
        self.reserved = 0
        self.pinned = 0
        self.peak_allocated = 0
        self.peak_pinned = 0
        # small, large: (size, address, block), sorted
        self._pools: tuple[list[tuple[int, int, _Block]], ...] = (
            [],
            [],
        )
        self._next_address = 0
        self._used: dict[int, tuple[_Block, int]] = {}

    def allocate(self, handle: int, nbytes: int) -> None:
        """Allocate for the tensor with this `handle`; zero `nbytes` allocate nothing."""
        size = round_block(nbytes)
        if size == 0:
            return
        pool_index = 0 if size <= SMALL_REQUEST else 1
        block = self._take(pool_index, size)
        remainder = block.size - size
        if remainder >= BLOCK if pool_index == 0 else remainder > SMALL_REQUEST:
            rest = _Block(block.start + size, remainder, True, block.segment, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._put(pool_index, rest)
        block.free = False
        self.pinned += 0 if block.segment[1] else block.segment[0]
        block.segment[1] += 1
        self._used[handle] = (block, pool_index)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_pinned = max(self.peak_pinned, self.pinned)

    def release(self, handle: int) -> None:
        """Free the memory of `handle`."""
        if handle not in self._used:
            return
        block, pool_index = self._used.pop(handle)
        self.allocated -= block.size
        block.free = True
        block.segment[1] -= 1
        self.pinned -= 0 if block.segment[1] else block.segment[0]
        before, after = block.before, block.after
        if before is not None and before.free:
            self._remove(pool_index, before)
            before.size += block.size
            before.after = after
            if after is not None:
                after.before = before
            block = before
        if after is not None and after.free:
            self._remove(pool_index, after)
            block.size += after.size
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        self._put(pool_index, block)

    def _take(self, pool_index: int, size: int) -> _Block:
        pool = self._pools[pool_index]
        at = bisect_left(pool, (size, -1))
        if at < len(pool):
            return pool.pop(at)[2]
        fresh = segment_size(size)
        self.reserved += fresh
        block = _Block(self._next_address, fresh, False, [fresh, 0])
        self._next_address += fresh + BLOCK
        return block

    def _put(self, pool_index: int, block: _Block) -> None:
        insort(self._pools[pool_index], (block.size, block.start, block))

    def _remove(self, pool_index: int, block: _Block) -> None:
        pool = self._pools[pool_index]
        del pool[bisect_left(pool, (block.size, block.start))]
