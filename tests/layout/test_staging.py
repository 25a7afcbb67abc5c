"""Sizes of the slots that host states pass through."""

import pytest

from k2train.layout.staging import (
    CHUNK_ELEMENTS,
    MAX_BATCH_ELEMENTS,
    largest_batch,
    matrices_at_once,
    slot_elements,
)


@pytest.mark.parametrize(
    ("shape", "number"),
    [((2048, 7168), 4), ((1 << 13, 1 << 13), 1), ((1 << 14, 1 << 13), 1), ((4, 4), 1 << 22)],
)
def test_a_batch_is_bounded_and_never_less_than_a_matrix(shape: tuple[int, ...], number: int) -> None:
    assert matrices_at_once(shape) == number


def test_the_largest_batch_takes_no_more_matrices_than_there_are() -> None:
    assert largest_batch([((2048, 7168), 3), ((512, 512), 2)]) == 3 * 2048 * 7168
    assert largest_batch([((2048, 7168), 24)]) == 4 * 2048 * 7168 <= MAX_BATCH_ELEMENTS
    assert largest_batch([]) == 0


def test_a_slot_holds_master_and_momentum_or_a_piece_of_the_masters() -> None:
    assert slot_elements(largest_stretch=1000, largest_batch=400, numbers_kept=2) == 1000
    assert slot_elements(largest_stretch=1000, largest_batch=600, numbers_kept=2) == 1200
    assert (
        slot_elements(largest_stretch=10 * CHUNK_ELEMENTS, largest_batch=0, numbers_kept=0) == CHUNK_ELEMENTS
    )
