"""A rehearsal as a JSON document. Bytes, seconds and FLOPs as plain numbers; nothing is rounded,
keys are stable."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from k2train.config.convert import to_dict
from k2train.rehearsal import summary
from k2train.rehearsal.observer import Peak
from k2train.rehearsal.run import Rehearsal


def rehearsal_document(rehearsal: Rehearsal) -> dict[str, Any]:
    """Everything that the tables say, and the level of memory after every action."""
    places = summary.seconds_by_place(rehearsal)
    return {
        "name": rehearsal.config.name,
        "stage": rehearsal.stage,
        "rank": rehearsal.rank,
        "microbatches": rehearsal.plan.program.schedule.num_microbatches,
        "memory": [dataclasses.asdict(row) for row in summary.memory_beside(rehearsal)],
        "pipeline_peak": _peak(rehearsal.pipeline_peak),
        "update_peak": _peak(rehearsal.update_peak),
        "left": _lines(summary.left_by_line(rehearsal)),
        "left_bytes": sum(living.birth.num_bytes for living in rehearsal.left),
        "audits": [
            {
                "after": audit.after,
                "stored": audit.stored,
                "alive": audit.alive,
                "nobodys": audit.nobodys_bytes,
            }
            for audit in rehearsal.auditor.audits
        ],
        "allocator": {name: dataclasses.asdict(peaks) for name, peaks in summary.reserved(rehearsal).items()},
        "seconds": [dataclasses.asdict(row) for row in summary.seconds_beside(rehearsal)],
        "seconds_by_phase": places,
        "flops_by_dtype": summary.flops_by_dtype(rehearsal),
        "wide_products": [
            {"in": place, "operation": work.title, "launches": launches}
            for place, work, launches in summary.wide_products(rehearsal)
        ],
        "launches": dict(summary.launches_by_kind(rehearsal)),
        "communication": [
            {**key._asdict(), "calls": calls, "bytes": rehearsal.counts.bytes[key]}
            for key, calls in sorted(rehearsal.counts.calls.items())
        ],
        "host_waits": [
            {"for": what, "line": line, "times": times}
            for (what, line), times in rehearsal.observer.device.host_waits.most_common()
        ],
        "levels": [
            {"action": action, "bytes": after, "highest": highest}
            for action, after, highest in rehearsal.observer.levels
        ],
        "config": to_dict(rehearsal.config),
    }


def _peak(peak: Peak) -> dict[str, Any]:
    return {
        "bytes": peak.num_bytes,
        "without_reference_bytes": peak.in_use_bytes,
        "in": peak.place,
        "action": peak.number,
        "by_cause": summary.peak_by_cause(peak),
        "by_line": _lines(summary.peak_by_line(peak)),
    }


def _lines(rows: Sequence[tuple[str, str, int, int]]) -> list[dict[str, Any]]:
    names = ("line", "in", "storages", "bytes")
    return [dict(zip(names, row, strict=True)) for row in rows]
