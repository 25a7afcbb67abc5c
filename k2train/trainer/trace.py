"""`telemetry.trace_step`: the executed timeline of one step in the run directory, beside which
`plan.trace` can be laid.

One row for each pipeline stage, of the ranks that come first in their stages; they meet at rank 0,
which writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from k2train.device.protocol import Device
from k2train.parallel.objects import broadcast_object
from k2train.runtime.recorder import Recorder, from_json, to_json, trace_boxes
from k2train.schedule.trace import Box, write_boxes
from k2train.trainer.build import Run


def start_recorder(run: Run, index: int) -> Recorder | None:
    """A recorder where step `index` (from 0) is the one to trace, else None.

    Every rank must call it: a barrier over the world, so that the rows of the trace have one zero.
    """
    if run.config.telemetry.trace_step != index + 1:
        return None
    run.groups.world.barrier()
    return Recorder(device_clock(run.device))


def device_clock(device: Device) -> Callable[[], float]:
    """Seconds, after what was issued to the device's current stream so far has ended.

    Other streams are not waited for: a receive that is posted there may depend on what this stage
    does next.
    """

    def clock() -> float:
        device.current.wait_host()
        return time.perf_counter()

    return clock


def write_recording(run: Run, recorder: Recorder, run_dir: Path) -> None:
    """Gather the stages' records and write run_dir/trace.json. Every rank must call it: broadcasts
    in one pp group."""
    if run.groups.dp.rank != 0:
        return
    group, mine = run.groups.pp, to_json(recorder.records)
    stages = [broadcast_object(group, mine, stage, run.device.torch_device) for stage in range(group.size)]

    def boxes() -> Iterator[Box]:
        for stage, values in enumerate(stages):
            yield from trace_boxes(stage, from_json(values))

    if run.is_main:
        write_boxes(run_dir / "trace.json", group.size, boxes())
