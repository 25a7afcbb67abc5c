"""SIGTERM and Ctrl-C: finish the step, then stop. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopRequest:
    """Within this context, the first SIGTERM or SIGINT sets `number`, 0 before, instead of ending
    the program.

    Only the main thread may enter it (a rule of Python's signal module).
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        # The next one falls through to the default: somebody who asks twice means it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
