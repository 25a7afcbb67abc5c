"""The baton of the threads world: of all ranks one runs, until it must wait; then the next in line
runs.

Ranks are threads, but nothing is concurrent: whoever holds the baton may touch all shared state
without a lock, the order is first come first served and thus the same in every run, and when nobody
can run that is a deadlock, known at once. Measured, a baton is three times faster than condition
variables that let all threads contend for the interpreter.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterable

from k2train.parallel.communicator import CommunicationError


class DeadlockError(CommunicationError):
    """Every rank waits or has ended; the message says for what, and where."""


class AbortedRank(BaseException):
    """Unwinds a rank after another one failed. Not an Exception, so that no handler takes it for
    its own."""


class Baton:
    """Hands the right to run from rank to rank. All methods but `start` and `wait_for_end` are for
    the rank that has it."""

    def __init__(self, size: int) -> None:
        self.error: BaseException | None = None
        self.failed_rank: int | None = None
        self._locks = [threading.Lock() for _ in range(size)]
        for lock in self._locks:
            lock.acquire()
        self._ready = collections.deque(range(size))
        self._blocked: dict[int, Callable[[], str]] = {}
        self._ended: list[int] = []
        self._all_ended = threading.Event()

    def start(self) -> None:
        """Let rank 0 run."""
        self._hand_over()

    def wait_for_end(self) -> None:
        """Return when every rank has ended. For the thread that started them."""
        self._all_ended.wait()

    def enter(self, rank: int) -> None:
        """A rank's first call: wait for its first turn."""
        self._locks[rank].acquire()
        self.check()

    def check(self) -> None:
        """Raise AbortedRank where another rank has failed."""
        if self.error is not None:
            raise AbortedRank

    def block(self, rank: int, what: Callable[[], str]) -> None:
        """Let others run until `wake(rank)`. what: describes the wait, for a deadlock's message."""
        self.check()
        self._blocked[rank] = what
        self._hand_over()
        self._locks[rank].acquire()
        self.check()

    def wake(self, ranks: Iterable[int]) -> None:
        """Put waiting ranks at the end of the line."""
        for rank in ranks:
            del self._blocked[rank]
            self._ready.append(rank)

    def fail(self, error: BaseException, rank: int | None) -> None:
        """Remember the first error and let every waiting rank run into it."""
        if self.error is None:
            self.error, self.failed_rank = error, rank
        self._ready.extend(sorted(self._blocked))
        self._blocked.clear()

    def end(self, rank: int) -> None:
        """A rank's last call."""
        self._ended.append(rank)
        self._hand_over()

    def _hand_over(self) -> None:
        if not self._ready and self._blocked:
            self.fail(DeadlockError(self._describe()), None)
        if self._ready:
            self._locks[self._ready.popleft()].release()
        else:
            self._all_ended.set()

    def _describe(self, limit: int = 8) -> str:
        waiting = [f"  rank {rank} waits in {what()}" for rank, what in sorted(self._blocked.items())]
        if len(waiting) > limit:
            waiting[limit:] = [f"  and {len(waiting) - limit} more ranks"]
        ended = f"\n  ranks that have ended: {sorted(self._ended)[:32]}" if self._ended else ""
        return "deadlock: no rank can run\n" + "\n".join(waiting) + ended
