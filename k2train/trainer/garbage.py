"""Python's cycle collector, moved out of the step.

The collector looks at every object it tracks each time enough new ones were made. A run keeps
hundreds of thousands that never become garbage (256 ranks as threads: millions), and a step makes
millions that reference counts free at once; left alone, the collector took a third of such a step
and found nothing. So it is switched off, what the run is made of is set aside once, and what little
a step leaves behind in cycles is collected after it.
"""

from __future__ import annotations

import gc
from types import TracebackType


class GarbageControl:
    """Context manager of a process: no automatic collection inside it; `after_step` collects."""

    def __init__(self) -> None:
        self._steps_collected: int | None = None
        self._was_enabled = False

    def __enter__(self) -> GarbageControl:
        self._was_enabled = gc.isenabled()
        gc.disable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def after_step(self, steps_done: int) -> None:
        """Collect once for each step, however many ranks of this process call it; the first time,
        set aside what stays."""
        if steps_done == self._steps_collected:
            return
        first = self._steps_collected is None
        self._steps_collected = steps_done
        gc.collect()
        if first:
            gc.freeze()
