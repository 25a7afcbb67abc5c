"""`build_schedule`: a base order and the passes that a spec switches on."""

from __future__ import annotations

from dataclasses import replace

from k2train.schedule import bidirectional, orders, passes
from k2train.schedule.offload import insert_offload
from k2train.schedule.p2p import insert_p2p
from k2train.schedule.program import Schedule
from k2train.schedule.spec import INTERLEAVED, ScheduleSpec


def build_schedule(spec: ScheduleSpec) -> Schedule:
    """The action lists of a step: compute order, then sends and receives, then offload.

    The result is not validated: pairs without extra warm-up, say, can be built, and `validate`
    names their deadlock.
    """
    schedule = insert_p2p(compute_order(spec))
    if spec.offload:
        schedule = insert_offload(schedule, spec.prefetch_depth)
    return schedule


def compute_order(spec: ScheduleSpec) -> Schedule:
    """The schedule before any communication: forwards, backwards, weight gradients and pairs."""
    if spec.kind == "zb_h1":
        return bidirectional.zb_h1(spec.pp, spec.num_microbatches)
    if spec.kind == "dualpipe":
        return bidirectional.dualpipe(spec.pp, spec.num_microbatches)
    if spec.kind == "dualpipe_v":
        return bidirectional.dualpipe_v(spec.pp, spec.num_microbatches)
    schedule = _base_order(spec)
    if spec.extra_warmup_microbatches:
        schedule = passes.extra_warmup(schedule, spec.extra_warmup_microbatches)
    if spec.split_weight_grad:
        schedule = passes.split_weight_grad(schedule)
    if spec.pair_forward_backward:
        schedule = passes.pair_steady(schedule)
    if schedule.num_microbatches > spec.num_microbatches:
        schedule = passes.drop_microbatches(schedule, spec.num_microbatches)
    return replace(schedule, name=spec.kind)


def _base_order(spec: ScheduleSpec) -> Schedule:
    if spec.kind == "gpipe":
        return orders.gpipe(spec.pp, spec.num_microbatches)
    if spec.kind == "1f1b":
        return orders.one_f_one_b(spec.pp, spec.num_microbatches)
    assert spec.kind in INTERLEAVED
    # One virtual stage and nothing paired is plain 1F1B; a pair needs the longer warm-up even then,
    # because its forward and its backward wait for each other's neighbours (docs/schedule.md).
    stride = 2 if spec.vpp > 1 or spec.pair_forward_backward else 1
    num_microbatches = max(spec.num_microbatches, spec.pp) if stride == 2 else spec.num_microbatches
    return orders.interleaved(spec.kind, spec.pp, spec.vpp, num_microbatches, stride)
