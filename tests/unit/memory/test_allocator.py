"""The simulated allocator against sequences worked out by hand, and what must hold of every sequence."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftune.memory.allocator import Block, CachingAllocator, OutOfMemory
from ftune.memory.allocator_settings import Settings
from ftune.memory.replay import least_capacity, replay

KIB, MIB = 1024, 1024 * 1024
EXPANDABLE = Settings(expandable_segments=True)


@dataclass
class Change:
    storage: int
    size_bytes: int


@pytest.mark.parametrize(
    ("requested", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        # What is left of a segment, 1 MiB and no more, stays with the block.
        (21 * MIB, 22 * MIB, 22 * MIB),
        (21 * MIB - 512, 21 * MIB - 512, 22 * MIB),
    ],
)
def test_one_request(requested: int, allocated: int, reserved: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(requested)
    assert (allocator.allocated, allocator.reserved) == (allocated, reserved)


def test_a_small_segment_is_filled_and_used_again() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(512 * KIB) for _ in range(4)]
    assert allocator.reserved == 2 * MIB
    for block in (blocks[1], blocks[2]):
        allocator.free(block)
    allocator.allocate(MIB)  # the two free halves are one block again
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)
    allocator.allocate(1)
    assert allocator.reserved == 4 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator()
    large, middle = allocator.allocate(64 * MIB), allocator.allocate(32 * MIB)
    allocator.free(large)
    allocator.free(middle)
    assert allocator.allocate(30 * MIB).address == middle.address
    assert allocator.allocate(30 * MIB).address == large.address
    assert allocator.reserved == 96 * MIB


def test_of_equal_blocks_the_first_is_taken() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(20 * MIB) for _ in range(3)]
    for block in reversed(blocks):
        allocator.free(block)
    assert allocator.allocate(20 * MIB).address == blocks[0].address


def test_cached_segments_are_given_back_when_there_is_no_room() -> None:
    allocator = CachingAllocator(capacity_bytes=40 * MIB)
    allocator.free(allocator.allocate(30 * MIB))
    allocator.allocate(34 * MIB)
    assert (allocator.reserved, allocator.peak_reserved, allocator.retries) == (34 * MIB, 34 * MIB, 1)
    with pytest.raises(OutOfMemory):
        allocator.allocate(10 * MIB)
    assert (allocator.allocated, allocator.retries) == (34 * MIB, 2)


def test_a_segment_of_which_a_part_is_used_is_not_given_back() -> None:
    allocator = CachingAllocator(capacity_bytes=40 * MIB)
    whole = allocator.allocate(40 * MIB)
    allocator.free(whole)
    allocator.allocate(2 * MIB)
    assert allocator.allocate(38 * MIB).address == 2 * MIB
    allocator = CachingAllocator(capacity_bytes=60 * MIB)
    allocator.free(allocator.allocate(40 * MIB))
    allocator.allocate(2 * MIB)
    with pytest.raises(OutOfMemory):
        allocator.allocate(39 * MIB)  # 58 MiB are unused, 38 of them at a stretch


def test_a_segment_of_which_the_end_is_used_is_not_given_back() -> None:
    allocator = CachingAllocator()
    first, second = allocator.allocate(8 * MIB), allocator.allocate(8 * MIB)
    allocator.free(first)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB
    allocator.free(second)
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_large_blocks_are_not_split_with_max_split_size() -> None:
    allocator = CachingAllocator(Settings.parse("max_split_size_mb:64"))
    allocator.free(allocator.allocate(100 * MIB))
    kept = allocator.allocate(90 * MIB)
    assert (allocator.allocated, allocator.reserved) == (100 * MIB, 100 * MIB)
    allocator.free(kept)
    allocator.allocate(70 * MIB)  # 30 MiB would be lost, more than max_non_split_rounding_mb
    assert allocator.reserved == 170 * MIB
    allocator.allocate(60 * MIB)  # smaller than the limit: what is larger is not touched
    assert allocator.reserved == 230 * MIB


def test_only_blocks_that_are_not_split_are_given_back_first() -> None:
    allocator = CachingAllocator(Settings.parse("max_split_size_mb:64"), capacity_bytes=300 * MIB)
    blocks = [allocator.allocate(size * MIB) for size in (100, 80, 30)]
    for block in blocks:
        allocator.free(block)
    allocator.allocate(150 * MIB)  # 100 and 80 together make room
    assert (allocator.reserved, allocator.retries) == (180 * MIB, 0)


def test_expandable_segments_grow_by_pages() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    first = allocator.allocate(30 * MIB)
    assert allocator.reserved == 40 * MIB
    second = allocator.allocate(31 * MIB)  # 10 MiB are mapped behind the first, and two pages follow
    assert (second.address, allocator.reserved) == (30 * MIB, 80 * MIB)
    allocator.free(first)
    allocator.allocate(20 * MIB)
    assert allocator.allocate(19 * MIB).address == 61 * MIB
    small = [allocator.allocate(MIB) for _ in range(3)]
    assert allocator.reserved == 84 * MIB
    assert small[2].address - small[0].address == 2 * MIB


def test_pages_that_are_not_used_are_given_back() -> None:
    allocator = CachingAllocator(EXPANDABLE, capacity_bytes=100 * MIB)
    blocks = [allocator.allocate(30 * MIB) for _ in range(3)]
    assert allocator.reserved == 100 * MIB
    allocator.free(blocks[1])  # 30 to 60 MiB, of which 40 to 60 are a page
    allocator.empty_cache()
    assert allocator.reserved == 80 * MIB
    allocator.allocate(29 * MIB)
    assert (allocator.reserved, allocator.allocated) == (100 * MIB, 89 * MIB)


def test_a_hole_is_filled_by_what_fits_into_it() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    blocks = [allocator.allocate(20 * MIB) for _ in range(3)]
    allocator.free(blocks[1])
    allocator.empty_cache()
    assert allocator.reserved == 40 * MIB
    assert allocator.allocate(30 * MIB).address == blocks[2].address + 20 * MIB
    assert allocator.allocate(15 * MIB).address == blocks[0].address + 20 * MIB
    assert allocator.reserved == 100 * MIB


def test_the_end_that_can_grow_is_taken_last() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    first = allocator.allocate(10 * MIB)
    allocator.allocate(5 * MIB)  # 5 MiB of the page are left behind it
    allocator.free(first)
    assert allocator.allocate(4 * MIB).address == first.address


@pytest.mark.parametrize(
    ("text", "requested", "allocated"),
    [
        ("roundup_power2_divisions:4", 1200, 1536),  # too small to be divided
        ("roundup_power2_divisions:4", 5 * MIB + 1, 6 * MIB),
        ("roundup_power2_divisions:4", 4 * MIB, 4 * MIB),
        ("roundup_power2_divisions:[1:4,2:2,>:1]", 512 * KIB + 1, 640 * KIB),
        ("roundup_power2_divisions:[1:4,2:2,>:1]", 2 * MIB + 1, 3 * MIB),
        ("roundup_power2_divisions:[1:4,2:2,>:1]", 4 * MIB + 1, 4 * MIB + 512),
        ("roundup_power2_divisions:[1:4,4:8]", 2 * MIB + 1, 2 * MIB + 512),
        (" expandable_segments : True , max_split_size_mb:40", 1, 512),
    ],
)
def test_rounding(text: str, requested: int, allocated: int) -> None:
    allocator = CachingAllocator(Settings.parse(text))
    allocator.allocate(requested)
    assert allocator.allocated == allocated


def test_settings_of_the_environment() -> None:
    assert Settings.parse("") == Settings.of({}) == Settings()
    assert Settings.of({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}) == EXPANDABLE
    both = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    assert Settings.of(both) == EXPANDABLE
    assert Settings.parse("expandable_segments:False,garbage_collection_threshold:0.8") == Settings()
    given = Settings.parse("expandable_segments:True,max_split_size_mb:40,max_non_split_rounding_mb:30")
    assert given == Settings(True, 40 * MIB, 30 * MIB)
    assert Settings.parse("large_segment_size_mb:16").large_segment_bytes == 16 * MIB
    # The cases of PyTorch's own test, c10/test/core/AllocatorConfig_test.cpp.
    divisions = Settings.parse("roundup_power2_divisions:[128:8,256:16,512:1,2048:8,>:2]").power2_divisions
    assert divisions == (*[8] * 8, 16, 1, 0, 8, *[2] * 4)


def test_a_replay_says_where_it_ends() -> None:
    events = [Change(0, 30 * MIB), Change(1, 30 * MIB), Change(0, -30 * MIB), Change(2, 20 * MIB), Change(1, -30 * MIB)]
    free = replay(events)
    assert (free.peak_allocated_bytes, free.peak_reserved_bytes, free.peak_at) == (60 * MIB, 60 * MIB, 1)
    assert free.full_at is None
    assert replay(events, capacity_bytes=58 * MIB).full_at == 1
    assert least_capacity(events) == 60 * MIB


@pytest.mark.parametrize("size_mib", range(32, 60, 2))
def test_the_least_capacity_is_less_than_what_is_reserved_without_a_limit(size_mib: int) -> None:
    events = [Change(0, 30 * MIB), Change(0, -30 * MIB), Change(1, size_mib * MIB), Change(2, 11 * MIB)]
    assert replay(events).peak_reserved_bytes == (30 + size_mib) * MIB
    assert least_capacity(events) == (12 + size_mib) * MIB


@pytest.mark.parametrize("pairs", range(8, 16))
def test_segments_that_are_half_used_count_in_full(pairs: int) -> None:
    half = 10 * MIB - 512
    events = [Change(number, half) for number in range(2 * pairs)]
    events += [Change(number, -half) for number in range(0, 2 * pairs, 2)]
    events += [Change(100, 60 * MIB), Change(100, -60 * MIB), Change(101, 10 * pairs * MIB)]
    assert replay(events).peak_reserved_bytes == (30 * pairs + 60) * MIB
    assert least_capacity(events) == 30 * pairs * MIB


sizes = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(MIB - 600, MIB + 600),
    st.integers(1, 12 * MIB),
    st.integers(10 * MIB - 600, 10 * MIB + 600),
    st.integers(MIB, 90 * MIB),
)
steps = st.lists(st.one_of(sizes, st.integers(-1000, -1)), max_size=120)
variants = st.sampled_from(
    [
        Settings(),
        EXPANDABLE,
        Settings.parse("max_split_size_mb:32"),
        Settings.parse("roundup_power2_divisions:8"),
        Settings.parse("expandable_segments:True,large_segment_size_mb:6"),
    ]
)


@settings(max_examples=150, deadline=None)
@given(steps, variants, st.one_of(st.none(), st.integers(40, 400)))
def test_every_sequence(steps: list[int], variant: Settings, capacity_mib: int | None) -> None:
    capacity = None if capacity_mib is None else capacity_mib * MIB
    allocator = CachingAllocator(variant, capacity)
    live: list[tuple[int, Block]] = []
    for step in steps:
        if step > 0:
            try:
                live.append((step, allocator.allocate(step)))
            except OutOfMemory:
                assert capacity is not None
        elif live:
            allocator.free(live.pop(step % len(live))[1])
        check(allocator, live, capacity)
    for _, block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.allocated == allocator.reserved == 0


def check(allocator: CachingAllocator, live: list[tuple[int, Block]], capacity: int | None) -> None:
    assert all(block.size >= requested for requested, block in live)
    assert sum(block.size for _, block in live) == allocator.allocated <= allocator.reserved
    assert capacity is None or allocator.peak_reserved <= capacity
    spans = sorted((block.address, block.address + block.size) for _, block in live)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    free = 0
    for pool in (allocator._small, allocator._large):
        assert sorted(pool.free) == pool.free
        assert {address for _, address in pool.free} == set(pool.blocks)
        for block in (*pool.blocks.values(), *pool.unmapped_blocks.values()):
            assert not block.in_use
            following = block.after
            if following is not None:
                assert following.before is block
                assert following.address == block.address + block.size
                assert following.in_use or following.mapped != block.mapped, "free neighbours are one block"
        free += sum(size for size, _ in pool.free)
    assert free + allocator.allocated == allocator.reserved


@settings(max_examples=40, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=60), variants)
def test_what_is_reserved_without_a_limit_is_enough(requests: list[int], variant: Settings) -> None:
    events = [Change(number, size) for number, size in enumerate(requests)]
    events += [Change(number, -requests[number]) for number in range(0, len(requests), 2)]
    unlimited = replay(events, variant)
    assert replay(events, variant, unlimited.peak_reserved_bytes).full_at is None
    least = least_capacity(events, variant)
    assert unlimited.peak_allocated_bytes <= least <= unlimited.peak_reserved_bytes
    assert replay(events, variant, least).full_at is None
    assert replay(events, variant, least - 2 * MIB).full_at is not None
