"""A simulated step as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

A process for each stage, a thread for each stream, a box for each phase, message and copy, and a counter for the bytes on the
device. Times are in microseconds, as the format wants.
Source: "Trace Event Format" (Google).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from typing import Any

from k2train.schedule.colours import LANE_NAMES, LANES, category
from k2train.schedule.simulation import Event, Simulation

_MICRO = 1e6


def write_trace(
    simulation: Simulation,
    path: str | PathLike[str],
    start: float = 0.0,
    end: float = float("inf"),
) -> int:
    """Write what overlaps a window of a recorded simulation; returns the number of boxes.

    K2's full step of 1024 microbatches is about a million boxes, 150 MB; a window of some seconds keeps it small.
    Raises ValueError where the simulation was not recorded, OSError where the file cannot be written.
    """
    if not any(simulation.compute_records):
        raise ValueError("nothing to trace: simulate with record=True")
    boxes = 0
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        file.write(",\n".join(map(json.dumps, _names(simulation))))
        for event in simulation.events(start, end):
            file.write(",\n" + json.dumps(_box(simulation, event)))
            boxes += 1
        for counter in _counters(simulation, start, end):
            file.write(",\n" + json.dumps(counter))
        file.write("\n]}\n")
    return boxes


def _thread(simulation: Simulation, event: Event) -> int:
    """Sends to the previous stage have a thread of their own: they may overlap those to the next."""
    if event.stream != "send":
        return LANES.index(event.stream)
    return LANES.index("send") if event.name == "SEND_F" else len(LANES)


def _names(simulation: Simulation) -> Iterator[dict[str, Any]]:
    threads = {LANES.index(lane): LANE_NAMES[lane] for lane in LANES}
    threads[LANES.index("send")] = "PP send activations"
    threads[len(LANES)] = "PP send gradients"
    order = ("compute", "ep", "send", None, "d2h", "h2d")
    for stage in range(simulation.schedule.num_stages):
        yield {"ph": "M", "pid": stage, "name": "process_name", "args": {"name": f"stage {stage}"}}
        yield {"ph": "M", "pid": stage, "name": "process_sort_index", "args": {"sort_index": stage}}
        for place, lane in enumerate(order):
            thread = len(LANES) if lane is None else LANES.index(lane)
            base = {"ph": "M", "pid": stage, "tid": thread}
            yield {**base, "name": "thread_name", "args": {"name": threads[thread]}}
            yield {**base, "name": "thread_sort_index", "args": {"sort_index": place}}


def _box(simulation: Simulation, event: Event) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": event.stage,
        "tid": _thread(simulation, event),
        "name": str(event.action)
        if event.name == event.action.kind.value
        else f"{event.action} {event.name}",
        "cat": category(event),
        "ts": round(event.start * _MICRO, 3),
        "dur": round((event.end - event.start) * _MICRO, 3),
        "args": {"virtual_stage": event.action.virtual_stage, "microbatch": event.action.microbatch},
    }


def _counters(simulation: Simulation, start: float, end: float) -> Iterator[dict[str, Any]]:
    for stage, (times, level) in enumerate(simulation.memory):
        for time, held in zip(times, level, strict=True):
            if start <= time < end:
                yield {
                    "ph": "C",
                    "pid": stage,
                    "name": "activation bytes",
                    "ts": round(float(time) * _MICRO, 3),
                    "args": {"bytes": int(held)},
                }
