"""A rehearsal in figures, beside the plan's: bytes at the peak by cause, seconds by phase, traffic,
launches, host waits.

Seconds are rooflines of the config's cluster, by the same rates as the plan's, of the operations
that were really launched. The plan's figures are of the same number of microbatches.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping

import torch

from k2train.estimate.traffic import Network
from k2train.estimate.work import MATMUL_SLOWDOWN, Machine
from k2train.rehearsal.allocator import Reserved, replay
from k2train.rehearsal.observer import Living, Peak
from k2train.rehearsal.operations import HOST_COPY, Work
from k2train.rehearsal.run import Rehearsal, kind_of_place
from k2train.schedule.costs import Stream

FP32_SLOWDOWN = 15.0
"""Matrix rate of BF16 over that of FP32 without TF32 on Hopper: 989 over 67 TFLOP/s (H100 data
sheet)."""
COMPUTE_KINDS = ("F", "I", "W")
_STATES = {"model/": "parameters", "optim/buckets.py": "gradients", "optim/": "optimizer"}


@dataclasses.dataclass(frozen=True)
class Beside:
    """One figure, planned and rehearsed."""

    name: str
    planned: float
    rehearsed: float

    @property
    def excess(self) -> float:
        """How much more the rehearsal shows, as a share of the plan."""
        return self.rehearsed / self.planned - 1 if self.planned else 0.0


def peak_by_cause(peak: Peak) -> dict[str, int]:
    """Bytes at the peak, by what they are for."""
    causes: collections.Counter[str] = collections.Counter()
    for living in peak.alive:
        causes[cause(living, peak.number)] += living.birth.num_bytes
    causes["let go, another stream not past it"] = peak.in_use_bytes
    return {name: num_bytes for name, num_bytes in causes.most_common() if num_bytes}


def cause(living: Living, number: int) -> str:
    """What a storage that is alive during action `number` is for."""
    kind = kind_of_place(living.birth.place)
    if kind in ("states", "dry run"):
        return next((name for part, name in _STATES.items() if living.line.startswith(part)), "other states")
    if living.number == number:
        return "at work"
    if kind.startswith("RECV"):
        return "messages"
    return {"F": "saved", "RELOAD": "reloaded", "I": "for weight gradients"}.get(kind, "other")


def peak_by_line(peak: Peak, most: int = 20) -> list[tuple[str, str, int, int]]:
    """(line, place, storages, bytes) at the peak, largest first."""
    return _by_line(peak.alive, most)


def left_by_line(rehearsal: Rehearsal, most: int = 20) -> list[tuple[str, str, int, int]]:
    """What the step has made and left alive."""
    return _by_line(rehearsal.left, most)


def _by_line(storages: Iterable[Living], most: int) -> list[tuple[str, str, int, int]]:
    count: collections.Counter[tuple[str, str]] = collections.Counter()
    size: collections.Counter[tuple[str, str]] = collections.Counter()
    for living in storages:
        key = living.line, living.birth.place
        count[key] += 1
        size[key] += living.birth.num_bytes
    return [(*key, count[key], num_bytes) for key, num_bytes in size.most_common(most)]


def memory_beside(rehearsal: Rehearsal) -> list[Beside]:
    """The fullest moment of the action list, planned and rehearsed; the driver's share is in
    neither."""
    planned = rehearsal.plan.memory[rehearsal.stage]
    return [
        Beside("states", planned.states, rehearsal.states_bytes),
        Beside("peak", planned.device - planned.reserved, rehearsal.pipeline_peak.num_bytes),
    ]


def seconds_of(work: Work, flops: float, num_bytes: float, launches: int, machine: Machine) -> float:
    """The roofline of `launches` calls of one operation; of a copy to or from the host, by its
    bus."""
    if work.name == HOST_COPY:
        return launches * Network(machine.cluster).host_copy(num_bytes / launches)
    slowdown = FP32_SLOWDOWN if work.dtype == torch.float32 else 1.0
    slowdown = MATMUL_SLOWDOWN["float64"] if work.dtype == torch.float64 else slowdown
    machine = dataclasses.replace(machine, dtype="bfloat16")
    return launches * machine.seconds(slowdown * flops / launches, num_bytes / launches, work.kind)


def seconds_by_place(rehearsal: Rehearsal, stream: str = "main") -> dict[str, float]:
    """Roofline seconds of what was launched on one stream."""
    machine = Machine(rehearsal.config.cluster, "bfloat16")
    seconds: dict[str, float] = collections.defaultdict(float)
    for (place, on), tallies in rehearsal.observer.work.items():
        if on == stream:
            for work, tally in tallies.items():
                seconds[place] += seconds_of(work, tally.flops, tally.bytes, tally.launches, machine)
    return dict(seconds)


def seconds_beside(rehearsal: Rehearsal) -> list[Beside]:
    """Compute seconds of the whole action list: forwards, input gradients, weight gradients, and
    their sum."""
    rehearsed: dict[str, float] = collections.defaultdict(float)
    for place, seconds in seconds_by_place(rehearsal).items():
        rehearsed[kind_of_place(place)] += seconds
    planned = planned_seconds(rehearsal)
    rows = [Beside(kind, planned[kind], rehearsed[kind]) for kind in COMPUTE_KINDS]
    return [*rows, Beside("all", sum(planned.values()), sum(row.rehearsed for row in rows))]


def planned_seconds(rehearsal: Rehearsal) -> dict[str, float]:
    """The plan's compute seconds of this stage's action list."""
    program = rehearsal.plan.program
    here = program.schedule.virtual_stages_of(rehearsal.stage)
    costs = [program.costs.virtual_stages[index] for index in here]
    count = program.schedule.num_microbatches
    return {
        "F": count * sum(p.seconds for cost in costs for p in cost.forward if p.stream is Stream.COMPUTE),
        "I": count
        * sum(p.seconds for cost in costs for p in cost.backward_input if p.stream is Stream.COMPUTE),
        "W": count * sum(cost.weight_grad_seconds for cost in costs),
    }


def wide_products(rehearsal: Rehearsal, least_flops: float = 1e9) -> list[tuple[str, Work, int]]:
    """Products of FP32 by FP32 of at least so many FLOPs each, with their launches."""
    found = []
    for (place, _), tallies in rehearsal.observer.work.items():
        for work, tally in tallies.items():
            if work.kind == "matmul" and work.dtype == torch.float32 and work.flops >= least_flops:
                found.append((place, work, tally.launches))
    return sorted(found, key=lambda row: -row[1].flops * row[2])


def flops_by_dtype(rehearsal: Rehearsal) -> dict[str, float]:
    """FLOPs of products and attention, by the type of their factors."""
    flops: dict[str, float] = collections.defaultdict(float)
    for tallies in rehearsal.observer.work.values():
        for work, tally in tallies.items():
            flops[str(work.dtype).removeprefix("torch.")] += tally.flops
    return {name: count for name, count in flops.items() if count}


def launches_by_kind(rehearsal: Rehearsal) -> Mapping[str, int]:
    """Kernels that torch launches, at least one an operation, by kind of action."""
    launches: collections.Counter[str] = collections.Counter()
    for (place, _), tallies in rehearsal.observer.work.items():
        launches[kind_of_place(place)] += sum(tally.launches for tally in tallies.values())
    return launches


def reserved(rehearsal: Rehearsal) -> dict[str, Reserved]:
    """The caching allocator's peaks over the whole step, with segments of its own and with
    expandable ones."""
    events = rehearsal.observer.memory_events
    return {"segments": replay(events, expandable=False), "expandable": replay(events, expandable=True)}


def costliest(rehearsal: Rehearsal) -> list[tuple[str, str, str, int, float]]:
    """(operation, place, stream, launches, seconds), the longest first."""
    machine = Machine(rehearsal.config.cluster, "bfloat16")
    rows: dict[tuple[str, str, str], list[float]] = {}
    for (place, stream), tallies in rehearsal.observer.work.items():
        for work, tally in tallies.items():
            row = rows.setdefault((work.title, place, stream), [0, 0.0])
            row[0] += tally.launches
            row[1] += seconds_of(work, tally.flops, tally.bytes, tally.launches, machine)
    table = [(*key, int(launches), seconds) for key, (launches, seconds) in rows.items()]
    return sorted(table, key=lambda row: -row[-1])
