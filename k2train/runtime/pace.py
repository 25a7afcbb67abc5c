"""How far the host runs ahead of the device: a few compute steps of the action list, and no
further.

Issuing takes the host a fraction of the time that computing takes the device, so without a bound it
would issue a whole cool-down at once. Memory that a side stream reads comes back to the allocator
only when that stream has passed it, and until then new memory is taken: a host that is thirty
microbatches ahead takes thirty microbatches' worth. A forward waits for its route's sizes, which is
bound enough; a backward waits for nothing.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator

from k2train.device.protocol import Device, Event

STEPS_AHEAD = 2
"""While the host issues one compute step, the one before it keeps the device busy; so nothing is
gained by more."""


class Pace:
    """One rank's. A step begins when the device has ended the one `STEPS_AHEAD` before it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._ended: collections.deque[Event] = collections.deque()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A compute step is issued inside. The host may wait where it begins."""
        while len(self._ended) >= STEPS_AHEAD:
            self._ended.popleft().wait_host()
        yield
        self._ended.append(self._device.current.record())
