"""How long operations take: medians of device time between two events, after a warm-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """seconds: the median. n: how many measurements it is of."""

    seconds: float
    n: int


class Stopwatch:
    """Device time between calls of `lap`: CUDA events on the current stream, the host's clock on a
    CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []
        self.lap()

    def lap(self) -> None:
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """The time of every lap; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        return [_between(start, end) for start, end in zip(self._marks, self._marks[1:], strict=False)]


def _between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    return start.elapsed_time(end) / 1000.0


def timed(
    function: Callable[[], object],
    device: torch.device,
    repeats: int,
    prepare: Callable[[], object] | None = None,
    most_seconds: float = 3.0,
) -> Timing:
    """The median of `repeats` calls behind two that are not counted (one before a single call).

    Fewer calls, three at least, where they would take over `most_seconds` together.

    prepare: called ahead of every call, outside of what is measured.
    """
    before = prepare or (lambda: None)
    for _ in range(min(2, repeats)):
        before()
        began = time.perf_counter()
        function()
        synchronize(device)
    once = max(time.perf_counter() - began, 1e-9)
    laps = []
    for _ in range(min(repeats, max(3, int(most_seconds / once)))):
        before()
        watch = Stopwatch(device)
        function()
        watch.lap()
        laps.append(watch)
    return median([watch.seconds()[0] for watch in laps])


def median(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), len(seconds))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
