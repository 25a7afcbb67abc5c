"""The numbers a rehearsal's host reads: what a device would have computed."""

from __future__ import annotations

from k2train.config.schema import Config
from k2train.layout.layout import Layout


class Numbers:
    """Answers to reads of one rank."""

    def __init__(self, config: Config, layout: Layout, rank: int, skew: float) -> None:
        self._layout = layout

    def answer(self, what: str, count: int) -> list[float]:
        return [1.0] * count
