"""The simulator against formulas, against an independent longest path, and against arithmetic one
can do by hand."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest

from k2train.schedule import (
    Action,
    Costs,
    Kind,
    Pair,
    Phase,
    Schedule,
    ScheduleError,
    ScheduleSpec,
    Stream,
    VirtualStageCosts,
    build_schedule,
    compute_order,
    simulate,
    uniform_costs,
    without,
)
from k2train.schedule.actions import parts
from k2train.schedule.formulas import bubble_seconds, work_seconds
from k2train.schedule.p2p import received_as

Specs = Callable[..., Iterator[ScheduleSpec]]
MakeCosts = Callable[..., Costs]


def _makespan(spec: ScheduleSpec, costs: Costs) -> float:
    return simulate(build_schedule(spec), costs).makespan_seconds


@pytest.mark.parametrize("kind", ["interleaved_1f1b", "k2"])
def test_the_makespan_of_the_published_example_is_237(kind: str) -> None:
    """F = 1, B = 2, no communication, 16 stages x 2, 32 microbatches: 192 of work and a bubble of
    45."""
    simulation = simulate(build_schedule(ScheduleSpec.preset(kind, 16, 32, 2)), uniform_costs(32, 1, 2, 0))
    assert simulation.makespan_seconds == 237
    assert [stage.busy_seconds for stage in simulation.stages] == [192] * 16
    assert [stage.bubble_seconds for stage in simulation.stages] == [45] * 16


@pytest.mark.parametrize(
    ("kind", "switches"),
    [
        ("gpipe", {}),
        ("gpipe", {"split_weight_grad": True}),
        ("1f1b", {}),
        ("1f1b", {"split_weight_grad": True}),
        ("interleaved_1f1b", {}),
        ("interleaved_1f1b", {"split_weight_grad": True}),
        ("interleaved_1f1b", {"extra_warmup_microbatches": 1}),
        ("k2", {}),
        ("zb_h1", {}),
        ("dualpipe", {}),
        ("dualpipe_v", {}),
    ],
)
def test_makespans_are_those_of_the_closed_formulas(kind: str, switches: dict, specs: Specs) -> None:
    """pp to 8, vpp to 4, microbatches a multiple of pp and not. Binary fractions, so that sums are
    exact."""
    checked = 0
    for spec in specs(kind, range(1, 25, 5), **switches):
        split = spec.split_weight_grad or kind == "zb_h1"
        if (split and spec.num_microbatches < spec.pp) or (spec.vpp > 2 and spec.pp % 3):
            continue
        seconds = [(1, 1, 1), (1.5, 1.5, 0.5)] if "dual" in kind else [(1, 1, 1), (1, 2, 1), (2, 3.5, 1.25)]
        for forward, backward_input, weight_grad in seconds[: 1 if spec.vpp > 2 else None]:
            schedule = build_schedule(spec)
            costs = uniform_costs(schedule.num_virtual_stages, forward, backward_input, weight_grad)
            expected = work_seconds(spec, forward, backward_input, weight_grad)
            expected += bubble_seconds(spec, forward, backward_input, weight_grad)
            assert simulate(schedule, costs).makespan_seconds == expected, (
                spec,
                forward,
                backward_input,
                weight_grad,
            )
            checked += 1
    assert checked > 4


def test_interleaved_makespans_equal_the_formula_for_multiples_of_pp() -> None:
    """vpp M (F + B) + (pp - 1)(F + B), paired or not, up to 16 stages (Narayanan et al.; K2 report,
    2.4.2)."""
    for kind in ("interleaved_1f1b", "k2"):
        for pp in (1, 2, 4, 7, 16):
            for vpp in (2, 3):
                for rounds in (1, 3):
                    microbatches = rounds * pp
                    found = _makespan(
                        ScheduleSpec.preset(kind, pp, microbatches, vpp), uniform_costs(pp * vpp, 1, 2, 0)
                    )
                    assert found == 3 * (vpp * microbatches + pp - 1)


def _random_costs(num_virtual_stages: int, seed: int) -> Costs:
    draw = random.Random(seed)

    def one() -> VirtualStageCosts:
        seconds = [draw.randint(1, 9) for _ in range(3)]
        return VirtualStageCosts(
            (Phase("f", Stream.COMPUTE, seconds[0]),),
            (Phase("b", Stream.COMPUTE, seconds[1]),),
            seconds[2],
            send_forward_seconds=draw.randint(0, 4),
            send_backward_seconds=draw.randint(0, 4),
        )

    return Costs(tuple(one() for _ in range(num_virtual_stages)))


def _longest_path(schedule: Schedule, costs: Costs) -> float:
    """The makespan as a longest path: a graph of compute actions and messages, no streams and no
    clock."""
    after: dict[object, list[object]] = defaultdict(list)
    seconds: dict[object, float] = {}
    for stage, line in enumerate(schedule.stages):
        before: object = None
        channel: dict[int, Action] = {}
        for step in line:
            for action in parts(step):
                one = costs.virtual_stages[action.virtual_stage]
                if action.kind in (Kind.SEND_F, Kind.SEND_B):
                    compute = _producer(action, line)
                    receive = received_as(schedule, action)
                    forward = action.kind is Kind.SEND_F
                    seconds[receive] = one.send_forward_seconds if forward else one.send_backward_seconds
                    to = schedule.placement[receive.virtual_stage]
                    after[receive] += [compute, *([channel[to]] if to in channel else [])]
                    channel[to] = receive
                elif action.kind in (Kind.RECV_F, Kind.RECV_B):
                    after[action] += [before] if before else []
                else:
                    seconds[action] = {
                        Kind.F: one.forward[0].seconds,
                        Kind.I: one.backward_input[0].seconds,
                        Kind.W: one.weight_grad_seconds,
                        Kind.B: one.backward_input[0].seconds + one.weight_grad_seconds,
                    }[action.kind]
                    after[action] += [before] if before else []
                    inputs = [need for part in parts(step) for need in _inputs(schedule, stage, part)]
                    after[action] += [need for need in inputs if need not in parts(step)]
                    before = action
    return max(_finish_times(after, seconds).values())


def _producer(send: Action, line: tuple) -> Action:
    kinds = (Kind.F,) if send.kind is Kind.SEND_F else (Kind.I, Kind.B)
    return next(a for step in line for a in parts(step) if a.kind in kinds and a[1:] == send[1:])


def _inputs(schedule: Schedule, stage: int, action: Action) -> list[Action]:
    kind, virtual_stage, _ = action
    if kind is Kind.W:
        return [action._replace(kind=Kind.I)]
    source = (schedule.previous if kind is Kind.F else schedule.next)[virtual_stage]
    if source is None:
        return [] if kind is Kind.F else [action._replace(kind=Kind.F)]
    if schedule.placement[source] != stage:
        return [action._replace(kind=Kind.RECV_F if kind is Kind.F else Kind.RECV_B)]
    done = [a for step in schedule.stages[stage] for a in parts(step) if a.virtual_stage == source]
    kinds = (Kind.F,) if kind is Kind.F else (Kind.I, Kind.B)
    return [a for a in done if a.kind in kinds and a.microbatch == action.microbatch]


def _finish_times(after: dict[object, list[object]], seconds: dict[object, float]) -> dict[object, float]:
    followers: dict[object, list[object]] = defaultdict(list)
    open_inputs = {}
    for node, needs in after.items():
        open_inputs[node] = len(needs)
        for need in needs:
            followers[need].append(node)
    ready = [node for node, count in open_inputs.items() if count == 0]
    start: dict[object, float] = defaultdict(float)
    finish: dict[object, float] = {}
    while ready:
        node = ready.pop()
        finish[node] = start[node] + seconds[node]
        for follower in followers[node]:
            start[follower] = max(start[follower], finish[node])
            open_inputs[follower] -= 1
            if not open_inputs[follower]:
                ready.append(follower)
    assert len(finish) == len(after)
    return finish


@pytest.mark.parametrize(
    "kind", ["gpipe", "1f1b", "interleaved_1f1b", "k2", "zb_h1", "dualpipe", "dualpipe_v"]
)
def test_uneven_costs_and_slow_hops_take_the_longest_path(kind: str, specs: Specs) -> None:
    """Every virtual stage with other seconds, every hop with other seconds, against a graph that
    knows no streams."""
    for seed, spec in enumerate(specs(kind, range(3, 17, 5), offload=False)):
        if spec.pp > 5 or spec.vpp > 3:
            continue
        schedule = build_schedule(spec)
        costs = _random_costs(schedule.num_virtual_stages, seed)
        assert simulate(schedule, costs).makespan_seconds == _longest_path(schedule, costs), spec


def test_busy_time_and_waits_add_up_to_the_makespan(moe_costs: MakeCosts, specs: Specs) -> None:
    for kind in ("k2", "interleaved_1f1b", "dualpipe", "dualpipe_v", "zb_h1", "gpipe"):
        for spec in specs(kind, range(4, 20, 8), offload=True):
            schedule = build_schedule(spec)
            simulation = simulate(schedule, moe_costs(schedule.num_virtual_stages))
            for stage in simulation.stages:
                assert stage.busy_seconds + stage.idle_seconds == pytest.approx(simulation.makespan_seconds)
                assert min(*stage.warmup, *stage.steady, *stage.cooldown) >= 0


def test_a_pair_of_layers_hides_every_all_to_all_but_the_tail_and_k2_exposes_none_when_full(
    moe_costs: MakeCosts,
) -> None:
    """K2's steady phase: no wait at all on evenly loaded stages; unpaired, every all-to-all stands
    in the way."""
    for vpp, layers in ((2, 2), (4, 1)):
        costs = moe_costs(8 * vpp, layers)
        k2 = simulate(build_schedule(ScheduleSpec.preset("k2", 8, 40, vpp)), costs)
        assert k2.steady_window[1] > k2.steady_window[0]
        for stage in k2.stages:
            assert stage.steady == pytest.approx((0, 0, 0, 0), abs=1e-9)
            assert stage.warmup.pp > 0
        plain = simulate(build_schedule(ScheduleSpec.preset("interleaved_1f1b", 8, 40, vpp)), costs)
        assert all(stage.steady.ep > 0 for stage in plain.stages)
        assert k2.makespan_seconds < plain.makespan_seconds


def test_splitting_the_weight_gradient_is_what_hides_pipeline_traffic(moe_costs: MakeCosts) -> None:
    """The same pairs with a weight gradient too short to hide a hop: each steady slot then shows
    the rest of it."""
    spec = ScheduleSpec.preset("k2", 4, 32, 2, offload=False)
    hidden = simulate(build_schedule(spec), moe_costs(8, weight_grad=1.0, hop=1.0))
    shown = simulate(build_schedule(spec), moe_costs(8, weight_grad=0.5, hop=2.0))
    assert max(stage.steady.pp for stage in hidden.stages) == pytest.approx(0, abs=1e-9)
    assert max(stage.steady.pp for stage in shown.stages) > 10


def test_one_layer_in_a_pair_lies_as_in_figure_7(moe_costs: MakeCosts) -> None:
    schedule = build_schedule(ScheduleSpec.preset("k2", 1, 3, offload=False))
    simulation = simulate(schedule, moe_costs(1), record=True)
    record = next(r for r in simulation.compute_records[0] if isinstance(r.step, Pair))
    by_stream = {
        stream: [
            ("FI"[span.chain], span.phase.name) for span in record.layout.spans if span.phase.stream is stream
        ]
        for stream in Stream
    }
    assert by_stream == {
        Stream.COMPUTE: [("F", "attention"), ("I", "experts"), ("F", "experts"), ("I", "attention")],
        Stream.EP: [("I", "combine"), ("F", "dispatch"), ("I", "dispatch"), ("F", "combine")],
    }
    assert record.layout.exposed_ep == 0
    assert record.layout.busy == pytest.approx(3 + 5 + 1.2 * 8)


def test_the_all_to_alls_of_a_lone_forward_are_exposed(moe_costs: MakeCosts) -> None:
    """One stage, one microbatch, by hand: F 3 |1.5| 5 |1.5, then I |1.5| 6 |1.5| 3.6, then W 6."""
    schedule = build_schedule(ScheduleSpec(1, 1, split_weight_grad=True))
    simulation = simulate(schedule, moe_costs(1))
    times = simulation.stages[0]
    assert simulation.makespan_seconds == pytest.approx(3 + 1.5 + 5 + 1.5 + 1.5 + 6 + 1.5 + 3.6 + 6)
    assert times.waits.ep == pytest.approx(4 * 1.5)
    assert times.bubble_seconds == pytest.approx(0)


def test_a_full_backward_is_input_gradient_then_weight_gradient() -> None:
    spec = ScheduleSpec(2, 1)
    split = ScheduleSpec(2, 1, split_weight_grad=True)
    costs = uniform_costs(2, forward=1, backward_input=2, weight_grad=4)
    assert _makespan(spec, costs) == 2 * (1 + 2 + 4)
    assert _makespan(split, costs) == 2 * (1 + 2) + 4


def _step_by_step(spec: ScheduleSpec, costs: Costs) -> tuple[np.ndarray, np.ndarray]:
    return simulate(build_schedule(spec), costs).memory[0]


def test_memory_over_time_by_hand() -> None:
    """One stage, two microbatches, F 2, I 2, W 1; 1F1B: F0 I0 W0 F1 I1 W1."""
    one = VirtualStageCosts(
        (Phase("f", Stream.COMPUTE, 2),),
        (Phase("b", Stream.COMPUTE, 2),),
        1,
        activation_bytes=10,
        offload_bytes=100,
        forward_transient_bytes=3,
        backward_transient_bytes=5,
        weight_queue_bytes=20,
    )
    times, level = _step_by_step(ScheduleSpec(1, 2, split_weight_grad=True), Costs((one,)))
    at = {t: int(level[np.searchsorted(times, t, side="right") - 1]) for t in (0, 2, 4, 5, 7, 9, 10)}
    # During F: saved and transient; during I: saved and transient; until W: the queue.
    assert at == {0: 113, 2: 115, 4: 20, 5: 113, 7: 115, 9: 20, 10: 0}


def test_a_backward_whose_all_to_all_starts_early_takes_its_memory_when_the_step_before_has_ended() -> None:
    """GPipe, F0 F1 I0 W0 I1 W1: I1's combine runs under W0, and W0's queue of 20 is free before
    I1's 5 are taken, as the allocator sees the order of issue."""
    one = VirtualStageCosts(
        (Phase("f", Stream.COMPUTE, 2),),
        (Phase("c", Stream.EP, 1), Phase("b", Stream.COMPUTE, 2)),
        4,
        backward_transient_bytes=5,
        weight_queue_bytes=20,
    )
    schedule = build_schedule(ScheduleSpec(1, 2, "gpipe", split_weight_grad=True))
    _, level = simulate(schedule, Costs((one,))).memory[0]
    assert int(level.max()) == 20


