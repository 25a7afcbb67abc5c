"""Evaluation's action lists: forwards only, with their messages, built and proved."""

from __future__ import annotations

from dataclasses import replace

from k2train.schedule.actions import Action, Kind
from k2train.schedule.p2p import receive_of, sends_of
from k2train.schedule.program import Schedule
from k2train.schedule.validate import ScheduleReport, validate


def proved_forward(schedule: Schedule, num_microbatches: int) -> tuple[Schedule, ScheduleReport]:
    """`forward_only` and its proof. Raises ScheduleError where the lists cannot run."""
    lists = forward_only(schedule, num_microbatches)
    return lists, validate(lists, backward=False)


def forward_only(schedule: Schedule, num_microbatches: int) -> Schedule:
    """The forwards of `num_microbatches` microbatches on the virtual stages of a schedule with one
    chain.

    pp microbatches at a time go through the first virtual stage of every stage, then through the
    second, and so on: with that many under way no stage waits for the one behind it, and two stages
    exchange messages in one order.
    """
    assert len(schedule.chains) == 1, "the microbatches of two chains are numbered by their total"
    lines = tuple(_line(schedule, stage, num_microbatches) for stage in range(schedule.num_stages))
    return replace(
        schedule, name=f"{schedule.name}, forward only", num_microbatches=num_microbatches, stages=lines
    )


def _line(schedule: Schedule, stage: int, num_microbatches: int) -> tuple[Action, ...]:
    pp = schedule.num_stages
    actions: list[Action] = []
    for first in range(0, num_microbatches, pp):
        for virtual_stage in schedule.virtual_stages_of(stage):
            for microbatch in range(first, min(first + pp, num_microbatches)):
                forward = Action(Kind.F, virtual_stage, microbatch)
                with_messages = (receive_of(schedule, forward), forward, sends_of(schedule, forward))
                actions += [action for action in with_messages if action is not None]
    return tuple(actions)
