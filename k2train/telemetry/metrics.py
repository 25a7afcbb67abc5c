"""metrics.jsonl: one JSON object a step, appended and flushed as the run goes.

The file is the record of a run, so a resumed run must leave the same lines as one that was never
interrupted: on resume, lines of steps after the checkpoint (and a line cut short by a kill) are
removed before new ones are added.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

Metrics = Mapping[str, Any]

# Keys that depend on the clock or the machine and not on the computation: equal runs may differ in
# them.
CLOCK_KEYS = frozenset({"tokens_per_second", "step_seconds", "data_wait_seconds", "peak_bytes", "mfu"})


class MetricsFile:
    """Append-only writer of metrics.jsonl; opening cuts the file back to its first `keep_steps`
    steps."""

    def __init__(self, path: Path, keep_steps: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= keep_steps]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(_encode(line) for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, metrics: Metrics) -> None:
        """Append one step and flush, so that a killed run loses nothing it has shown."""
        self._file.write(_encode(metrics))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; none for a missing file.

    A last line cut short by a kill is left out.
    """
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _encode(metrics: Metrics) -> str:
    # JSON has no NaN or infinity; a step that has one stops the run, and null keeps its line
    # readable everywhere.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in metrics.items()
    }
    return json.dumps(finite) + "\n"
