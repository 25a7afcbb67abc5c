"""The exception for an action list that cannot run."""

from __future__ import annotations

from collections.abc import Sequence


class ScheduleError(ValueError):
    """A schedule that breaks a rule: a headline, then a line for each stage or action involved."""

    def __init__(self, headline: str, lines: Sequence[str] = ()) -> None:
        self.headline = headline
        self.lines = tuple(lines)
        super().__init__("\n  ".join((headline, *self.lines)))