def test_nothing_is_left_in_memory_and_peaks_are_those_of_the_chunks_in_flight(specs: Specs) -> None:
    one = VirtualStageCosts(
        (Phase("f", Stream.COMPUTE, 1),), (Phase("b", Stream.COMPUTE, 1),), 1, activation_bytes=7
    )
    for kind in ("k2", "interleaved_1f1b", "1f1b", "zb_h1", "dualpipe"):
        for spec in specs(kind, range(8, 20, 8), offload=False):
            schedule = build_schedule(spec)
            simulation = simulate(schedule, Costs((one,) * schedule.num_virtual_stages))
            in_flight = [_peak(line) for line in schedule.stages]
            assert all(level[-1] == 0 and level.min() >= 0 for _, level in simulation.memory)
            assert list(simulation.peak_bytes) == [7 * peak for peak in in_flight], spec


def _peak(line: tuple) -> int:
    """Chunks between F and I or B by walking the list, independently of the validator. Pairs run F,
    then I."""
    level = peak = 0
    for step in line:
        for action in parts(step):
            level += (action.kind is Kind.F) - (action.kind in (Kind.I, Kind.B))
            peak = max(peak, level)
    return peak


def test_offload_moves_bytes_to_the_host_and_back(moe_costs: MakeCosts) -> None:
    spec = ScheduleSpec.preset("k2", 8, 32, 2)
    costs = moe_costs(16)
    kept = simulate(build_schedule(ScheduleSpec.preset("k2", 8, 32, 2, offload=False)), costs)
    moved = simulate(build_schedule(spec), costs)
    assert moved.peak_bytes[0] < kept.peak_bytes[0] / 2
    assert moved.peak_host_bytes[0] > 15 * 100
    assert kept.peak_host_bytes == (0,) * 8
    assert all(level[-1] == 0 and level.min() >= 0 for _, level in (*moved.memory, *moved.host_memory))
    assert moved.makespan_seconds == kept.makespan_seconds


