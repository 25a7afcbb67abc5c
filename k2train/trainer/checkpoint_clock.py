"""`train.checkpoint_every_minutes`: a checkpoint is due when rank 0's clock says so, and every rank
must know.

Clocks differ, so one rank asks and all hear it in the same step: the answer rides where a stop
signal does, on the maximum that a step takes over all ranks anyway (trainer/totals.py). It costs no
message of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SAVE_NUMBER = 1
"""What stands for "save" where a signal's number would. A signal that stops a run is larger (SIGINT
is 2) and wins the maximum, which is right, since a stop saves, too."""


class CheckpointClock:
    """When this rank last saved. Made when the steps begin."""

    def __init__(self, minutes: float, asks: bool, now: Callable[[], float] = time.monotonic) -> None:
        """minutes: between checkpoints, 0 for never by time.

        asks: whether this rank's clock is the one that counts.
        """
        self._seconds = minutes * 60
        self._asks = asks and minutes > 0
        self._now = now
        self._last = now()

    def number(self, stop_number: int) -> int:
        """What this rank sends in a step: the signal it has received, else whether it asks for a
        checkpoint.
        """
        if stop_number or not self._asks or self._now() - self._last < self._seconds:
            return stop_number
        return SAVE_NUMBER

    def saved(self) -> None:
        """Count from now."""
        self._last = self._now()
