"""Memory of the stand-in's GPU: torch's caching allocator, and what others take beside it.

What it assumes of c10/cuda/CUDACachingAllocator.cpp (torch 2.13), by the names there:
- sizes are rounded up to kMinBlockSize (512 bytes);
- a request of up to kSmallSize (1 MiB) is cut from a segment of kSmallBuffer (2 MiB), one below kMinLargeAlloc (10 MiB)
  from one of kLargeBuffer (20 MiB), a larger one gets a segment of its own, rounded up to kRoundLarge (2 MiB);
- the smallest free block that fits is taken (best fit) from the pool of its kind, and split where the rest is at least
  kMinBlockSize in the small pool, more than kSmallSize in the large one; neighbours that are free are merged;
- a freed block stays in its segment; segments that are free as a whole are returned by empty_cache(), and before an
  allocation fails (release_cached_blocks);
Expandable segments are not modelled: they only lower what the cache keeps.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

import torch

MIB = 1 << 20


@dataclass(eq=False)
class Block:
    """A piece of a segment. used: by a tensor; the rest is cached."""

    segment: Segment
    start: int
    size: int
    used: bool = False


@dataclass(eq=False)
class Segment:
    size: int
    small: bool
    blocks: list[Block] = field(default_factory=list)


class Allocator:
    """total: bytes of the device. context: what the driver takes. unit: kMinBlockSize, from which all other sizes
    follow, so that a small device can stand for a large one."""

    def __init__(self, total: int, context: int = 0, unit: int = 512) -> None:
        self.total, self.context, self.unit = total, context, unit
        self.small_size, self.small_buffer = 2048 * unit, 4096 * unit
        self.least_large, self.large_buffer, self.round_large = 20480 * unit, 40960 * unit, 4096 * unit
        self._segments: list[Segment] = []
        # Taken by others than torch's allocator: vLLM's pools of CUDA's virtual memory.
        self.others: dict[str, int] = {}
        self.allocated = self.most_allocated = self.reserved = self.most_reserved = 0

    @property
    def in_use(self) -> int:
        """Bytes that nobody else can have."""
        return self.context + self.reserved + sum(self.others.values())

    @property
    def free(self) -> int:
        return self.total - self.in_use

    def take_beside(self, owner: str, size: int) -> None:
        """Memory that does not go through torch's allocator. OutOfMemoryError where it is not there."""
        if size > self.free + self.others.get(owner, 0):
            raise torch.OutOfMemoryError(f"{owner} asks for {size} bytes, {self.free} are free")
        self.others[owner] = size

    def allocate(self, size: int) -> Block:
        """A block of at least `size` bytes. OutOfMemoryError where there is none even without the cache."""
        size = -(-max(size, 1) // self.unit) * self.unit
        small = size <= self.small_size
        block = self._found(size, small)
        if block is None:
            segment = self._segment_size(size)
            if segment > self.free:
                self.empty_cache()
            if segment > self.free:
                raise torch.OutOfMemoryError(
                    f"tried to allocate {size} bytes: {self.free} of {self.total} are free, torch holds "
                    f"{self.allocated} and keeps {self.reserved - self.allocated}"
                )
            made = Segment(segment, small)
            block = Block(made, 0, segment)
            made.blocks = [block]
            self._segments.append(made)
            self.reserved += segment
            self.most_reserved = max(self.most_reserved, self.reserved)
        self._split(block, size)
        block.used = True
        self.allocated += block.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return block

    def release(self, block: Block) -> None:
        """A tensor's memory goes back into the cache."""
        block.used = False
        self.allocated -= block.size
        blocks = block.segment.blocks
        place = blocks.index(block)
        for neighbour in (place + 1, place - 1):
            if 0 <= neighbour < len(blocks) and not blocks[neighbour].used:
                other = blocks.pop(neighbour)
                block.start, block.size = min(block.start, other.start), block.size + other.size

    def empty_cache(self) -> None:
        kept = [s for s in self._segments if len(s.blocks) > 1 or s.blocks[0].used]
        self.reserved = sum(s.size for s in kept)
        self._segments = kept

    def reset_peak(self) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved

    def _segment_size(self, size: int) -> int:
        if size <= self.small_size:
            return self.small_buffer
        if size < self.least_large:
            return self.large_buffer
        return -(-size // self.round_large) * self.round_large

    def _found(self, size: int, small: bool) -> Block | None:
        free = [b for s in self._segments if s.small == small for b in s.blocks if not b.used and b.size >= size]
        return min(free, key=lambda b: b.size, default=None)

    def _split(self, block: Block, size: int) -> None:
        rest = block.size - size
        worth = rest >= self.unit if block.segment.small else rest > self.small_size
        if not worth:
            return
        blocks = block.segment.blocks
        insort(blocks, Block(block.segment, block.start + size, rest), key=lambda b: b.start)
        block.size = size
