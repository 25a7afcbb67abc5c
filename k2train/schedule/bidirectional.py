"""Published orders built for comparison: ZB-H1, DualPipe and DualPipeV.

They are here so that `plan` can put them beside K2's schedule at equal cost; ZB-H1 and DualPipeV
can be trained too. Their orders already split weight gradients off and pair forwards with
backwards, so only communication and offload are inserted by passes.

DualPipe sends half of the microbatches down the stages and half up, each direction through its own
copy of the parameters. DualPipeV folds the pipeline: stage s holds the s-th piece from the front
and the s-th from the back, and a microbatch goes down and comes back, with one copy. Seen from one
stage both are the same order over two **lanes**: lane 0 comes first, lane 1 joins; DualPipe over pp
stages behaves like DualPipeV over pp / 2, mirrored.

Sources: Qi et al., "Zero bubble pipeline parallelism" (arXiv 2401.10241), H1; DeepSeek-V3 report
(arXiv 2412.19437), 3.2.1, and the published DualPipe order, whose eight steps are kept here one by
one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from k2train.layout.placement import folded
from k2train.schedule.actions import Action, Kind, Pair, Step
from k2train.schedule.program import Schedule


def zb_h1(pp: int, num_microbatches: int) -> Schedule:
    """1F1B with the weight gradient split off and, on stage s, run s microbatches late.

    Late weight gradients fill the cool-down of the late stages; what they keep waiting equals what
    the early stages hold as activations in flight, so the largest stage needs no more than 1F1B
    does.
    """
    lines = [_zb_h1_line(pp, stage, num_microbatches) for stage in range(pp)]
    return Schedule("zb_h1", num_microbatches, tuple(range(pp)), (tuple(range(pp)),), tuple(lines))


def _zb_h1_line(pp: int, stage: int, num_microbatches: int) -> tuple[Step, ...]:
    warmup = min(pp - 1 - stage, num_microbatches)
    line: list[Step] = [Action(Kind.F, stage, microbatch) for microbatch in range(warmup)]
    for microbatch in range(num_microbatches):
        if microbatch + warmup < num_microbatches:
            line.append(Action(Kind.F, stage, microbatch + warmup))
        line.append(Action(Kind.I, stage, microbatch))
        if microbatch >= stage:
            line.append(Action(Kind.W, stage, microbatch - stage))
    late = range(max(0, num_microbatches - stage), num_microbatches)
    return tuple(line + [Action(Kind.W, stage, microbatch) for microbatch in late])


def dualpipe(pp: int, num_microbatches: int) -> Schedule:
    """DualPipe. pp even; microbatches even and at least 2 pp; the first half of them goes down, the
    second up."""
    half = num_microbatches // 2
    lines = []
    for stage in range(pp):
        # Down enters at stage 0, up at the last one.
        lanes = ((stage, 0), (2 * pp - 1 - stage, half))
        near = lanes if stage < pp // 2 else lanes[::-1]
        lines.append(_TwoLanes(near).line(min(stage, pp - 1 - stage), pp // 2, half))
    chains = (tuple(range(pp)), tuple(range(pp, 2 * pp)))
    return Schedule("dualpipe", num_microbatches, folded(pp), chains, tuple(lines))


def dualpipe_v(pp: int, num_microbatches: int) -> Schedule:
    """DualPipeV. At least 2 pp microbatches."""
    lines = [
        _TwoLanes(((stage, 0), (2 * pp - 1 - stage, 0))).line(stage, pp, num_microbatches)
        for stage in range(pp)
    ]
    return Schedule("dualpipe_v", num_microbatches, folded(pp), (tuple(range(2 * pp)),), tuple(lines))


class _TwoLanes:
    """Writes one stage's line; counts the microbatches of each lane and queues weight gradients."""

    def __init__(self, lanes: Sequence[tuple[int, int]]) -> None:
        """lanes: virtual stage and first microbatch of each."""
        self._virtual_stages = [virtual_stage for virtual_stage, _ in lanes]
        self._next_forward = [first for _, first in lanes]
        self._next_backward = [first for _, first in lanes]
        self._queue: deque[Action] = deque()
        self._line: list[Step] = []

    def line(self, position: int, depth: int, count: int) -> tuple[Step, ...]:
        """position: distance from the lane-0 end; depth: stages up to the fold; count: microbatches
        of a lane."""
        before, after = depth - 1 - position, position + 1
        for _ in range(2 * before):
            self._forward(0)
        for _ in range(after):
            self._forward(0)
            self._forward(1)
        for _ in range(before):
            self._backward(1, split=True)
            self._weight()
            self._forward(1)
        self._main(count - 2 * depth + position + 1, at_fold=before == 0)
        for _ in range(before):
            self._backward(1)
            self._pair(1, 0)
        self._drain(after)
        for _ in range(before):
            self._weight()
            self._backward(0, split=True)
        for _ in range(after):
            self._weight()
        return tuple(self._line)

    def _main(self, times: int, at_fold: bool) -> None:
        for index in range(times):
            # Apart, so that the next stage gets the forward's result sooner.
            if index == 0 and at_fold:
                self._forward(0)
                self._backward(1)
            else:
                self._pair(0, 1)
            self._pair(1, 0)

    def _drain(self, times: int) -> None:
        """Backwards only; from the middle on split, to leave weight gradients for the end."""
        middle = times // 2
        for index in range(times):
            odd = (times - 1) % 2 == 1
            self._backward(1, split=index > middle or (index == middle and odd))
            self._backward(0, split=index >= middle)

    def _take(self, counters: list[int], kind: Kind, lane: int) -> Action:
        action = Action(kind, self._virtual_stages[lane], counters[lane])
        counters[lane] += 1
        return action

    def _forward(self, lane: int) -> None:
        self._line.append(self._take(self._next_forward, Kind.F, lane))

    def _backward(self, lane: int, split: bool = False) -> None:
        action = self._take(self._next_backward, Kind.I if split else Kind.B, lane)
        self._line.append(action)
        if split:
            self._queue.append(action._replace(kind=Kind.W))

    def _weight(self) -> None:
        self._line.append(self._queue.popleft())

    def _pair(self, forward: int, backward: int) -> None:
        """The pair, and right behind it the weight gradient, which DualPipe runs inside it."""
        first = self._take(self._next_forward, Kind.F, forward)
        second = self._take(self._next_backward, Kind.I, backward)
        self._line += (Pair(first, second), second._replace(kind=Kind.W))
