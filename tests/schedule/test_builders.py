"""Every schedule that can be built is valid, holds no more than its formula, and survives its text
form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from k2train.config.errors import ConfigError
from k2train.schedule import (
    KINDS,
    Action,
    Kind,
    Pair,
    Schedule,
    ScheduleError,
    ScheduleSpec,
    Step,
    build_schedule,
    compute_order,
    parse_schedule,
    validate,
)
from k2train.schedule.actions import parts
from k2train.schedule.formulas import peak_in_flight
from k2train.schedule.orders import interleaved, microbatch_groups
from k2train.schedule.passes import drop_microbatches, extra_warmup, pair_steady, split_weight_grad

Specs = Callable[..., Iterator[ScheduleSpec]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_schedule_of_the_grid_is_valid_within_its_bound_and_round_trips(
    kind: str, specs: Specs
) -> None:
    """All pp to 8, vpp to 4, microbatches to 24. Fewer than pp microbatches may need less than the
    formula, never more."""
    built = 0
    for spec in specs(kind, offload=kind != "interleaved_1f1b"):
        schedule = build_schedule(spec)
        report = validate(schedule)
        for stage, peak in enumerate(report.peak_in_flight):
            bound = peak_in_flight(spec, stage)
            assert peak == bound or (peak < bound and spec.num_microbatches < spec.pp), (spec, stage)
        if (spec.num_microbatches + spec.pp) % 4 == 0:  # the text form costs more than all the rest
            assert parse_schedule(schedule.to_text()) == schedule
        built += 1
    assert built >= 32


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_every_combination_of_passes_leaves_the_order_valid(extra: int, pair: bool, specs: Specs) -> None:
    """Passes one after another on the interleaved order, validated in between."""
    for spec in specs("interleaved_1f1b", range(1, 25, 3)):
        if spec.pp > 5:
            continue
        schedule = interleaved("x", spec.pp, spec.vpp, max(spec.num_microbatches, spec.pp))
        validate(schedule)
        schedule = extra_warmup(schedule, extra)
        validate(schedule)
        schedule = split_weight_grad(schedule)
        validate(schedule)
        if pair and extra:
            schedule = pair_steady(schedule)
            validate(schedule)
        validate(drop_microbatches(schedule, spec.num_microbatches))


def test_groups_hold_every_microbatch_and_at_least_pp_of_them_each() -> None:
    for pp in range(1, 9):
        for num_microbatches in range(1, 40):
            groups = microbatch_groups(num_microbatches, pp)
            assert sum(groups) == num_microbatches
            assert max(groups) - min(groups) <= 1
            assert min(groups) >= min(pp, num_microbatches)
            assert len(groups) == max(1, num_microbatches // pp)


def test_extra_warmup_moves_backwards_and_keeps_both_orders() -> None:
    before = interleaved("x", 4, 2, 8)
    after = extra_warmup(before, 1)
    for old, new in zip(before.stages, after.stages, strict=True):
        for kind in (Kind.F, Kind.B):
            assert _of_kind(old, kind) == _of_kind(new, kind)
        assert _forwards_before_first_backward(new) == _forwards_before_first_backward(old) + 1


def _of_kind(line: tuple[Step, ...], kind: Kind) -> list[Action]:
    """The actions of a kind, where a line has no pairs."""
    actions = [step for step in line if isinstance(step, Action)]
    assert len(actions) == len(line)
    return [action for action in actions if action.kind is kind]


def _forwards_before_first_backward(line: tuple) -> int:
    return next(i for i, step in enumerate(line) if step.kind is Kind.B)


def test_every_pair_of_k2_is_followed_by_its_weight_gradient_behind_its_sends() -> None:
    schedule = build_schedule(ScheduleSpec.preset("k2", 4, 8, 2, offload=False))
    pairs = 0
    for line in schedule.stages:
        for index, step in enumerate(line):
            if isinstance(step, Pair):
                pairs += 1
                rest = list(line[index + 1 :])
                between = rest[: rest.index(step.backward_input._replace(kind=Kind.W))]
                behind = [s.kind for s in between if isinstance(s, Action)]
                assert len(behind) == len(between)
                assert set(behind) <= {Kind.SEND_F, Kind.SEND_B, Kind.RECV_F, Kind.RECV_B}
                assert behind == sorted(behind, key=lambda kind: kind.value.startswith("RECV"))
    assert pairs > 0


def test_pairs_never_join_a_microbatch_with_itself(specs: Specs) -> None:
    for spec in specs("k2", range(1, 25, 5)):
        for line in compute_order(spec).stages:
            for step in line:
                if isinstance(step, Pair):
                    assert step.forward[1:] != step.backward_input[1:]


def test_one_stage_sends_nothing() -> None:
    for kind in ("k2", "gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "dualpipe_v"):
        schedule = build_schedule(ScheduleSpec.preset(kind, 1, 4, offload=True))
        assert not schedule.kinds & {Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B}
        validate(schedule)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_reloads_come_the_prefetch_depth_ahead_and_never_right_behind_their_offload(depth: int) -> None:
    for spec in (
        ScheduleSpec.preset("k2", 4, 10, 2, prefetch_depth=depth),
        ScheduleSpec.preset("1f1b", 4, 10, offload=True, prefetch_depth=depth),
    ):
        schedule = build_schedule(spec)
        validate(schedule)
        for line in schedule.stages:
            _check_copies(line, depth)


def _check_copies(line: tuple, depth: int) -> None:
    forwards: dict[tuple[int, int], int] = {}
    backwards: dict[tuple[int, int], int] = {}
    reloads: dict[tuple[int, int], int] = {}
    slot = -1
    for step in line:
        if isinstance(step, Pair) or step.kind in (Kind.F, Kind.B, Kind.I):
            slot += 1
        for kind, virtual_stage, microbatch in parts(step):
            table = {Kind.F: forwards, Kind.B: backwards, Kind.I: backwards, Kind.RELOAD: reloads}.get(kind)
            if table is not None:
                table[virtual_stage, microbatch] = slot
    for chunk, backward in backwards.items():
        if chunk in reloads:
            # A RELOAD stands before the slot it runs under.
            assert backward - (reloads[chunk] + 1) == depth
            assert forwards[chunk] < reloads[chunk]
        else:
            assert backward - forwards[chunk] <= depth + 1


def test_dualpipe_holds_two_copies_of_the_model_and_others_one() -> None:
    def copies(schedule: Schedule) -> set[int]:
        return set(Counter(schedule.model_part).values())

    assert copies(build_schedule(ScheduleSpec.preset("dualpipe", 4, 8))) == {2}
    for kind in ("dualpipe_v", "k2", "zb_h1"):
        assert copies(build_schedule(ScheduleSpec.preset(kind, 4, 8))) == {1}


def test_zb_h1_needs_no_more_than_1f1b_with_its_weight_queue_counted(specs: Specs) -> None:
    """On any stage, chunks between F and W are at most pp (paper, H1)."""
    for spec in specs("zb_h1"):
        report = validate(build_schedule(spec))
        for stage in range(spec.pp):
            assert report.peak_in_flight[stage] + report.peak_weight_queue[stage] - 1 <= spec.pp


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"pp": 0}, "layout.pp"),
        ({"pp": -2}, "layout.pp"),
        ({"pp": 2.0}, "layout.pp"),
        ({"pp": True}, "layout.pp"),
        ({"vpp": 0}, "layout.vpp"),
        ({"num_microbatches": 0}, "num_microbatches"),
        ({"num_microbatches": 10**9}, "num_microbatches"),
        ({"kind": "k3"}, "schedule.kind"),
        ({"kind": "gpipe", "vpp": 2}, "layout.vpp"),
        ({"kind": "dualpipe", "vpp": 2}, "layout.vpp"),
        ({"extra_warmup_microbatches": -1}, "schedule.extra_warmup_microbatches"),
        ({"prefetch_depth": 0}, "schedule.prefetch_depth"),
        ({"pair_forward_backward": True}, "schedule.pair_forward_backward"),
        (
            {"kind": "1f1b", "pair_forward_backward": True, "split_weight_grad": True},
            "schedule.pair_forward_backward",
        ),
        ({"kind": "zb_h1", "extra_warmup_microbatches": 1}, "schedule.extra_warmup_microbatches"),
        ({"kind": "dualpipe", "pp": 3}, "layout.pp"),
        ({"kind": "dualpipe", "num_microbatches": 9}, "num_microbatches"),
        ({"kind": "dualpipe_v", "num_microbatches": 7}, "num_microbatches"),
    ],
)
def test_numbers_that_cannot_be_scheduled_are_config_errors(changes: dict, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        ScheduleSpec(**{"pp": 4, "num_microbatches": 8, **changes})
    assert error.value.field == field


def test_pairs_without_extra_warmup_can_be_built_and_are_refused_by_the_validator() -> None:
    spec = ScheduleSpec.preset("k2", 4, 8, 2, extra_warmup_microbatches=0)
    with pytest.raises(ScheduleError, match="deadlock"):
        validate(build_schedule(spec))
