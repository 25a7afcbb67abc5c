"""Orders against torch.distributed.pipelining, which nobody here wrote.

Only torch's computed lists are read; no process group is made. torch pads its lists with empty
slots, which are left out, and numbers virtual stages as we do. Where an order differs, makespan and
in-flight memory under our simulator are compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from k2train.schedule import (
    Action,
    Kind,
    Pair,
    Schedule,
    ScheduleSpec,
    Step,
    build_schedule,
    compute_order,
    simulate,
    uniform_costs,
    validate,
)
from k2train.schedule.p2p import insert_p2p

torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

_KINDS = {"FORWARD": Kind.F, "FULL_BACKWARD": Kind.B, "BACKWARD_INPUT": Kind.I, "BACKWARD_WEIGHT": Kind.W}


def _torch_order(cls: Any, pp: int, vpp: int, num_microbatches: int) -> list[list[Step]]:
    """The list of every rank as torch computes it, from an object that never met a device."""
    order = []
    for rank in range(pp):
        schedule = cls.__new__(cls)
        rounds = max(1, num_microbatches // pp)
        vars(schedule).update(
            pp_group_size=pp,
            n_local_stages=vpp,
            rank=rank,
            number_of_rounds=rounds,
            microbatches_per_round=num_microbatches // rounds,
            _n_microbatches=num_microbatches,
            _num_stages=pp * vpp,
            num_stages=pp * vpp,
        )
        if hasattr(cls, "_calculate_single_rank_operations"):
            actions = schedule._calculate_single_rank_operations(rank)
        else:
            actions = schedule._get_pipeline_order()[rank]
        order.append([step for action in actions if action is not None for step in _converted(action)])
    return order


def _single(action: Any) -> Action:
    """What one half of a pair converts to."""
    (step,) = _converted(action)
    assert isinstance(step, Action)
    return step


def _converted(action: Any) -> list[Step]:
    if action.sub_actions:
        forward, backward = (_single(sub) for sub in action.sub_actions)
        return [Pair(forward, backward._replace(kind=Kind.I)), backward._replace(kind=Kind.W)]
    kind = _KINDS.get(action.computation_type.name)
    return [] if kind is None else [Action(kind, action.stage_index, action.microbatch_index)]


def _ours(kind: str, pp: int, vpp: int, num_microbatches: int, **switches: bool) -> Schedule:
    return compute_order(ScheduleSpec.preset(kind, pp, num_microbatches, vpp, **switches))


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
def test_gpipe_and_1f1b_are_torchs(pp: int) -> None:
    """torch 2.13 lists the last stage's 1F1B forwards one microbatch too high (it counts up before
    the first), so on that stage the kinds are compared; its own run does not use that list."""
    for num_microbatches in (pp, pp + 1, 2 * pp + 1, 4 * pp):
        gpipe = _torch_order(torch_schedules.ScheduleGPipe, pp, 1, num_microbatches)
        assert [list(line) for line in _ours("gpipe", pp, 1, num_microbatches).stages] == gpipe
        one = _torch_order(torch_schedules.Schedule1F1B, pp, 1, num_microbatches)
        *ours, last = map(list, _ours("1f1b", pp, 1, num_microbatches).stages)
        assert ours == one[:-1]
        kinds = [[s.kind if isinstance(s, Action) else s for s in line] for line in (last, one[-1])]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("vpp", [2, 3])
def test_interleaved_1f1b_is_torchs_wherever_torch_has_one(pp: int, vpp: int) -> None:
    compared = 0
    for num_microbatches in range(pp, 4 * pp + 1):
        if num_microbatches % (num_microbatches // pp):
            continue  # torch refuses these
        torchs = _torch_order(torch_schedules.ScheduleInterleaved1F1B, pp, vpp, num_microbatches)
        ours = _ours("interleaved_1f1b", pp, vpp, num_microbatches)
        assert [list(line) for line in ours.stages] == torchs
        compared += 1
    assert compared > pp


def test_with_fewer_microbatches_than_stages_ours_is_no_slower_and_holds_at_most_one_chunk_more() -> None:
    for pp in (3, 4, 8):
        for vpp in (2, 3):
            for num_microbatches in range(1, pp):
                ours = _ours("interleaved_1f1b", pp, vpp, num_microbatches)
                lines = _torch_order(torch_schedules.ScheduleInterleaved1F1B, pp, vpp, num_microbatches)
                torchs = replace(ours, stages=tuple(map(tuple, lines)))
                assert _makespan(ours) <= _makespan(torchs)
                assert max(validate(ours).peak_in_flight) <= max(validate(torchs).peak_in_flight) + 1


def _makespan(schedule: Schedule) -> float:
    return simulate(
        insert_p2p(schedule), uniform_costs(schedule.num_virtual_stages, 1, 1, 1)
    ).makespan_seconds


@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
def test_dualpipe_v_is_torchs(pp: int) -> None:
    """torch runs a pair's full backward; ours is its input gradient and, right behind the pair, its
    weight gradient."""
    for num_microbatches in (2 * pp, 2 * pp + 1, 4 * pp):
        torchs = _torch_order(torch_schedules.ScheduleDualPipeV, pp, 2, num_microbatches)
        assert [list(line) for line in _ours("dualpipe_v", pp, 1, num_microbatches).stages] == torchs


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_zb_h1_takes_the_time_of_torchs_zero_bubble_and_no_more_memory(pp: int) -> None:
    """torch's zero-bubble order with one virtual stage warms up by two microbatches a stage, ZB-H1
    by one."""
    for num_microbatches in (2 * pp, 3 * pp):
        ours = _ours("zb_h1", pp, 1, num_microbatches)
        lines = _torch_order(torch_schedules.ScheduleInterleavedZeroBubble, pp, 1, num_microbatches)
        torchs = replace(ours, stages=tuple(map(tuple, lines)))
        assert _makespan(ours) == _makespan(torchs)
        assert max(validate(ours).peak_in_flight) <= max(validate(torchs).peak_in_flight)


def test_k2_beats_torchs_interleaved_zero_bubble_in_weight_queue_at_its_price_in_time() -> None:
    """K2 runs each weight gradient in its own slot, so one is queued where zero-bubble queues up to
    pp; the bubble it leaves is larger by (pp - 1)(W - max(0, I - W))."""
    pp, vpp, num_microbatches = 8, 2, 24
    ours = build_schedule(ScheduleSpec.preset("k2", pp, num_microbatches, vpp, offload=False))
    lines = _torch_order(torch_schedules.ScheduleInterleavedZeroBubble, pp, vpp, num_microbatches)
    torchs = insert_p2p(
        replace(
            compute_order(ScheduleSpec.preset("k2", pp, num_microbatches, vpp)),
            stages=tuple(map(tuple, lines)),
        )
    )
    costs = uniform_costs(pp * vpp, 1, 1, 1)
    assert max(validate(ours).peak_weight_queue) == 1
    assert max(validate(torchs).peak_weight_queue) == pp
    difference = simulate(ours, costs).makespan_seconds - simulate(torchs, costs).makespan_seconds
    assert difference == pp - 1
