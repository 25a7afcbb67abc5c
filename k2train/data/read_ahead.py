"""Items read by a background thread before they are asked for, in order.

One thread reads one item after the other, never more than `ahead` of them before they are taken. So
the wait for a disk passes beside the step, memory stays bounded, and the order is that of the
indices.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """read(index) for each index in turn, as `take` asks for them. A context manager; communicates
    with nobody.

    ahead: how many are read before they are asked for. 0 reads each in `take` and makes no thread.
    What `read` raises is raised by the `take` of that item, as it was raised.
    wait_seconds: how long the last `take` waited.
    """

    def __init__(self, read: Callable[[int], T], indices: range, ahead: int) -> None:
        self.wait_seconds = 0.0
        self._read, self._left, self._ahead = read, iter(indices), ahead
        self._pool: ThreadPoolExecutor | None = None
        self._reading: collections.deque[Future[T]] = collections.deque()

    def __enter__(self) -> ReadAhead[T]:
        if self._ahead:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        for _ in range(self._ahead):
            self._start_next()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread after the item it is reading; the rest is not read."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._reading.clear()

    def take(self) -> T:
        """The next item. Raises StopIteration after the last."""
        began = time.perf_counter()
        try:
            return self._take()
        finally:
            self.wait_seconds = time.perf_counter() - began

    def _take(self) -> T:
        if self._pool is None:
            return self._read(next(self._left))
        if not self._reading:
            raise StopIteration
        item = self._reading.popleft().result()
        self._start_next()
        return item

    def _start_next(self) -> None:
        index = next(self._left, None)
        if index is not None:
            assert self._pool is not None
            self._reading.append(self._pool.submit(self._read, index))
