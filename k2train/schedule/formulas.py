"""Closed formulas for bubble and in-flight memory: what docs/schedule.md tabulates and tests hold
the simulator to.

They assume the same seconds on every virtual stage, no all-to-all and free communication. F, I and
W are the seconds of one microbatch on one virtual stage. Where a weight gradient is split off and
runs in place (`k2` and the split forms of the 1F1B family) they also assume W no longer than F, and
for DualPipe that I equals F; outside that the simulator knows better. Sources: those of `orders.py`
and `bidirectional.py`.
"""

from __future__ import annotations

from k2train.schedule.orders import interleaved_warmup, microbatch_groups
from k2train.schedule.spec import INTERLEAVED, ScheduleSpec


def bubble_seconds(spec: ScheduleSpec, forward: float, backward_input: float, weight_grad: float) -> float:
    """Makespan less the work of one stage. For at least pp microbatches where weight gradients are
    split off."""
    hops = spec.pp - 1
    if spec.kind == "zb_h1":
        return hops * (forward + max(0.0, backward_input - weight_grad))
    if spec.kind in ("dualpipe", "dualpipe_v"):
        # DeepSeek's figure is 3 F - W a hop (F&B + B - 3 W). Here it is less by W, because both
        # results of a pair leave before the weight gradient that DualPipe runs inside it.
        to_fold = hops if spec.kind == "dualpipe_v" else spec.pp // 2 - 1
        return to_fold * (forward + 2 * max(0.0, forward - weight_grad))
    # A weight gradient that runs in place is not on the way of the gradient from stage to stage.
    slot = forward + backward_input + (0.0 if spec.split_weight_grad else weight_grad)
    bubble = hops * slot
    if spec.kind in INTERLEAVED:
        # A group smaller than pp waits for itself before each further virtual stage.
        bubble += (spec.vpp - 1) * max(0, spec.pp - spec.num_microbatches) * slot
    return bubble


def work_seconds(spec: ScheduleSpec, forward: float, backward_input: float, weight_grad: float) -> float:
    """Compute of one stage in a step."""
    # Of DualPipe's two, a microbatch passes one.
    virtual_stages = {"dualpipe_v": 2}.get(spec.kind, spec.vpp)
    return virtual_stages * spec.num_microbatches * (forward + backward_input + weight_grad)


def peak_in_flight(spec: ScheduleSpec, stage: int) -> int:
    """The most chunks a stage holds between forward and backward; an upper bound for fewer than pp
    microbatches."""
    chunks = spec.vpp * spec.num_microbatches
    if spec.kind == "gpipe":
        return chunks
    if spec.kind == "zb_h1":
        return min(spec.pp - stage, chunks)
    if spec.kind == "dualpipe":
        return spec.pp + 1
    if spec.kind == "dualpipe_v":
        return 2 * spec.pp + 1
    stride = 2 if spec.vpp > 1 or spec.pair_forward_backward else 1
    group = microbatch_groups(max(spec.num_microbatches, spec.pp), spec.pp)[0]
    warmup = interleaved_warmup(spec.pp, spec.vpp, stage, group, stride)
    return min(warmup + 1 + spec.extra_warmup_microbatches, chunks)
