"""SIGTERM and Ctrl-C: finish the step, then stop. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopRequest:
    """Within this context, the first SIGTERM or SIGINT sets `name` instead of ending the program.

    Only the main thread may enter it (a rule of Python's signal module).
    """

    def __init__(self) -> None:
        self.name: str | None = None
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

    @property
    def number(self) -> int:
        """The number of the signal received, 0 for none."""
        return 0 if self.name is None else signal.Signals[self.name].value

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        # The next one falls through to the default: somebody who asks twice means it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
