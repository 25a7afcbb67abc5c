"""The replayed caching allocator, against what torch's own source says it does with the same
requests."""

from __future__ import annotations

import pytest

from k2train.rehearsal.allocator import MIB, CachingAllocator, replay
from k2train.rehearsal.observer import MemoryEvent


def made(serial: int, num_bytes: int, stream: str = "main") -> MemoryEvent:
    return MemoryEvent(serial, num_bytes, stream)


def gone(serial: int) -> MemoryEvent:
    return MemoryEvent(serial, 0, "")


@pytest.mark.parametrize(
    ("num_bytes", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (31 * MIB, 32 * MIB),
    ],
)
def test_a_first_request_takes_a_segment_of_the_drivers_sizes(num_bytes: int, segment: int) -> None:
    assert replay([made(0, num_bytes)], expandable=False).reserved == segment


def test_a_request_is_rounded_up_to_512_bytes() -> None:
    assert replay([made(0, 1), made(1, 513)], expandable=False).allocated == 512 + 1024


def test_what_is_left_of_a_segment_serves_the_next_request() -> None:
    events = [made(0, 12 * MIB), made(1, 4 * MIB), made(2, 4 * MIB), made(3, 4 * MIB)]
    # 12 MiB are a segment of their own, the other three share one of 20.
    assert replay(events, expandable=False).reserved == 32 * MIB


def test_neighbours_that_are_free_become_one_block() -> None:
    events = [made(n, 6 * MIB) for n in range(3)] + [gone(0), gone(1), made(3, 12 * MIB)]
    assert replay(events, expandable=False).reserved == 20 * MIB


def test_a_hole_that_is_too_small_takes_new_memory_unless_segments_expand() -> None:
    large = [made(n, 30 * MIB) for n in range(4)]
    holes = [gone(0), gone(2), made(4, 50 * MIB)]
    assert replay(large + holes, expandable=False).reserved == (4 * 30 + 50) * MIB
    # One range of 120 MiB, whose last block is in use: it grows by 50, rounded up to 60.
    assert replay(large + holes, expandable=True).reserved == (120 + 60) * MIB


def test_an_expandable_range_grows_only_by_what_its_free_end_lacks() -> None:
    events = [made(0, 40 * MIB), made(1, 40 * MIB), gone(1), made(2, 60 * MIB)]
    assert replay(events, expandable=True).reserved == 100 * MIB


def test_streams_have_pools_of_their_own() -> None:
    events = [made(0, 12 * MIB), gone(0), made(1, 12 * MIB, "copies")]
    assert replay(events, expandable=False).reserved == 24 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_everything_given_back_is_one_free_block_for_each_segment_again(expandable: bool) -> None:
    allocator = CachingAllocator(expandable)
    for key in range(40):
        allocator.allocate(key, (key * 7919 % 23 + 1) * MIB // 3, "main")
    for key in [*range(0, 40, 2), *range(1, 40, 2)]:
        allocator.free(key)
    assert allocator.allocated == 0
    reserved = allocator.reserved
    allocator.allocate(100, 3 * MIB, "main")
    assert allocator.reserved == reserved
