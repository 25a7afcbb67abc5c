"""What the action lists of a run, those of training and those of evaluation, ask of the channels
between its stages."""

from __future__ import annotations

from dataclasses import dataclass

from k2train.config.errors import ConfigError
from k2train.schedule.channels import ChannelForm, message_pairs
from k2train.schedule.deadlock import check_progress
from k2train.schedule.errors import ScheduleError
from k2train.schedule.forward import proved_forward
from k2train.schedule.program import Schedule
from k2train.schedule.validate import ScheduleReport, validate


@dataclass(frozen=True)
class Messages:
    """Made by `plan_messages`, once for all ranks."""

    schedules: tuple[Schedule, ...]
    """Training's lists, and evaluation's for a few groups of microbatches; longer evaluations
    repeat them."""
    pairs: tuple[tuple[int, int], ...]
    """The ordered pairs of stages (from, to) that exchange messages."""
    max_sends: tuple[int, ...]
    """For each stage, how many messages it may have under way to any one other stage.

    One more than the schedules need where all compute steps take equally long, so that a message
    may take a step to move. It does not grow with the number of microbatches: it is 2 for `gpipe`,
    `1f1b`, `zb_h1` and evaluation, and for `k2` and `interleaved_1f1b` at most two for each stage,
    because at most so many microbatches wait for a stage's next virtual stage.
    """


def plan_messages(schedule: Schedule, report: ScheduleReport | None = None) -> Messages:
    """For a training schedule with sends and receives. Raises ScheduleError where it cannot run.

    report: what `validate` said of the schedule; None proves it here. Evaluation's lists are proved
    here.
    """
    training = report or validate(schedule)
    evaluation, forwards = proved_forward(schedule, 3 * schedule.num_stages + 1)
    peaks = zip(training.peak_sends, forwards.peak_sends, strict=True)
    return Messages((schedule, evaluation), message_pairs(schedule), tuple(max(peak) + 1 for peak in peaks))


def check_channels(messages: Messages, form: ChannelForm) -> None:
    """Raise ConfigError, with the cycle of waits, where a world provides less than the schedules
    need."""
    if form is ChannelForm.ORDERED_PAIR:
        return  # what `validate` has proved
    for schedule in messages.schedules:
        try:
            check_progress(schedule, form=form)
        except ScheduleError as error:
            raise ConfigError(
                "schedule.kind",
                schedule.name,
                f"cannot run with {form}, which is what this world provides: {error}",
                f"use a world with {ChannelForm.ORDERED_PAIR}",
            ) from error
