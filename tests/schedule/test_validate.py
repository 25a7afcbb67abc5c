"""The validator refuses every way to break a schedule, and says where."""

from __future__ import annotations

from dataclasses import replace

import pytest

from k2train.schedule import (
    Action,
    Kind,
    Schedule,
    ScheduleError,
    ScheduleSpec,
    build_schedule,
    compute_order,
    parse_schedule,
    parse_step,
    validate,
)


def _k2(**changes: int) -> Schedule:
    return build_schedule(ScheduleSpec.preset("k2", 2, 4, 2, **changes))


def _edit(schedule: Schedule, stage: int, edit: object) -> Schedule:
    lines = [list(line) for line in schedule.stages]
    edit(lines[stage])  # type: ignore[operator]
    return replace(schedule, stages=tuple(map(tuple, lines)))


def _move(text: str, before: str) -> object:
    def edit(line: list) -> None:
        step = parse_step(text)
        line.remove(step)
        line.insert(line.index(parse_step(before)), step)

    return edit


def test_the_report_counts_what_k2_holds() -> None:
    report = validate(build_schedule(ScheduleSpec.preset("k2", 16, 32, 2)))
    assert report.peak_in_flight[0] == 48
    assert report.num_warmup == tuple(47 - 2 * stage for stage in range(16))
    assert report.peak_weight_queue == (1,) * 16
    assert report.num_messages == 2 * 31 * 32
    plain = validate(build_schedule(ScheduleSpec.preset("interleaved_1f1b", 16, 32, 2)))
    assert plain.peak_in_flight[0] == 47


def test_pairs_without_extra_warmup_deadlock_and_the_error_names_the_cycle() -> None:
    spec = ScheduleSpec.preset("k2", 16, 32, 2, extra_warmup_microbatches=0)
    with pytest.raises(ScheduleError) as error:
        validate(build_schedule(spec))
    assert error.value.headline.startswith("deadlock: 16 of 16 stages")
    assert error.value.lines == (
        "stage 15 stands at F31.0+I31.0 and waits for F31.0, which runs in the same pair",
    )


def test_pairs_without_extra_warmup_deadlock_wherever_the_last_stage_pairs_anything() -> None:
    for pp in range(1, 6):
        for vpp in range(1, 4):
            for num_microbatches in range(max(2, pp), 11):
                spec = ScheduleSpec.preset("k2", pp, num_microbatches, vpp, extra_warmup_microbatches=0)
                with pytest.raises(ScheduleError, match="deadlock"):
                    validate(compute_order(spec))


_CROSSED = """\
schedule crossed
microbatches 2
placement 0 1
chain 0 1
stage 0: F0.0 SEND_F0.0 RECV_B0.0 B0.0 F0.1 SEND_F0.1 RECV_B0.1 B0.1
stage 1: RECV_F1.0 RECV_F1.1 F1.0 F1.1 B1.0 SEND_B1.0 B1.1 SEND_B1.1
"""


def test_a_cycle_through_two_stages_is_told_stage_by_stage() -> None:
    with pytest.raises(ScheduleError) as error:
        validate(parse_schedule(_CROSSED))
    assert error.value.lines == (
        "stage 0 stands at B0.0 and waits for SEND_B1.0, which stage 1 reaches only after F1.1",
        "stage 1 stands at F1.1 and waits for SEND_F0.1, which stage 0 reaches only after B0.0",
    )


def test_a_backward_before_its_forward_is_a_wait_for_oneself() -> None:
    schedule = _edit(compute_order(ScheduleSpec(1, 2)), 0, _move("B0.1", "F0.1"))
    with pytest.raises(
        ScheduleError, match=r"stands at B0\.1 and waits for F0\.1, which stands later in the same list"
    ):
        validate(schedule)


def test_receives_in_another_order_than_the_sends_are_refused() -> None:
    """With two stages the next and the previous one are one peer, so activations and gradients
    share a channel."""
    schedule = _k2()
    swapped = _edit(schedule, 0, _move("RECV_F2.1", "RECV_F2.0"))
    with pytest.raises(ScheduleError) as error:
        validate(swapped)
    assert error.value.headline.startswith("stage 1 to stage 0: message 0 is sent as one thing")
    assert any("RECV_F2.0" in line for line in error.value.lines)


def test_every_missing_action_is_named() -> None:
    schedule = _k2()
    for stage, line in enumerate(schedule.stages):
        for index, step in enumerate(line):
            broken = _edit(schedule, stage, lambda steps, index=index: steps.pop(index))
            with pytest.raises(ScheduleError) as error:
                validate(broken)
            named = step if isinstance(step, Action) else step.forward
            assert str(named) in str(error.value)


def test_every_doubled_action_is_named() -> None:
    schedule = _k2()
    for stage, line in enumerate(schedule.stages):
        for index, step in enumerate(line):
            broken = _edit(schedule, stage, lambda steps, index=index: steps.insert(index, steps[index]))
            named = step if isinstance(step, Action) else step.forward
            with pytest.raises(ScheduleError, match=rf"{named} stands more than once".replace("+", r"\+")):
                validate(broken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F1.0", "stage 0: F1.0 belongs to stage 1"),
        ("F4.0", "F4.0 names a virtual stage or microbatch that does not exist"),
        ("F0.4", "F0.4 names a virtual stage or microbatch that does not exist"),
    ],
)
def test_strange_actions_are_refused(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(_edit(_k2(), 0, lambda line: line.append(parse_step(text))))


def test_a_microbatch_on_the_other_chain_is_refused() -> None:
    schedule = build_schedule(ScheduleSpec.preset("dualpipe", 2, 4))
    with pytest.raises(ScheduleError, match=r"not needed: .*F3\.0"):
        validate(_edit(schedule, 0, lambda line: line.append(Action(Kind.F, 3, 0))))


@pytest.mark.parametrize(
    ("text", "before", "message"),
    [
        ("SEND_F0.0", "F0.0", "SEND_F0.0 comes too early"),
        ("W0.3", "I0.3", "W0.3 comes too early"),
        ("SEND_B2.0", "RELOAD2.0", "SEND_B2.0 comes too early"),
        ("OFFLOAD0.0", "F0.0", "OFFLOAD0.0 comes too early"),
        ("RELOAD0.0", "OFFLOAD0.0", "RELOAD0.0 comes too early"),
        ("RELOAD0.0", "W0.0", "I0.0 comes too early"),
        ("F2.0", "RECV_F2.0", "F2.0 comes too early"),
    ],
)
def test_actions_out_of_order_on_their_stage_are_refused(text: str, before: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(_edit(_k2(), 0, _move(text, before)))


def test_an_offload_behind_its_backward_is_refused() -> None:
    def late(line: list) -> None:
        for text in ("OFFLOAD0.0", "RELOAD0.0"):
            line.remove(parse_step(text))
            line.append(parse_step(text))

    with pytest.raises(ScheduleError, match=r"OFFLOAD0\.0 comes too late"):
        validate(_edit(_k2(), 0, late))


def test_a_virtual_stage_in_two_chains_is_refused() -> None:
    with pytest.raises(ScheduleError, match="exactly one chain"):
        validate(replace(_k2(), chains=((0, 1, 2, 3), (0,))))


def test_a_placement_without_a_stage_is_refused() -> None:
    with pytest.raises(ScheduleError, match="stages that do not exist"):
        validate(replace(_k2(), placement=(0, 1, 0, 7)))
