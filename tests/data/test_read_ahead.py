"""Reading ahead: the same items in the same order, so many at once and no more, and errors where
the item is taken."""

from __future__ import annotations

import threading

import pytest

from k2train.config.errors import ConfigError
from k2train.data.read_ahead import ReadAhead

AHEAD = [0, 1, 2, 5]


@pytest.mark.parametrize("ahead", AHEAD)
def test_items_come_in_the_order_of_the_indices(ahead: int) -> None:
    with ReadAhead(lambda index: index * index, range(3, 9), ahead) as items:
        assert [items.take() for _ in range(6)] == [9, 16, 25, 36, 49, 64]
        with pytest.raises(StopIteration):
            items.take()


@pytest.mark.parametrize("ahead", AHEAD[1:])
def test_no_more_are_read_than_may_be_waiting(ahead: int) -> None:
    """After n were taken, n + ahead are read, and the next take reads one more."""
    read, may_end = [], threading.Semaphore(0)

    def reading(index: int) -> int:
        may_end.acquire()
        read.append(index)
        return index

    with ReadAhead(reading, range(20), ahead) as items:
        for taken in range(4):
            may_end.release(ahead if taken == 0 else 1)
            assert items.take() == taken
        may_end.release(100)
    assert read == list(range(len(read)))
    assert len(read) <= 4 + ahead


@pytest.mark.parametrize("ahead", AHEAD)
def test_an_error_is_raised_as_it_is_by_the_take_of_its_item(ahead: int) -> None:
    error = ConfigError("data.blend", "x", "holds token id 300", "use another tokenizer")

    def read(index: int) -> int:
        if index == 2:
            raise error
        return index

    with ReadAhead(read, range(9), ahead) as items:
        assert [items.take(), items.take()] == [0, 1]
        with pytest.raises(ConfigError) as raised:
            items.take()
    assert raised.value is error


def test_the_reader_is_another_thread_and_ends_with_the_block_even_by_an_error() -> None:
    seen = []

    def read(index: int) -> int:
        seen.append(threading.current_thread())
        return index

    def interrupted() -> None:
        with ReadAhead(read, range(9), 2) as items:
            items.take()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threading.current_thread() not in seen
    assert not any(thread.is_alive() for thread in seen)


def test_without_reading_ahead_there_is_no_thread_and_nothing_is_read_early() -> None:
    seen = []

    def read(index: int) -> int:
        seen.append((index, threading.current_thread()))
        return index

    with ReadAhead(read, range(9), 0) as items:
        assert seen == []
        items.take()
    assert seen == [(0, threading.current_thread())]


def test_the_wait_is_that_of_the_last_take() -> None:
    may_end = threading.Event()
    with ReadAhead(lambda index: may_end.wait(), range(2), 2) as items:
        assert items.wait_seconds == 0
        threading.Timer(0.05, may_end.set).start()
        items.take()
        long = items.wait_seconds
        items.take()
        assert 0 < items.wait_seconds < long
