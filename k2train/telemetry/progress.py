"""Progress on the terminal: a bar where there is one, plain lines where there is none (a log file, Slurm, CI)."""

from __future__ import annotations

import sys
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

MAX_LINES = 40


class ProgressDisplay(Protocol):
    """Shows how far a task of `total` units is."""

    def advance(self, amount: int, note: str) -> None: ...

    def say(self, text: str) -> None: ...

    def __enter__(self) -> ProgressDisplay: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class BarProgress:
    """A rich bar with the time that remains; `note` is the text beside it."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TaskProgressColumn(),
                   TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
        self._progress = Progress(*columns, console=Console())
        self._task = self._progress.add_task(title, total=total, completed=done, note="")

    def advance(self, amount: int, note: str) -> None:
        self._progress.update(self._task, advance=amount, note=note)

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
    """A line every so often, at most MAX_LINES for the whole task."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._done = title, total, done
        self._every = max(1, total // MAX_LINES)

    def advance(self, amount: int, note: str) -> None:
        before, self._done = self._done, self._done + amount
        if before // self._every != self._done // self._every or self._done >= self._total:
            print(f"{self._title} {self._done}/{self._total}  {note}".rstrip(), flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

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


def open_progress(mode: str, title: str, total: int, done: int = 0) -> ProgressDisplay:
    """The display for `telemetry.progress`: `auto` draws a bar where standard output is a terminal."""
    if mode == "none":
        return NoProgress(title, total, done)
    if mode == "bar" or (mode == "auto" and sys.stdout.isatty()):
        return BarProgress(title, total, done)
    return LineProgress(title, total, done)
