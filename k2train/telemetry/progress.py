"""Progress on the terminal: a bar where there is one, plain lines where there is none (a log file,
Slurm, CI).

A log file of a long run must show that the run is alive, and one of a short run must stay short. So
lines come by a rhythm: each of the first steps, then one every so many seconds or steps.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

RECENT = 32
"""The pace from which the time that remains is told is that of so many advances."""


@dataclasses.dataclass(frozen=True)
class Rhythm:
    """When a plain line is due. The last unit always has one."""

    first: int = 0
    """Units at the start with a line each."""
    every_seconds: float = 10.0
    every_units: int | None = None


class ProgressDisplay(Protocol):
    """Shows how far a task of `total` units is."""

    def advance(self, amount: int, note: str) -> None:
        """`amount` more units are done; `note` says what is worth knowing of them."""
        ...

    def note(self, text: str) -> None:
        """What is going on between two advances."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def __enter__(self) -> ProgressDisplay: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class BarProgress:
    """A rich bar with the time that remains; `note` is the text beside it."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._progress = Progress(*columns, console=Console())
        self._task = self._progress.add_task(title, total=total, completed=done, note="")

    def advance(self, amount: int, note: str) -> None:
        self._progress.update(self._task, advance=amount, note=note)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)

    def __enter__(self) -> BarProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class LineProgress:
    """Lines by a rhythm, with the time of day, the units done and the time that remains.

    clock: seconds that only grow. now: the time of day.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int = 0,
        rhythm: Rhythm | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        self._title, self._total, self._done = title, total, done
        self._rhythm, self._clock, self._now = rhythm or Rhythm(), clock, now
        self._begun_at, self._shown_at = done, clock()
        self._recent = collections.deque([(self._shown_at, done)], maxlen=RECENT + 1)

    def advance(self, amount: int, note: str) -> None:
        before, self._done = self._done, self._done + amount
        time = self._clock()
        self._recent.append((time, self._done))
        if self._due(before, time):
            self._shown_at = time
            parts = [f"{self._title} {self._done}/{self._total}", note, self._left()]
            self.say("  ".join(filter(None, parts)))

    def note(self, text: str) -> None:
        return

    def say(self, text: str) -> None:
        print(f"{self._now():%Y-%m-%d %H:%M:%S}  {text}", flush=True)

    def _due(self, before: int, time: float) -> bool:
        rhythm, done = self._rhythm, self._done
        if done >= self._total or done - self._begun_at <= rhythm.first:
            return True
        if time - self._shown_at >= rhythm.every_seconds:
            return True
        every = rhythm.every_units
        return every is not None and before // every != done // every

    def _left(self) -> str:
        (since, then), (time, done) = self._recent[0], self._recent[-1]
        if done >= self._total or done <= then:
            return ""
        return f"{duration((time - since) / (done - then) * (self._total - done))} left"

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class NoProgress(LineProgress):
    """Says what it is told to say and draws nothing."""

    def advance(self, amount: int, note: str) -> None:
        return

    def say(self, text: str) -> None:
        print(text, flush=True)


def duration(seconds: float) -> str:
    """The two largest units of a time: 7 d 22 h, 1 h 05 min, 3 min 20 s, 12 s."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {whole % 60:02} s" if minutes else f"{whole} s"


def open_progress(
    mode: str, title: str, total: int, done: int = 0, rhythm: Rhythm | None = None
) -> ProgressDisplay:
    """The display for `telemetry.progress`: `auto` draws a bar on a terminal."""
    if mode == "none":
        return NoProgress(title, total, done)
    if mode == "bar" or (mode == "auto" and sys.stdout.isatty()):
        return BarProgress(title, total, done)
    return LineProgress(title, total, done, rhythm)
