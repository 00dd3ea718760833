"""PyTorch's CUDA caching allocator, in numbers only: what allocations reserve, and where they no longer fit.

After `c10/cuda/CUDACachingAllocator.cpp` and `c10/core/AllocatorConfig.h` of PyTorch 2.9 to 2.13; the names of its
functions stand beside what follows them. One stream, no CUDA graphs, no memory pools of the user's;
`garbage_collection_threshold`, which gives memory back earlier, is left out.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from ftune.memory.allocator_settings import UNLIMITED, Settings

_BLOCK = 512
"""Every request is rounded up to this (kMinBlockSize)."""
_SMALL = 1024 * 1024
"""Largest request served from the small pool (kSmallSize)."""
_SMALL_SEGMENT = 2 * _SMALL
"""What the small pool asks of CUDA at a time (kSmallBuffer)."""
_LARGE_FROM = 10 * _SMALL
"""From here on a request gets a segment of its own size (kMinLargeAlloc)."""
_ROUND_LARGE = 2 * _SMALL
"""Such a segment is rounded up to this (kRoundLarge)."""
_ADDRESSES = 1 << 50
"""Addresses of an expandable segment; really 9/8 of the GPU's memory, which one segment does not run out of."""


class OutOfMemory(Exception):  # noqa: N818 (torch.OutOfMemoryError's name)
    """No room for a request, even after all cached segments were given back."""


class Block:
    """A stretch of memory inside a segment, in use or free; neighbours are linked."""

    __slots__ = ("address", "after", "before", "expandable", "in_use", "mapped", "pool", "size")

    def __init__(self, pool: _Pool, address: int, size: int, expandable: bool = False, mapped: bool = True) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.before: Block | None = None
        self.after: Block | None = None
        self.in_use = False
        self.mapped = mapped
        self.expandable = expandable


class _Pool:
    """The free blocks of one pool: by size, then address (BlockComparatorSize); those without memory by address."""

    def __init__(self, small: bool, page: int) -> None:
        self.small = small
        self.page = page
        self.free: list[tuple[int, int]] = []
        self.blocks: dict[int, Block] = {}
        self.unmapped: list[int] = []
        self.unmapped_blocks: dict[int, Block] = {}

    def insert(self, block: Block) -> None:
        if block.mapped:
            insort(self.free, (block.size, block.address))
            self.blocks[block.address] = block
        else:
            insort(self.unmapped, block.address)
            self.unmapped_blocks[block.address] = block

    def remove(self, block: Block) -> None:
        if block.mapped:
            del self.free[bisect_left(self.free, (block.size, block.address))]
            del self.blocks[block.address]
        else:
            del self.unmapped[bisect_left(self.unmapped, block.address)]
            del self.unmapped_blocks[block.address]


