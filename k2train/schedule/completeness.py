"""The validator's first check: every action is where it belongs and none is missing or doubled."""

from __future__ import annotations

from collections import Counter

from k2train.schedule.actions import MESSAGES, Action, Kind, Pair, parts
from k2train.schedule.errors import ScheduleError
from k2train.schedule.p2p import receive_of, sends_of
from k2train.schedule.program import Schedule

_SHOWN = 4
"""Actions an error lists before it says how many more there are."""


def check_complete(schedule: Schedule) -> bool:
    """Raise ScheduleError unless the actions are exactly those the step needs. Returns whether it has messages."""
    _check_frame(schedule)
    counts: Counter[Action] = Counter()
    for stage, line in enumerate(schedule.stages):
        for step in line:
            if isinstance(step, Pair) and (
                step.forward.kind is not Kind.F or step.backward_input.kind is not Kind.I
            ):
                raise ScheduleError(f"stage {stage}: {step} is not a pair of F and I")
            for action in parts(step):
                _check_place(schedule, stage, action)
                counts[action] += 1
    repeated = [action for action, count in counts.items() if count > 1]
    if repeated:
        raise ScheduleError("actions that stand more than once", [_listed(repeated)])
    has_messages = bool(schedule.kinds & MESSAGES)
    _check_needed(schedule, counts, has_messages)
    return has_messages


def _check_frame(schedule: Schedule) -> None:
    on_chains = sorted(vs for chain in schedule.chains for vs in chain)
    if on_chains != list(range(schedule.num_virtual_stages)):
        raise ScheduleError("every virtual stage must be in exactly one chain", [f"chains {schedule.chains}"])
    homeless = [vs for vs, stage in enumerate(schedule.placement) if not 0 <= stage < schedule.num_stages]
    if homeless:
        raise ScheduleError("virtual stages placed on stages that do not exist", [str(homeless)])


def _check_place(schedule: Schedule, stage: int, action: Action) -> None:
    _, virtual_stage, microbatch = action
    if (
        not 0 <= virtual_stage < schedule.num_virtual_stages
        or not 0 <= microbatch < schedule.num_microbatches
    ):
        raise ScheduleError(
            f"stage {stage}: {action} names a virtual stage or microbatch that does not exist"
        )
    if schedule.placement[virtual_stage] != stage:
        raise ScheduleError(f"stage {stage}: {action} belongs to stage {schedule.placement[virtual_stage]}")
    if virtual_stage not in schedule.chains[schedule.chain_of(microbatch)]:
        raise ScheduleError(
            f"stage {stage}: microbatch {microbatch} does not pass virtual stage {virtual_stage}"
        )


def _check_needed(schedule: Schedule, counts: Counter[Action], has_messages: bool) -> None:
    """What every chunk needs, against what is there."""
    missing: list[Action] = []
    surplus = dict.fromkeys(action for action in counts if action.kind not in (Kind.OFFLOAD, Kind.RELOAD))
    for chain_index, chain in enumerate(schedule.chains):
        for virtual_stage in chain:
            for microbatch in schedule.microbatches_of(chain_index):
                for action in _needed(schedule, counts, virtual_stage, microbatch, has_messages):
                    if action in surplus:
                        del surplus[action]
                    else:
                        missing.append(action)
    for action in counts:
        partner = (
            Kind.RELOAD
            if action.kind is Kind.OFFLOAD
            else Kind.OFFLOAD
            if action.kind is Kind.RELOAD
            else None
        )
        if partner is not None and action._replace(kind=partner) not in counts:
            missing.append(action._replace(kind=partner))
    lines = [f"missing: {_listed(missing)}"] if missing else []
    lines += [f"not needed: {_listed(list(surplus))}"] if surplus else []
    if lines:
        raise ScheduleError("the actions are not those a step needs", lines)


def _needed(
    schedule: Schedule, counts: Counter[Action], virtual_stage: int, microbatch: int, has_messages: bool
) -> list[Action]:
    forward = Action(Kind.F, virtual_stage, microbatch)
    full = Action(Kind.B, virtual_stage, microbatch)
    split = [Action(Kind.I, virtual_stage, microbatch), Action(Kind.W, virtual_stage, microbatch)]
    needed = [forward, full] if full in counts else [forward, *split]
    if has_messages:
        for action in (forward, full):
            needed += [m for m in (receive_of(schedule, action), sends_of(schedule, action)) if m is not None]
    return needed


def _listed(actions: list[Action]) -> str:
    shown = ", ".join(map(str, actions[:_SHOWN]))
    more = len(actions) - _SHOWN
    return shown + (f" and {more} more" if more > 0 else "")
