"""The arena lends host buffers of bounded waste, reuses them, and knows what it has lent."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k2train.activations.arena import SMALLEST_BYTES, HostArena, HostMemoryError, class_bytes
from k2train.config.errors import ConfigError
from k2train.device.build import build_device
from k2train.device.cpu import CpuDevice
from k2train.device.host_memory import PageableMemory

KIB = 1024


@given(st.integers(1, 1 << 45), st.sampled_from([512, 4096]))
def test_a_size_class_wastes_less_than_a_quarter_of_the_request_or_less_than_the_smallest_class(
    size, smallest
) -> None:
    waste = class_bytes(size, smallest) - size
    assert 0 <= waste < max(size / 4, smallest)
    assert class_bytes(size, smallest) % smallest == 0


@given(st.integers(1, 1 << 45))
def test_a_size_class_is_its_own_and_classes_grow_with_the_request(size) -> None:
    assert class_bytes(class_bytes(size)) == class_bytes(size) <= class_bytes(size + 1)


def test_there_are_four_classes_between_neighbouring_powers_of_two() -> None:
    assert len({class_bytes(size) for size in range(64 * KIB + 1, 128 * KIB + 1)}) == 4


def test_a_buffer_has_the_bytes_that_were_asked_for() -> None:
    buffer = HostArena(CpuDevice()).take(700)
    assert buffer.bytes.shape == (700,)
    assert buffer.bytes.dtype == torch.uint8
    assert (buffer.num_bytes, buffer.class_bytes) == (700, 2 * SMALLEST_BYTES)


def test_a_buffer_given_back_serves_the_next_request_of_its_class_the_oldest_first() -> None:
    arena = HostArena(CpuDevice())
    lent = [arena.take(1000) for _ in range(3)]
    places = [buffer.bytes.data_ptr() for buffer in lent]
    for index in (1, 0, 2):
        arena.give_back(lent[index])
    allocated = arena.allocated_bytes
    assert [arena.take(size).bytes.data_ptr() for size in (900, 1000, 513)] == [places[i] for i in (1, 0, 2)]
    assert arena.allocated_bytes == allocated


def test_the_event_of_the_last_copy_stays_with_the_memory() -> None:
    arena = HostArena(CpuDevice())
    first = arena.take(1000)
    assert first.ready is None
    first.ready = "the copy back of microbatch 3"
    arena.give_back(first)
    assert arena.take(1000).ready == "the copy back of microbatch 3"


def test_counts_of_used_peak_and_allocated_bytes() -> None:
    arena = HostArena(CpuDevice())
    small, large = arena.take(512), arena.take(4 * KIB)
    assert (arena.used_bytes, arena.peak_bytes, arena.allocated_bytes) == (4608, 4608, 4608)
    arena.give_back(large)
    assert (arena.used_bytes, arena.peak_bytes, arena.allocated_bytes) == (512, 4608, 4608)
    arena.reset_peak()
    assert arena.peak_bytes == 512
    arena.give_back(small)
    arena.release_free()
    assert (arena.used_bytes, arena.peak_bytes, arena.allocated_bytes) == (0, 512, 0)


def test_after_reserving_a_step_allocates_nothing() -> None:
    arena = HostArena(CpuDevice())
    arena.reserve({700: 2, 1000: 3, 5000: 1})
    allocated = arena.allocated_bytes
    assert allocated == 5 * KIB + class_bytes(5000)
    assert arena.used_bytes == arena.peak_bytes == 0
    lent = [arena.take(size) for size in (1000, 5000, 700, 900, 800, 1000)]
    assert arena.allocated_bytes == allocated
    for buffer in lent:
        arena.give_back(buffer)
    arena.reserve({700: 2, 1000: 3, 5000: 1})
    assert arena.allocated_bytes == allocated
    assert arena.num_allocations == 6


def test_at_the_limit_free_buffers_of_other_classes_go_first() -> None:
    arena = HostArena(CpuDevice(), limit_bytes=8 * KIB)
    lent = [arena.take(2 * KIB) for _ in range(4)]
    for buffer in lent[1:]:
        arena.give_back(buffer)
    arena.take(4 * KIB)
    assert (arena.used_bytes, arena.allocated_bytes) == (6 * KIB, 8 * KIB)


def test_beyond_the_limit_the_error_names_the_numbers_and_a_remedy() -> None:
    arena = HostArena(CpuDevice(), limit_bytes=8 * KIB)
    arena.take(5 * KIB)
    with pytest.raises(HostMemoryError) as caught:
        arena.take(4 * KIB)
    error = caught.value
    assert isinstance(error, ConfigError)
    assert (error.asked_bytes, error.used_bytes, error.limit_bytes) == (4096, 5120, 8192)
    for part in ("4,096", "5,120", "8,192", "fp8_offload", "in flight"):
        assert part in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert arena.used_bytes == 5 * KIB


def test_a_reservation_beyond_the_limit_is_refused_and_one_that_fits_makes_room() -> None:
    arena = HostArena(CpuDevice(), limit_bytes=8 * KIB)
    arena.reserve({1024: 8})
    with pytest.raises(HostMemoryError):
        arena.reserve({1024: 1, 4096: 2})
    assert arena.allocated_bytes == 8 * KIB
    arena.reserve({1024: 2, 2048: 1, 4096: 1})
    assert arena.allocated_bytes == 8 * KIB
    for size in (1024, 4096, 1024, 2048):
        arena.take(size)
    assert arena.allocated_bytes == 8 * KIB


def test_a_reservation_that_makes_room_spares_what_it_has_just_made() -> None:
    """Plain largest-first would free the two buffers of 2 KiB for the one of 4 KiB, where four of 1
    KiB are not needed."""
    arena = HostArena(CpuDevice(), limit_bytes=8 * KIB)
    arena.reserve({1024: 4})
    arena.reserve({2048: 2, 4096: 1})
    assert arena.num_allocations == 4 + 3
    for size in (4096, 2048, 2048):
        arena.take(size)
    assert arena.num_allocations == 4 + 3
    assert arena.allocated_bytes == arena.used_bytes == 8 * KIB


def test_memory_that_the_system_refuses_is_the_same_error_without_a_limit() -> None:
    arena = HostArena(CpuDevice())
    with pytest.raises(HostMemoryError, match="the system gives no more"):
        arena.take(1 << 60)
    assert arena.allocated_bytes == arena.used_bytes == 0


def test_giving_back_twice_is_a_bug_even_when_the_memory_has_a_new_holder() -> None:
    arena = HostArena(CpuDevice())
    buffer = arena.take(1000)
    arena.give_back(buffer)
    with pytest.raises(AssertionError, match="twice"):
        arena.give_back(buffer)
    again = arena.take(1000)
    assert again.bytes.data_ptr() == buffer.bytes.data_ptr()
    with pytest.raises(AssertionError, match="twice"):
        arena.give_back(buffer)


def test_giving_back_to_another_arena_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="did not lend it"):
        HostArena(CpuDevice()).give_back(HostArena(CpuDevice()).take(1000))


def test_an_abandoned_buffer_counts_as_free_from_the_next_call_on() -> None:
    arena = HostArena(CpuDevice(), limit_bytes=1024)
    arena.abandon([arena.take(1024)])
    assert arena.used_bytes == 0
    arena.abandon([arena.take(1024)])
    assert arena.take(1024).num_bytes == 1024


def test_pageable_memory_is_of_the_exact_size() -> None:
    assert PageableMemory(1280).bytes.numel() == 1280


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_buffers_are_locked_and_can_be_freed_and_made_again() -> None:
    arena = HostArena(build_device(torch.device("cuda", 0)), limit_bytes=1 << 20)
    for _ in range(3):
        buffer = arena.take(300_000)
        assert buffer.bytes.is_pinned()
        assert buffer.class_bytes % 4096 == 0
        arena.give_back(buffer)
        del buffer
        arena.release_free()
        assert arena.allocated_bytes == 0
