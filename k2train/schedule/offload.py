"""Inserting OFFLOAD and RELOAD.

A slot is a forward, a backward or a pair. After each slot with a forward, what that forward saved
starts its way to host memory; `prefetch_depth` slots before its backward it starts its way back. In
K2's steady phase that is: while one pair runs, the previous pair's forward is copied out and the
next pair's backward is copied in, in the two directions of the bus at once.

Where the copy back would start in the slot right behind the copy out, or sooner, there is nothing
to gain: both are left out and the activations stay on the device. That happens at the end of the
chain, where backward follows forward. Source: Kimi K2 report, 2.4.3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from k2train.schedule.actions import COMPUTE, Action, Kind, Pair, Step, parts
from k2train.schedule.passes import has_backward
from k2train.schedule.program import Schedule


def insert_offload(schedule: Schedule, prefetch_depth: int = 1) -> Schedule:
    """Add OFFLOAD and RELOAD to a schedule that has neither, after `insert_p2p`.

    prefetch_depth: slots between a RELOAD and the backward that needs it, at least 1.
    """
    return replace(schedule, stages=tuple(_offload_line(line, prefetch_depth) for line in schedule.stages))


def peak_offloaded(line: Iterable[Step]) -> dict[int, int]:
    """How many microbatches of each virtual stage a stage's list has on the host at once, at most;
    without those of none."""
    now: Counter[int] = Counter()
    peak: dict[int, int] = {}
    for step in line:
        if isinstance(step, Action) and step.kind in (Kind.OFFLOAD, Kind.RELOAD):
            now[step.virtual_stage] += 1 if step.kind is Kind.OFFLOAD else -1
            peak[step.virtual_stage] = max(peak.get(step.virtual_stage, 0), now[step.virtual_stage])
    return peak


def _is_slot(step: Step) -> bool:
    return isinstance(step, Pair) or (step.kind in COMPUTE and step.kind is not Kind.W)


def _offload_line(line: tuple[Step, ...], prefetch_depth: int) -> tuple[Step, ...]:
    slots = [step for step in line if _is_slot(step)]
    forward_slot = {
        action[1:]: number
        for number, step in enumerate(slots)
        for action in parts(step)
        if action.kind is Kind.F
    }
    out: list[list[Action]] = [[] for _ in slots]
    back: list[list[Action]] = [[] for _ in slots]
    for number, step in enumerate(slots):
        if not has_backward(step):
            continue
        _, virtual_stage, microbatch = parts(step)[-1]
        start, stop = forward_slot[virtual_stage, microbatch], number - prefetch_depth
        if start + 1 < stop:
            out[start].append(Action(Kind.OFFLOAD, virtual_stage, microbatch))
            back[stop].append(Action(Kind.RELOAD, virtual_stage, microbatch))
    return _merged(line, out, back)


def _merged(line: tuple[Step, ...], out: list[list[Action]], back: list[list[Action]]) -> tuple[Step, ...]:
    """RELOADs right before their slot; OFFLOADs behind their slot's sends."""
    merged: list[Step] = []
    number = -1
    pending: list[Action] = []
    for step in line:
        if pending and not (isinstance(step, Action) and step.kind in (Kind.SEND_F, Kind.SEND_B)):
            merged += pending
            pending = []
        if _is_slot(step):
            number += 1
            merged += back[number]
            pending = out[number]
        merged.append(step)
    return (*merged, *pending)