def test_copies_slower_than_the_compute_they_run_under_are_exposed_as_copies(moe_costs: MakeCosts) -> None:
    spec = ScheduleSpec.preset("k2", 4, 32, 2)
    slow = simulate(build_schedule(spec), moe_costs(8, copy=40.0))
    fast = simulate(build_schedule(spec), moe_costs(8, copy=2.0))
    assert (
        max(stage.steady.copy for stage in slow.stages) > 10
    )  # the others wait for the slowest: their bubble
    assert slow.makespan_seconds > fast.makespan_seconds
    assert all(stage.waits.copy == 0 for stage in fast.stages)


def test_events_of_one_stream_never_overlap_and_cover_the_busy_time(moe_costs: MakeCosts) -> None:
    for kind in ("k2", "dualpipe", "dualpipe_v", "interleaved_1f1b"):
        schedule = build_schedule(ScheduleSpec.preset(kind, 4, 12, offload=True))
        simulation = simulate(schedule, moe_costs(schedule.num_virtual_stages), record=True)
        lanes = defaultdict(list)
        for event in simulation.events():
            to = schedule.next if event.name == "SEND_F" else schedule.previous
            virtual_stage = to[event.action.virtual_stage] if event.stream == "send" else None
            peer = None if virtual_stage is None else schedule.placement[virtual_stage]
            lanes[event.stage, event.stream, peer].append((event.start, event.end))
        for (stage, stream, _), boxes in lanes.items():
            boxes.sort()
            assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(boxes)), (
                kind,
                stage,
                stream,
            )
            if stream == "compute":
                assert sum(e - s for s, e in boxes) == pytest.approx(simulation.stages[stage].busy_seconds)


