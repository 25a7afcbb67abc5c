"""The validator: proves that a schedule computes every microbatch once, in order, and cannot stand
still.

Four checks, in this order, each a `ScheduleError` with a few lines:

1. completeness (`completeness.py`): every action is on its stage and on its microbatch's chain; F
once; B once or I and W
   once each; a SEND and a RECV for every hop between two stages and no others;
2. order within a stage: messages and copies around the compute they belong to, W after its I, every
OFFLOAD
   reloaded before the backward that needs it, nothing left out at the end;
3. order of messages (`channels.py`): for every ordered pair of stages the receives are posted in
the order of the sends;
4. progress (`deadlock.py`): a run in which messages queue up in their communicators and move by
rendezvous (`replay.py`).
   Where it stops, the error names the cycle of waits.

The proof holds for one form of channels, `ChannelForm.ORDERED_PAIR` unless another is asked for. It
does not depend on how long anything takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from k2train.schedule.actions import Action, Kind, Pair, Step, parts
from k2train.schedule.channels import ChannelForm, check_order
from k2train.schedule.completeness import check_complete
from k2train.schedule.deadlock import check_progress
from k2train.schedule.errors import ScheduleError
from k2train.schedule.p2p import receive_of
from k2train.schedule.program import Schedule


@dataclass(frozen=True)
class ScheduleReport:
    """What a valid schedule needs."""

    peak_in_flight: tuple[int, ...]
    """For each stage, the most chunks (microbatches on a virtual stage) with a forward done and no
    B or I yet; the forward of a pair counts before its backward frees anything."""
    peak_weight_queue: tuple[int, ...]
    """For each stage, the most chunks with I done and W outstanding."""
    num_warmup: tuple[int, ...]
    """For each stage, the forwards before the first backward or pair."""
    peak_sends: tuple[int, ...]
    """For each stage, the most messages under way to any one other stage, where all compute steps
    take equally long."""
    num_actions: int
    num_messages: int


def validate(
    schedule: Schedule, form: ChannelForm = ChannelForm.ORDERED_PAIR, backward: bool = True
) -> ScheduleReport:
    """Prove the schedule for one form of channels, or raise ScheduleError.

    backward: False for evaluation's lists, which have forwards and no backwards; what is in flight
    then says nothing. A schedule without any SEND or RECV is taken as one before `insert_p2p`:
    results then pass between stages at once.
    """
    has_messages = check_complete(schedule, backward)
    counts = [_check_stage(schedule, stage, has_messages) for stage in range(schedule.num_stages)]
    if has_messages:
        check_order(schedule)
    peak_sends = check_progress(schedule, has_messages, form)
    return ScheduleReport(
        tuple(count.peak_in_flight for count in counts),
        tuple(count.peak_queue for count in counts),
        tuple(count.warmup for count in counts),
        peak_sends,
        sum(map(len, schedule.stages)),
        sum(count.sends for count in counts),
    )


class _Counts:
    """Counters of one stage, in list order."""

    def __init__(self) -> None:
        self.in_flight = self.peak_in_flight = 0
        self.queue = self.peak_queue = 0
        self.warmup = self.sends = 0
        self._in_warmup = True

    def forward(self, alone: bool) -> None:
        self._in_warmup = self._in_warmup and alone
        self.warmup += self._in_warmup
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)

    def backward(self, split: bool) -> None:
        self._in_warmup = False
        self.in_flight -= 1
        if split:
            self.queue += 1
            self.peak_queue = max(self.peak_queue, self.queue)


def _check_stage(schedule: Schedule, stage: int, has_messages: bool) -> _Counts:
    """Order within one stage. Whether F stands before its backward is left to `check_progress`,
    which knows the cycle."""
    check = _StageOrder(schedule, stage, has_messages)
    for step in schedule.stages[stage]:
        for action in parts(step):
            check.take(step, action)
    return check.counts


_NEEDED_BEFORE = {
    Kind.SEND_F: (Kind.F, "its forward stands later in the list"),
    Kind.SEND_B: (Kind.I, "its backward stands later in the list"),
    Kind.W: (Kind.I, "its input gradient stands later in the list"),
    Kind.OFFLOAD: (Kind.F, "its forward stands later in the list"),
    Kind.RELOAD: (Kind.OFFLOAD, "its OFFLOAD stands later in the list"),
}


class _StageOrder:
    """Walks one stage's list and checks that what belongs around a compute action is around it."""

    def __init__(self, schedule: Schedule, stage: int, has_messages: bool) -> None:
        self.counts = _Counts()
        self._stage = stage
        self._width = schedule.num_microbatches
        cells = schedule.num_virtual_stages * schedule.num_microbatches
        self._done = {kind: bytearray(cells) for kind in Kind}  # a full backward counts as I here
        virtual_stages = range(schedule.num_virtual_stages)
        self._receives = {
            kind: [
                has_messages and receive_of(schedule, Action(kind, vs, 0)) is not None
                for vs in virtual_stages
            ]
            for kind in (Kind.F, Kind.B, Kind.I)
        }

    def take(self, step: Step, action: Action) -> None:
        kind, virtual_stage, microbatch = action
        done = self._done
        cell = virtual_stage * self._width + microbatch
        if kind is Kind.F or kind is Kind.I or kind is Kind.B:
            self._compute(step, action, cell)
            kind = Kind.F if kind is Kind.F else Kind.I
        else:
            need = _NEEDED_BEFORE.get(kind)
            if need is not None and not done[need[0]][cell]:
                raise self._error(step, action, "early", need[1])
            if kind is Kind.W:
                self.counts.queue -= 1
            elif kind is Kind.SEND_F or kind is Kind.SEND_B:
                self.counts.sends += 1
            elif kind is Kind.OFFLOAD and done[Kind.I][cell]:
                raise self._error(step, action, "late", "its backward stands earlier, so it never comes back")
        done[kind][cell] = 1

    def _compute(self, step: Step, action: Action, cell: int) -> None:
        kind, done = action.kind, self._done
        if kind is Kind.F:
            self.counts.forward(alone=step is action)
        else:
            self.counts.backward(split=kind is Kind.I)
            if done[Kind.OFFLOAD][cell] and not done[Kind.RELOAD][cell]:
                raise self._error(step, action, "early", "it was offloaded and not reloaded before its use")
        receive = Kind.RECV_F if kind is Kind.F else Kind.RECV_B
        if self._receives[kind][action.virtual_stage] and not done[receive][cell]:
            raise self._error(step, action, "early", "its receive has not been posted")

    def _error(self, step: Step, action: Action, when: str, why: str) -> ScheduleError:
        inside = f" inside {step}" if isinstance(step, Pair) else ""
        return ScheduleError(f"stage {self._stage}: {action}{inside} comes too {when}", [why])
