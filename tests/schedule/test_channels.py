"""Which schedules complete under which form of channels, and how the cycle is told where one does
not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import pytest

from k2train.config.errors import ConfigError
from k2train.schedule import (
    Schedule,
    ScheduleError,
    ScheduleSpec,
    build_schedule,
    parse_schedule,
    validate,
)
from k2train.schedule.channels import ChannelForm, check_order, message_pairs
from k2train.schedule.deadlock import check_progress
from k2train.schedule.forward import forward_only
from k2train.schedule.messages import check_channels, plan_messages
from k2train.schedule.spec import INTERLEAVED

TRAINED = ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "k2")
FEW = (2, 3, 4, 5)
# Runs of one test from minutes to a quarter of an hour, so they are marked slow.
ALL = range(2, 17)


def microbatches(pp: int) -> list[int]:
    """Below, at and just above the stages, whole groups of as many, one more and one fewer, and the
    most."""
    return sorted({1, 2, 3, pp - 1, pp, pp + 1, 2 * pp - 1, 2 * pp, 2 * pp + 1, 64} - {0})


def schedules(kind: str, stages: Iterable[int]) -> Iterator[Schedule]:
    for pp in stages:
        for vpp in range(1, 5) if kind in INTERLEAVED else (1,):
            for count in microbatches(pp):
                yield build_schedule(ScheduleSpec.preset(kind, pp, count, vpp))


def completes(schedule: Schedule, form: ChannelForm, max_sends: int | None = None) -> bool:
    try:
        check_progress(schedule, form=form, max_sends=max_sends)
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize("stages", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("kind", TRAINED)
def test_every_trained_schedule_completes_over_ordered_pairs(kind: str, stages: Iterable[int]) -> None:
    """Also where a SEND waits as soon as as many messages are under way to one stage as the run
    itself had at once, and that number depends on the pipeline alone: at most two a stage, and one
    but for interleaved orders."""
    for schedule in schedules(kind, stages):
        most = max(check_progress(schedule))
        assert completes(schedule, ChannelForm.ORDERED_PAIR, max_sends=most)
        assert most < 2 * schedule.num_stages
        assert kind in INTERLEAVED or most == 1


@pytest.mark.parametrize("vpp", [1, 2, 4])
@pytest.mark.parametrize("pp", [2, 3, 5])
@pytest.mark.parametrize("kind", INTERLEAVED)
def test_how_many_messages_are_under_way_does_not_grow_with_the_microbatches(
    kind: str, pp: int, vpp: int
) -> None:
    peaks = {
        check_progress(build_schedule(ScheduleSpec.preset(kind, pp, count * pp, vpp))) for count in (4, 8, 16)
    }
    assert len(peaks) == 1


def test_k2s_step_has_one_message_under_way_to_each_stage() -> None:
    for num_microbatches in (64, 128):
        schedule = build_schedule(ScheduleSpec.preset("k2", 16, num_microbatches, 2))
        assert validate(schedule).peak_sends == (1,) * 16


@pytest.mark.parametrize("form", [ChannelForm.UNORDERED_PAIR, ChannelForm.ONE])
@pytest.mark.parametrize("kind", ["gpipe", "1f1b", "zb_h1"])
def test_with_one_virtual_stage_both_weaker_forms_stand_still_at_every_size(
    kind: str, form: ChannelForm
) -> None:
    """A stage posts the receive of a gradient before its last forwards are sent, and both share a
    queue."""
    for schedule in schedules(kind, (2, 3, 5, 16)):
        assert not completes(schedule, form)


@pytest.mark.parametrize("stages", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("form", [ChannelForm.UNORDERED_PAIR, ChannelForm.ONE])
def test_k2_stands_still_in_both_weaker_forms_but_for_one_tiny_size(
    form: ChannelForm, stages: Iterable[int]
) -> None:
    complete = [
        (schedule.num_stages, schedule.num_virtual_stages, schedule.num_microbatches)
        for schedule in schedules("k2", stages)
        if completes(schedule, form)
    ]
    assert complete == [(2, 2, 3)]


def test_interleaved_1f1b_needs_ordered_pairs_at_some_sizes_only() -> None:
    """With whole groups of an even number of stages from four up, and more than one group, both
    directions happen to agree on their order; with one virtual stage they never do."""
    form = ChannelForm.UNORDERED_PAIR
    for pp in (4, 8):
        for count in (2 * pp, 64):
            assert completes(build_schedule(ScheduleSpec(pp, count, vpp=2)), form)
        assert not completes(build_schedule(ScheduleSpec(pp, pp, vpp=2)), form)
        assert not completes(build_schedule(ScheduleSpec(pp, 64, vpp=1)), form)


@pytest.mark.parametrize("pp", ALL)
def test_evaluations_forwards_complete_over_ordered_pairs_with_one_message_under_way(pp: int) -> None:
    for vpp in (1, 2, 4):
        training = build_schedule(ScheduleSpec.preset("k2", pp, 2, vpp))
        for count in microbatches(pp):
            schedule = forward_only(training, count)
            check_order(schedule)
            assert max(check_progress(schedule, max_sends=1)) == 1


def test_evaluations_forwards_share_a_queue_with_what_comes_round_where_two_stages_are_both_neighbours() -> (
    None
):
    """Of two stages each is the other's next and previous one, so two directions meet there and
    nowhere else."""
    for pp in range(2, 9):
        schedule = forward_only(build_schedule(ScheduleSpec.preset("k2", pp, 2, 2)), 2 * pp)
        assert completes(schedule, ChannelForm.UNORDERED_PAIR) == (pp > 2)
        assert not completes(schedule, ChannelForm.ONE)


_BOTH_WAYS = """\
schedule both_ways
microbatches 1
placement 0 1
chain 0 1
stage 0: F0.0 RECV_B0.0 SEND_F0.0 B0.0
stage 1: RECV_F1.0 F1.0 B1.0 SEND_B1.0
"""


def test_a_receive_ahead_of_a_send_in_one_queue_is_told_as_a_cycle() -> None:
    schedule = parse_schedule(_BOTH_WAYS)
    validate(schedule)
    with pytest.raises(ScheduleError) as error:
        validate(schedule, ChannelForm.UNORDERED_PAIR)
    assert error.value.lines == (
        "stage 1 stands at F1.0 and waits for SEND_F0.0, which on stage 0 is behind RECV_B0.0 in the channel of "
        "stages 0 and 1",
        "RECV_B0.0 of stage 0 waits for SEND_B1.0, which stage 1 reaches only after F1.0",
    )


def test_k2s_cycle_without_ordered_pairs_leads_from_action_to_action_and_back() -> None:
    with pytest.raises(ScheduleError) as error:
        validate(build_schedule(ScheduleSpec.preset("k2", 16, 64, 2)), ChannelForm.UNORDERED_PAIR)
    assert error.value.headline.startswith("deadlock: 16 of 16 stages")
    for line in error.value.lines:
        assert re.search(r"stage \d+", line)
        assert re.search(r"waits for (SEND|RECV)_[FB]\d+\.\d+, which", line)
    assert any("is behind" in line for line in error.value.lines)


def test_a_send_that_waits_for_an_older_one_is_named() -> None:
    schedule = build_schedule(ScheduleSpec.preset("k2", 2, 8, 2))
    with pytest.raises(ScheduleError) as error:
        check_progress(schedule, max_sends=1)
    assert error.value.lines[0] == (
        "stage 0 stands at SEND_B2.0 and waits until SEND_F0.3 has left, which waits for RECV_F1.3, "
        "which stage 1 reaches only after SEND_B3.1"
    )


def test_neighbours_exchange_messages_in_both_directions_and_nobody_else() -> None:
    ring = {(stage, (stage + 1) % 5) for stage in range(5)}
    both = ring | {(target, source) for source, target in ring}
    assert set(message_pairs(build_schedule(ScheduleSpec.preset("k2", 5, 8, 2)))) == both
    line = {pair for pair in both if set(pair) != {0, 4}}
    assert set(message_pairs(build_schedule(ScheduleSpec.preset("1f1b", 5, 8)))) == line
    assert message_pairs(build_schedule(ScheduleSpec.preset("k2", 1, 8, 2))) == ()


def test_a_world_that_provides_too_little_is_refused_with_the_cycle_and_what_to_do() -> None:
    messages = plan_messages(build_schedule(ScheduleSpec.preset("k2", 4, 8, 2)))
    assert messages.max_sends == (2,) * 4
    check_channels(messages, ChannelForm.ORDERED_PAIR)
    for form in (ChannelForm.UNORDERED_PAIR, ChannelForm.ONE):
        with pytest.raises(ConfigError) as error:
            check_channels(messages, form)
        assert error.value.field == "schedule.kind"
        assert f"cannot run with {form}" in error.value.rule
        assert "deadlock: 4 of 4 stages stand still" in error.value.rule
        assert re.search(
            r"(SEND|RECV)_F\d+\.\d of stage \d waits for .*, which on stage 3 is behind", error.value.rule
        )
        assert str(ChannelForm.ORDERED_PAIR) in error.value.remedy