def test_events_in_a_window_are_those_that_touch_it(moe_costs: MakeCosts) -> None:
    schedule = build_schedule(ScheduleSpec.preset("k2", 2, 6, 2))
    simulation = simulate(schedule, moe_costs(4), record=True)
    low, high = 40.0, 90.0
    inside = [event for event in simulation.events() if event.start < high and event.end > low]
    assert sorted(simulation.events(low, high)) == sorted(inside)
    assert 0 < len(inside) < len(list(simulation.events()))


def test_the_simulator_refuses_what_does_not_fit() -> None:
    spec = ScheduleSpec.preset("k2", 2, 4, 2)
    with pytest.raises(ValueError, match="costs for 3 virtual stages do not fit a schedule with 4"):
        simulate(build_schedule(spec), uniform_costs(3))
    with pytest.raises(ScheduleError, match="no sends and receives"):
        simulate(compute_order(spec), uniform_costs(4))
    stuck = ScheduleSpec.preset("k2", 2, 4, 2, extra_warmup_microbatches=0)
    with pytest.raises(ScheduleError, match="stands still"):
        simulate(build_schedule(stuck), uniform_costs(4))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_costs_are_finite_and_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match="finite number of at least 0"):
        Phase("attention", Stream.COMPUTE, value)
    with pytest.raises(ValueError, match="weight_grad_seconds must be a finite number"):
        VirtualStageCosts((), (), value)


