"""A step as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

A process for each stage, a thread for each stream, a box for each phase, message and copy, and a
counter for the bytes on the device. Times are in microseconds, as the format wants. `write_trace`
writes a simulated step; the runtime writes an executed one through the same `write_boxes`, so that
the two can be laid side by side. Source: "Trace Event Format" (Google).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from os import PathLike
from typing import Any, NamedTuple

from k2train.schedule.actions import Action
from k2train.schedule.colours import LANE_NAMES, LANES, category
from k2train.schedule.simulation import Event, Simulation

_TICKS = 8e6
"""Times are whole eighths of a microsecond, which a binary number holds exactly.

A reader that turns them into whole nanoseconds, by whatever rounding, then cannot let two boxes of
a row overlap.
"""
_TICK_MICROSECONDS = 0.125

# Sends to the previous stage have a thread of their own: they may overlap those to the next.
THREADS = {
    **{lane: LANE_NAMES[lane] for lane in LANES},
    "send": "PP send activations",
    "send_back": "PP send gradients",
    "receive": "PP receive",
}
"""The threads of a stage by stream; a thread's id is its place here."""
_ORDER = ("compute", "ep", "send", "send_back", "receive", "d2h", "h2d")
_IDS = {stream: place for place, stream in enumerate(THREADS)}


class Box(NamedTuple):
    """A box of a trace.

    `stream` is one of THREADS; start and end in seconds from the start of the step.
    """

    stage: int
    stream: str
    name: str
    category: str
    start: float
    end: float
    action: Action


def write_boxes(
    path: str | PathLike[str],
    num_stages: int,
    boxes: Iterable[Box],
    counters: Iterable[dict[str, Any]] = (),
) -> int:
    """Write a trace, box by box; returns the number of boxes.

    Raises OSError where the file cannot be written.
    """
    count = 0
    ends: dict[tuple[int, str], int] = {}
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        file.write(",\n".join(map(json.dumps, _names(num_stages))))
        for box in boxes:
            file.write(",\n" + json.dumps(_event(box, ends)))
            count += 1
        for counter in counters:
            file.write(",\n" + json.dumps(counter))
        file.write("\n]}\n")
    return count


def write_trace(
    simulation: Simulation,
    path: str | PathLike[str],
    start: float = 0.0,
    end: float = float("inf"),
) -> int:
    """Write what overlaps a window of a recorded simulation; returns the number of boxes.

    K2's full step of 1024 microbatches is about a million boxes, 150 MB; a window of some seconds
    keeps it small. Raises ValueError where the simulation was not recorded, OSError where the file
    cannot be written.
    """
    if not any(simulation.compute_records):
        raise ValueError("nothing to trace: simulate with record=True")
    boxes = map(_simulated_box, simulation.events(start, end))
    return write_boxes(path, simulation.schedule.num_stages, boxes, _counters(simulation, start, end))


def _names(num_stages: int) -> Iterator[dict[str, Any]]:
    for stage in range(num_stages):
        yield {"ph": "M", "pid": stage, "name": "process_name", "args": {"name": f"stage {stage}"}}
        yield {"ph": "M", "pid": stage, "name": "process_sort_index", "args": {"sort_index": stage}}
        for place, stream in enumerate(_ORDER):
            base = {"ph": "M", "pid": stage, "tid": _IDS[stream]}
            yield {**base, "name": "thread_name", "args": {"name": THREADS[stream]}}
            yield {**base, "name": "thread_sort_index", "args": {"sort_index": place}}


def _simulated_box(event: Event) -> Box:
    kind = event.action.kind.value
    name = str(event.action) if event.name == kind else f"{event.action} {event.name}"
    stream = "send_back" if event.name == "SEND_B" else event.stream
    return Box(event.stage, stream, name, category(event), event.start, event.end, event.action)


def _event(box: Box, ends: dict[tuple[int, str], int]) -> dict[str, Any]:
    """The box in the format's words. ends: of each row's last box, in ticks, kept here."""
    row = box.stage, box.stream
    start, end = _ticks(box.start), _ticks(box.end)
    if start == ends.get(row, start) - 1:
        # Sums of seconds differ in their last bit: one moment was rounded up as an end and down as
        # a start.
        start += 1
    ends[row] = end = max(start, end)
    return {
        "ph": "X",
        "pid": box.stage,
        "tid": _IDS[box.stream],
        "name": box.name,
        "cat": box.category,
        "ts": start * _TICK_MICROSECONDS,
        "dur": (end - start) * _TICK_MICROSECONDS,
        "args": {"virtual_stage": box.action.virtual_stage, "microbatch": box.action.microbatch},
    }


def _ticks(seconds: float) -> int:
    return round(seconds * _TICKS)


def _counters(simulation: Simulation, start: float, end: float) -> Iterator[dict[str, Any]]:
    for stage, (times, level) in enumerate(simulation.memory):
        for time, held in zip(times, level, strict=True):
            if start <= time < end:
                yield {
                    "ph": "C",
                    "pid": stage,
                    "name": "activation bytes",
                    "ts": _ticks(float(time)) * _TICK_MICROSECONDS,
                    "args": {"bytes": int(held)},
                }
