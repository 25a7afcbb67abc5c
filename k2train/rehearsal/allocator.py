"""torch's caching allocator, replayed over a recorded step: how much it reserves for what the
program allocates.

Requests are rounded up to 512 bytes. A free block serves a request if it is of the same pool (small
or large, and one for each stream), best fit first; what is left of a block is split off where it is
worth it; neighbours that are free become one. A request that no block serves takes a new segment
from the driver: 2 MiB, 20 MiB, or its own size rounded up to 2 MiB. With expandable segments each
pool is one address range that grows in steps of 2 MiB (20 for large ones). A block that another
stream uses comes back only when that stream has passed it; the observer says when. Source: torch's
c10/cuda/CUDACachingAllocator.cpp, read as rules.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable

from k2train.rehearsal.observer import MemoryEvent

MIB = 2**20
_ROUNDING = 512
_SMALL = MIB
_SMALL_SEGMENT = 2 * MIB
_MEDIUM, _MEDIUM_SEGMENT = 10 * MIB, 20 * MIB
_SEGMENT_ROUNDING = 2 * MIB


@dataclasses.dataclass(frozen=True)
class Reserved:
    """Peaks of one replay, in bytes."""

    allocated: int
    reserved: int


class _Block:
    """A stretch of a segment; `previous` and `next` are its neighbours there."""

    __slots__ = ("address", "free", "next", "pool", "previous", "size")

    def __init__(self, address: int, size: int, pool: _Pool) -> None:
        self.address, self.size, self.pool, self.free = address, size, pool, False
        self.previous: _Block | None = None
        self.next: _Block | None = None


class _Pool:
    """Free blocks of one pool, smallest first, of equal ones the lowest address."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.last: _Block | None = None
        self._keys: list[tuple[int, int]] = []
        self._blocks: dict[tuple[int, int], _Block] = {}

    def put(self, block: _Block) -> None:
        key = (block.size, block.address)
        bisect.insort(self._keys, key)
        self._blocks[key] = block

    def remove(self, block: _Block) -> None:
        key = (block.size, block.address)
        del self._keys[bisect.bisect_left(self._keys, key)]
        del self._blocks[key]

    def best(self, size: int) -> _Block | None:
        """The smallest free block that is large enough, taken out."""
        index = bisect.bisect_left(self._keys, (size, 0))
        if index == len(self._keys):
            return None
        return self._blocks.pop(self._keys.pop(index))


class CachingAllocator:
    """One device's. expandable: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."""

    def __init__(self, expandable: bool) -> None:
        self.expandable = expandable
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._pools: dict[tuple[bool, str], _Pool] = {}
        self._live: dict[int, _Block] = {}
        self._address = 0

    def allocate(self, key: int, num_bytes: int, stream: str) -> None:
        size = -(-num_bytes // _ROUNDING) * _ROUNDING
        pool = self._pools.setdefault((size <= _SMALL, stream), _Pool(size <= _SMALL))
        block = pool.best(size) or self._grow(pool, size)
        self._split(block, size)
        block.free = False
        self._live[key] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, key: int) -> None:
        block = self._live.pop(key, None)
        if block is not None:
            self.allocated -= block.size
            self._give_back(block)

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """Memory from the driver: a segment of its own, or more of the pool's address range."""
        if not self.expandable:
            return self._segment(pool, _segment_bytes(size))
        last = pool.last
        unused = last.size if last is not None and last.free else 0
        step = _SMALL_SEGMENT if pool.small else _MEDIUM_SEGMENT
        more = -(-(size - unused) // step) * step
        grown = self._segment(pool, more)
        if last is not None:
            last.next, grown.previous, grown.address = grown, last, last.address + last.size
        pool.last = grown
        self._give_back(grown)
        found = pool.best(size)
        assert found is not None
        return found

    def _segment(self, pool: _Pool, num_bytes: int) -> _Block:
        block = _Block(self._address, num_bytes, pool)
        # Far enough apart that a pool's range can grow.
        self._address += num_bytes if not self.expandable else 2**45
        self.reserved += num_bytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        least = _ROUNDING if block.pool.small or self.expandable else _SMALL + 1
        if rest < least:
            return
        left = _Block(block.address + size, rest, block.pool)
        left.free = True
        left.previous, left.next = block, block.next
        if block.next is not None:
            block.next.previous = left
        block.next, block.size = left, size
        if block.pool.last is block:
            block.pool.last = left
        block.pool.put(left)

    def _give_back(self, block: _Block) -> None:
        before, after = block.previous, block.next
        block.free = True
        if before is not None and before.free:
            block.pool.remove(before)
            before.size += block.size
            before.next = after
            if after is not None:
                after.previous = before
            if block.pool.last is block:
                block.pool.last = before
            block = before
        if after is not None and after.free:
            block.pool.remove(after)
            block.size += after.size
            block.next = after.next
            if after.next is not None:
                after.next.previous = block
            if block.pool.last is after:
                block.pool.last = block
        block.pool.put(block)


def replay(events: Iterable[MemoryEvent], expandable: bool) -> Reserved:
    """Peaks of allocated and reserved bytes over a recorded program."""
    allocator = CachingAllocator(expandable)
    for serial, num_bytes, stream in events:
        if num_bytes:
            allocator.allocate(serial, num_bytes, stream)
        else:
            allocator.free(serial)
    return Reserved(allocator.peak_allocated, allocator.peak_reserved)


def _segment_bytes(size: int) -> int:
    if size <= _SMALL:
        return _SMALL_SEGMENT
    if size < _MEDIUM:
        return _MEDIUM_SEGMENT
    return -(-size // _SEGMENT_ROUNDING) * _SEGMENT_ROUNDING
