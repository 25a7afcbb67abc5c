"""The validator's first check: every action is where it belongs and none is missing or doubled.

Actions of one kind are a table of flags, one cell for each (virtual stage, microbatch), so that
half a million actions are compared with what a step needs in a few array operations.
"""

from __future__ import annotations

import numpy as np

from k2train.schedule.actions import MESSAGES, Action, Kind, Pair, Step
from k2train.schedule.errors import ScheduleError
from k2train.schedule.p2p import receive_of, sends_of
from k2train.schedule.program import Schedule

_SHOWN = 4
"""Actions an error lists before it says how many more there are."""

_FORWARD = (Kind.F, Kind.SEND_F, Kind.RECV_F)

_Table = dict[Kind, np.ndarray]
"""Flags by kind, each (virtual stages, microbatches)."""


def check_complete(schedule: Schedule, backward: bool = True) -> bool:
    """Raise ScheduleError unless the actions are exactly those the step needs. Returns whether it
    has messages.

    backward: False for evaluation's lists, which need forwards and their messages and nothing else.
    """
    _check_frame(schedule)
    seen = _collect(schedule)
    has_messages = any(seen[kind].any() for kind in MESSAGES)
    needed = _needed(schedule, seen, has_messages)
    if not backward:
        nothing = np.zeros_like(needed[Kind.F])
        needed = {kind: flags if kind in _FORWARD else nothing for kind, flags in needed.items()}
    missing, surplus = _difference(needed, seen), _difference(seen, needed)
    lines = [f"missing: {_listed(missing)}"] if missing else []
    lines += [f"not needed: {_listed(surplus)}"] if surplus else []
    if lines:
        raise ScheduleError("the actions are not those a step needs", lines)
    return has_messages


def _check_frame(schedule: Schedule) -> None:
    on_chains = sorted(vs for chain in schedule.chains for vs in chain)
    if on_chains != list(range(schedule.num_virtual_stages)):
        raise ScheduleError("every virtual stage must be in exactly one chain", [f"chains {schedule.chains}"])
    homeless = [vs for vs, stage in enumerate(schedule.placement) if not 0 <= stage < schedule.num_stages]
    if homeless:
        raise ScheduleError("virtual stages placed on stages that do not exist", [str(homeless)])
    if schedule.num_microbatches < 1:
        raise ScheduleError(f"{schedule.num_microbatches} microbatches make no step")


def _collect(schedule: Schedule) -> _Table:
    """Flags of all actions; raises where one is out of place or stands twice."""
    width, height = schedule.num_microbatches, schedule.num_virtual_stages
    flags = {kind: bytearray(width * height) for kind in Kind}
    for stage, line in enumerate(schedule.stages):
        here = [where == stage for where in schedule.placement]
        for step in line:
            for kind, virtual_stage, microbatch in _checked_parts(stage, step):
                if not (0 <= virtual_stage < height and 0 <= microbatch < width and here[virtual_stage]):
                    raise _misplaced(schedule, stage, Action(kind, virtual_stage, microbatch))
                cell = virtual_stage * width + microbatch
                if flags[kind][cell]:
                    raise ScheduleError(f"{Action(kind, virtual_stage, microbatch)} stands more than once")
                flags[kind][cell] = 1
    return {kind: np.frombuffer(table, dtype=bool).reshape(height, width) for kind, table in flags.items()}


def _checked_parts(stage: int, step: Step) -> tuple[Action, ...]:
    if not isinstance(step, Pair):
        return (step,)
    if step.forward.kind is not Kind.F or step.backward_input.kind is not Kind.I:
        raise ScheduleError(f"stage {stage}: {step} is not a pair of F and I")
    return step


def _misplaced(schedule: Schedule, stage: int, action: Action) -> ScheduleError:
    _, virtual_stage, microbatch = action
    if 0 <= virtual_stage < schedule.num_virtual_stages and 0 <= microbatch < schedule.num_microbatches:
        return ScheduleError(f"stage {stage}: {action} belongs to stage {schedule.placement[virtual_stage]}")
    return ScheduleError(f"stage {stage}: {action} names a virtual stage or microbatch that does not exist")


def _needed(schedule: Schedule, seen: _Table, has_messages: bool) -> _Table:
    """What must be there, given which backwards are whole and which are split, and what is
    offloaded."""
    passes = np.zeros((schedule.num_virtual_stages, schedule.num_microbatches), dtype=bool)
    for index, chain in enumerate(schedule.chains):
        run = schedule.microbatches_of(index)
        passes[list(chain), run.start : run.stop] = True
    split = passes & ~seen[Kind.B]
    copied = passes & (seen[Kind.OFFLOAD] | seen[Kind.RELOAD])
    nothing = np.zeros_like(passes)
    table = dict.fromkeys(Kind, nothing) | {
        Kind.F: passes,
        Kind.B: passes & seen[Kind.B],
        Kind.I: split,
        Kind.W: split,
        Kind.OFFLOAD: copied,
        Kind.RELOAD: copied,
    }
    if has_messages:
        for kind in MESSAGES:
            rows = [_has_message(schedule, kind, vs) for vs in range(schedule.num_virtual_stages)]
            table[kind] = passes & np.array(rows, dtype=bool)[:, None]
    return table


def _has_message(schedule: Schedule, kind: Kind, virtual_stage: int) -> bool:
    compute = Action(Kind.F if kind in (Kind.SEND_F, Kind.RECV_F) else Kind.B, virtual_stage, 0)
    message = (
        sends_of(schedule, compute) if kind in (Kind.SEND_F, Kind.SEND_B) else receive_of(schedule, compute)
    )
    return message is not None


def _difference(left: _Table, right: _Table) -> list[Action]:
    return [
        Action(kind, int(virtual_stage), int(microbatch))
        for kind in Kind
        for virtual_stage, microbatch in zip(*np.nonzero(left[kind] & ~right[kind]), strict=True)
    ]


def _listed(actions: list[Action]) -> str:
    shown = ", ".join(map(str, actions[:_SHOWN]))
    more = len(actions) - _SHOWN
    return shown + (f" and {more} more" if more > 0 else "")