class CachingAllocator:
    """Takes and frees blocks as the real one does.

    `capacity_bytes` is what the device has for it. `allowed_bytes` is what `torch.cuda.set_per_process_memory_fraction`
    leaves, which is compared with the size of a segment even where pages would do.
    """

    def __init__(
        self, settings: Settings | None = None, capacity_bytes: int | None = None, allowed_bytes: int | None = None
    ) -> None:
        self.settings = settings or Settings()
        self.capacity = UNLIMITED if capacity_bytes is None else capacity_bytes
        self.allowed = UNLIMITED if allowed_bytes is None else allowed_bytes
        self.allocated = self.peak_allocated = 0
        self.reserved = self.peak_reserved = 0
        self.retries = 0
        self._small = _Pool(True, _SMALL_SEGMENT)
        self._large = _Pool(False, self.settings.large_segment_bytes)
        self._next_address = 0

    def allocate(self, requested: int) -> Block:
        """Return a block for a request in bytes (DeviceCachingAllocator::malloc)."""
        size = self._rounded(requested)
        pool = self._small if size <= _SMALL else self._large
        block = self._fitting(pool, size) or self._new(pool, size)
        if block is None and self._give_back_oversize(pool, size):
            block = self._new(pool, size)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._new(pool, size)
        if block is None:
            raise OutOfMemory(f"no room for {requested} bytes")
        rest = block.size - size
        if rest and self._splits(pool, size, rest):
            remaining = Block(pool, block.address + size, rest, block.expandable)
            link(remaining, block, block.after)
            block.size = size
            pool.insert(remaining)
        block.in_use = True
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def free(self, block: Block) -> None:
        """Take a block back and join it with free neighbours (free_block, try_merge_blocks)."""
        block.in_use = False
        self.allocated -= block.size
        pool = block.pool
        self._join(pool, block)
        pool.insert(block)

    def empty_cache(self) -> None:
        """Give back every segment, and every page, that is not in use (release_cached_blocks)."""
        for pool in (self._large, self._small):
            for block in [pool.blocks[address] for _, address in pool.free]:
                if block.expandable:
                    self._unmap(pool, block)
                elif block.before is None and block.after is None:
                    self._give_back(pool, block)

    def _rounded(self, requested: int) -> int:
        """Return the size of the block for a request (round_size, roundup_power2_next_division)."""
        if requested < _BLOCK:
            return _BLOCK
        power = requested.bit_length() - 1
        divisions = self.settings.power2_divisions[min(max(power - 20, 0), 15)]
        if divisions > 1 and requested > _BLOCK * divisions:
            step = (1 << power) // divisions
            return -(-requested // step) * step
        return -(-requested // _BLOCK) * _BLOCK

    def _segment_size(self, size: int) -> int:
        """Return what CUDA is asked for (get_allocation_size)."""
        if size <= _SMALL:
            return _SMALL_SEGMENT
        if size < _LARGE_FROM:
            return self.settings.large_segment_bytes
        return -(-size // _ROUND_LARGE) * _ROUND_LARGE

    def _splits(self, pool: _Pool, size: int, rest: int) -> bool:
        if pool.small or self.settings.expandable_segments:
            return rest >= _BLOCK
        return size < self.settings.max_split_bytes and rest > _SMALL

    def _fitting(self, pool: _Pool, size: int) -> Block | None:
        """Take the smallest free block that is large enough (get_free_block)."""
        free = pool.free
        place = bisect_left(free, (size, 0))
        if place == len(free):
            return None
        if self.settings.expandable_segments:
            # A block that can grow counts with what it can grow to, so that a hole is filled before the end is used.
            room = _room(pool.blocks[free[place][1]])
            while place + 1 < len(free) and (more := _room(pool.blocks[free[place + 1][1]])) < room:
                place, room = place + 1, more
        found, limit = free[place][0], self.settings.max_split_bytes
        if size < limit <= found or (size >= limit and found >= size + self.settings.max_rounding_bytes):
            return None
        return pool.blocks.pop(free.pop(place)[1])

    def _new(self, pool: _Pool, size: int) -> Block | None:
        """Ask CUDA for a segment, or for pages; None where there is no room (alloc_block)."""
        asked = self._segment_size(size)
        if self.reserved + asked > self.allowed:
            return None
        if self.settings.expandable_segments:
            return self._grown(pool, size)
        if self.reserved + asked > self.capacity:
            return None
        self._reserve(asked)
        return Block(pool, self._addresses(asked), asked)

    def _addresses(self, size: int) -> int:
        """Return where a new segment lies; of equal free blocks the one at the lowest address is taken."""
        address = self._next_address
        self._next_address += size
        return address

    def _reserve(self, size: int) -> None:
        self.reserved += size
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved

    def _give_back(self, pool: _Pool, block: Block) -> None:
        pool.remove(block)
        self.reserved -= block.size

    def _give_back_oversize(self, pool: _Pool, size: int) -> bool:
        """Give back blocks too large to be split, enough for the request (release_available_cached_blocks)."""
        limit = self.settings.max_split_bytes
        if limit == UNLIMITED or self.settings.expandable_segments:
            return False
        wanted = max(size, limit)
        place = bisect_left(pool.free, (wanted, 0))
        if place < len(pool.free):
            self._give_back(pool, pool.blocks[pool.free[place][1]])
            return True
        released = 0
        while released < wanted and pool.free and pool.free[-1][0] >= limit:
            released += pool.free[-1][0]
            self._give_back(pool, pool.blocks[pool.free[-1][1]])
        return released >= wanted

    def _join(self, pool: _Pool, block: Block) -> None:
        for other in (block.before, block.after):
            if other is None or other.in_use or other.mapped != block.mapped:
                continue
            pool.remove(other)
            if other is block.before:
                block.address = other.address
                block.before = other.before
                if block.before:
                    block.before.after = block
            else:
                block.after = other.after
                if block.after:
                    block.after.before = block
            block.size += other.size

    # Expandable segments

    def _grown(self, pool: _Pool, size: int) -> Block | None:
        """Map pages after the first free stretch of addresses that is long enough (try_allocate_expandable_block)."""
        block = self._stretch(pool, size)
        if not block.mapped and not self._map(pool, block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.after
            assert following is not None, "a stretch is followed until it is long enough"
            if not self._map(pool, following, min(size - block.size, following.size)):
                return None
            block = following
        pool.remove(block)
        return block

    def _stretch(self, pool: _Pool, size: int) -> Block:
        """Return where it begins: at an unmapped block or the free one before it (find_expandable_block)."""
        for address in pool.unmapped:
            block = pool.unmapped_blocks[address]
            if block.before is not None and not block.before.in_use:
                block = block.before
            room, part = 0, block
            while room < size and part is not None and not part.in_use:
                room += part.size
                part = part.after  # type: ignore[assignment]
            if room >= size:
                return block
        start = -(-self._addresses(_ADDRESSES + pool.page) // pool.page) * pool.page  # pages count from the start
        segment = Block(pool, start, _ADDRESSES, expandable=True, mapped=False)
        pool.insert(segment)
        return segment

    def _map(self, pool: _Pool, block: Block, size: int) -> bool:
        """Put memory behind the beginning of an unmapped block, in whole pages (map_block)."""
        mapped = -(-size // pool.page) * pool.page
        if self.reserved + mapped > self.capacity:
            return False
        pool.remove(block)
        if mapped < block.size:
            rest = Block(pool, block.address + mapped, block.size - mapped, expandable=True, mapped=False)
            link(rest, block, block.after)
            pool.insert(rest)
            block.size = mapped
        block.mapped = True
        self._join(pool, block)
        pool.insert(block)
        self._reserve(mapped)
        return True

    def _unmap(self, pool: _Pool, block: Block) -> None:
        """Take the memory from the whole pages inside a free block (unmap_block)."""
        first = -(-block.address // pool.page) * pool.page
        last = (block.address + block.size) // pool.page * pool.page
        if first >= last:
            return
        pool.remove(block)
        end = block.address + block.size
        if first > block.address:
            link(head := Block(pool, block.address, first - block.address, expandable=True), block.before, block)
            pool.insert(head)
        if end > last:
            link(tail := Block(pool, last, end - last, expandable=True), block, block.after)
            pool.insert(tail)
        block.address, block.size, block.mapped = first, last - first, False
        self._join(pool, block)
        pool.insert(block)
        self.reserved -= last - first


def link(block: Block, before: Block | None, after: Block | None) -> None:
    block.before, block.after = before, after
    if before is not None:
        before.after = block
    if after is not None:
        after.before = block


def _room(block: Block) -> int:
    following = block.after
    return block.size + (following.size if following is not None and not following.mapped else 0)