def test_pipeline_traffic_costs_k2_the_same_however_long_the_step(moe_costs: MakeCosts) -> None:
    """One stage is slower than the others. It never waits for a message when the pipeline is full,
    so what messages cost the step is paid in warm-up and cool-down alone and does not grow with the
    microbatches."""
    even = moe_costs(8).virtual_stages
    slow = moe_costs(1, experts=6.0, attention=3.5).virtual_stages[0]
    costs = Costs((*even[:2], slow, *even[3:6], slow, even[7]))  # both virtual stages of stage 2
    prices = []
    for num_microbatches in (40, 80):
        schedule = build_schedule(ScheduleSpec.preset("k2", 4, num_microbatches, 2))
        simulation = simulate(schedule, costs)
        assert simulation.slowest_stage == 2
        assert simulation.stages[2].steady.pp == pytest.approx(0, abs=1e-9)
        assert simulation.stages[2].steady.ep == pytest.approx(0, abs=1e-9)
        assert simulation.stages[0].steady.total > 1
        prices.append(
            simulation.makespan_seconds - simulate(schedule, without(costs, pp=True)).makespan_seconds
        )
    assert prices[0] > 0
    assert prices[0] == pytest.approx(prices[1])


def test_costs_without_a_kind_of_traffic_lack_its_seconds_only(moe_costs: MakeCosts) -> None:
    one = moe_costs(1).virtual_stages[0]
    bare = without(moe_costs(1), ep=True, pp=True, copies=True).virtual_stages[0]
    assert sum(phase.seconds for phase in bare.forward) == 8
    assert [phase.name for phase in bare.forward] == [phase.name for phase in one.forward]
    assert (
        bare.send_forward_seconds
        == bare.send_backward_seconds
        == bare.offload_seconds
        == bare.reload_seconds
        == 0
    )
    assert bare.offload_bytes == one.offload_bytes
    assert without(moe_costs(1)) == moe_costs(1)


def test_the_first_all_to_all_of_a_backward_runs_under_the_step_before_it() -> None:
    """One stage, GPipe with two microbatches, by hand: F0 F1 I0 W0 I1 W1. I0's combine runs under
    F1, I1's under W0, and neither starts before the step it runs under."""
    one = VirtualStageCosts(
        (Phase("f", Stream.COMPUTE, 2),),
        (Phase("combine", Stream.EP, 1), Phase("b", Stream.COMPUTE, 2)),
        3,
    )
    schedule = build_schedule(ScheduleSpec(1, 2, "gpipe", split_weight_grad=True))
    simulation = simulate(schedule, Costs((one,)), record=True)
    combines = [(event.start, event.end) for event in simulation.events() if event.stream == "ep"]
    assert combines == [(2, 3), (6, 7)]
    assert simulation.makespan_seconds == 2 * (2 + 2 + 3)
    assert simulation.stages[0].idle_seconds == 0
