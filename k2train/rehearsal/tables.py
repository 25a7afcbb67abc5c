"""A rehearsal as tables, set like a plan's."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table

from k2train.planner.text import gigabytes
from k2train.rehearsal import summary
from k2train.rehearsal.run import Rehearsal
from k2train.rehearsal.summary import Beside
from k2train.telemetry.tables import new_table


def rehearsal_tables(rehearsal: Rehearsal) -> list[RenderableType]:
    """All tables, in reading order."""
    return [
        heading(rehearsal),
        memory_table(rehearsal),
        lines_table(
            f"Alive at the peak, in {place_of_peak(rehearsal)}", summary.peak_by_line(rehearsal.pipeline_peak)
        ),
        left_table(rehearsal),
        accounts_line(rehearsal),
        allocator_table(rehearsal),
        seconds_table(rehearsal),
        costly_table(rehearsal),
        flops_line(rehearsal),
        wide_line(rehearsal),
        traffic_table(rehearsal),
        waits_table(rehearsal),
    ]


def heading(rehearsal: Rehearsal) -> str:
    """What was rehearsed, and how long that took."""
    config, schedule = rehearsal.config, rehearsal.plan.program.schedule
    return (
        f"{config.name}: one step of rank {rehearsal.rank} (stage {rehearsal.stage}) of "
        f"{rehearsal.plan.program.layout.world}, {schedule.num_microbatches} microbatches, without a device.\n"
        f"Rehearsed in {rehearsal.build_seconds + rehearsal.step_seconds + rehearsal.update_seconds:.0f} s "
        f"(build {rehearsal.build_seconds:.0f}, action list {rehearsal.step_seconds:.0f}, "
        f"update {rehearsal.update_seconds:.0f}).\n"
    )


def place_of_peak(rehearsal: Rehearsal) -> str:
    peak = rehearsal.pipeline_peak
    step = rehearsal.plan.program.schedule.stages[rehearsal.stage][peak.number]
    return f"{step} ({peak.place})"


def memory_table(rehearsal: Rehearsal) -> Table:
    """Bytes on the device at the fullest moment, by cause, and beside the plan's."""
    table = new_table("Device memory in GB (1e9 bytes)", ["", "plan", "rehearsed", "difference"])
    for row in summary.memory_beside(rehearsal):
        table.add_row(row.name, gigabytes(row.planned), gigabytes(row.rehearsed), percent(row))
    for name, num_bytes in summary.peak_by_cause(rehearsal.pipeline_peak).items():
        table.add_row(f"  {name}", "", gigabytes(num_bytes), "")
    table.add_row("peak of the update", "", gigabytes(rehearsal.update_peak.num_bytes), "")
    return table


def percent(row: Beside) -> str:
    return f"{100 * row.excess:+.1f} %"


def lines_table(title: str, rows: Sequence[tuple[str, str, int, int]]) -> Table:
    """Storages by the line that made them."""
    table = new_table(title, ["made by", "in", "storages", "GB"], text_columns=2)
    for line, place, storages, num_bytes in rows:
        table.add_row(line, place, str(storages), f"{num_bytes / 1e9:.3f}")
    return table


def left_table(rehearsal: Rehearsal) -> RenderableType:
    """What the step leaves alive."""
    total = sum(living.birth.num_bytes for living in rehearsal.left)
    if not total:
        return "Nothing that the step has made is alive at its end.\n"
    return lines_table(
        f"Made by the step and alive at its end: {total / 1e9:.3f} GB", summary.left_by_line(rehearsal)
    )


def accounts_line(rehearsal: Rehearsal) -> str:
    """The program's books against living storages."""
    auditor = rehearsal.auditor
    wrong, worst = list(auditor.disagreements()), auditor.worst()
    if worst is None:
        return "No action was audited.\n"
    told = (
        "the store says what its storages are"
        if not wrong
        else (
            f"the store says {wrong[0].stored:,} bytes and its storages have {wrong[0].alive:,} after {wrong[0].after}"
        )
    )
    return (
        f"Audited after {len(auditor.audits)} actions: {told};\nin nobody's books at most "
        f"{worst.nobodys_bytes / 1e6:.1f} MB, after {worst.after}.\n"
    )


def allocator_table(rehearsal: Rehearsal) -> Table:
    """What the caching allocator takes for it."""
    table = new_table("Caching allocator over the step, GB", ["", "allocated", "reserved", "more"])
    for name, peaks in summary.reserved(rehearsal).items():
        more = f"{100 * (peaks.reserved / peaks.allocated - 1):+.1f} %"
        table.add_row(name, gigabytes(peaks.allocated), gigabytes(peaks.reserved), more)
    return table


def seconds_table(rehearsal: Rehearsal) -> Table:
    """Compute seconds of the action list."""
    title = f"Roofline seconds of the compute stream ({rehearsal.config.cluster.name})"
    table = new_table(title, ["", "plan", "rehearsed", "difference"])
    for row in summary.seconds_beside(rehearsal):
        table.add_row(row.name, f"{row.planned:.3f}", f"{row.rehearsed:.3f}", percent(row))
    return table


def costly_table(rehearsal: Rehearsal, most: int = 16) -> Table:
    """The operations that take longest."""
    table = new_table("Costliest operations", ["operation", "in", "stream", "launches", "s"], text_columns=3)
    for name, place, stream, launches, seconds in summary.costliest(rehearsal)[:most]:
        table.add_row(name, place, stream, str(launches), f"{seconds:.3f}")
    return table


def flops_line(rehearsal: Rehearsal) -> str:
    flops = ", ".join(
        f"{count / 1e12:,.1f} in {name}" for name, count in summary.flops_by_dtype(rehearsal).items()
    )
    launches = ", ".join(f"{kind} {count:,}" for kind, count in summary.launches_by_kind(rehearsal).items())
    return f"TFLOP: {flops}.\nLaunches: {launches}.\n"


def wide_line(rehearsal: Rehearsal) -> str:
    """The products that should not be."""
    found = summary.wide_products(rehearsal)
    if not found:
        return "No product of FP32 by FP32 above 1 GFLOP.\n"
    rows = "\n".join(f"  {launches} x {work.title} in {place}" for place, work, launches in found[:8])
    return f"Products of FP32 by FP32 above 1 GFLOP:\n{rows}\n"


def traffic_table(rehearsal: Rehearsal) -> Table:
    """Operations with other ranks."""
    table = new_table(
        "Communication of this rank", ["in", "group", "operation", "calls", "GB"], text_columns=3
    )
    for key, calls in sorted(rehearsal.counts.calls.items()):
        table.add_row(*key, f"{calls:,}", f"{rehearsal.counts.bytes[key] / 1e9:,.3f}")
    return table


def waits_table(rehearsal: Rehearsal) -> Table:
    """Where the host stands still."""
    waits = rehearsal.observer.device.host_waits
    table = new_table(
        f"Waits of the host for the device: {sum(waits.values()):,}", ["for", "line", "times"], text_columns=2
    )
    for (what, line), times in waits.most_common():
        table.add_row(what, line, f"{times:,}")
    return table
