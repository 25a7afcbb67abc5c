"""The validator: proves that a schedule computes every microbatch once, in order, and cannot stand still.

Four checks, in this order, each a `ScheduleError` with a few lines:

1. completeness (`completeness.py`): every action is on its stage and on its microbatch's chain; F once; B once or I and W
   once each; a SEND and a RECV for every hop between two stages and no others;
2. order within a stage: messages and copies around the compute they belong to, W after its I, every OFFLOAD
   reloaded before the backward that needs it, nothing left out at the end;
3. channels: on every ordered pair of stages the receives are posted in the order of the sends;
4. progress (`deadlock.py`): a run with the semantics of `p2p.py`. Where it stops, the error names the cycle of waits.

Progress does not depend on how long anything takes: a step that can run in one run can run in all of them, since
the lists are fixed and nothing is ever refused once it is ready.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from k2train.schedule.actions import BACKWARDS, MESSAGES, Action, Kind, Pair, Step, parts
from k2train.schedule.completeness import check_complete
from k2train.schedule.deadlock import check_progress
from k2train.schedule.errors import ScheduleError
from k2train.schedule.p2p import received_as
from k2train.schedule.program import Schedule


@dataclass(frozen=True)
class ScheduleReport:
    """What a valid schedule needs."""

    peak_in_flight: tuple[int, ...]
    """For each stage, the most chunks (microbatches on a virtual stage) with a forward done and no B or I yet; the
    forward of a pair counts before its backward frees anything."""
    peak_weight_queue: tuple[int, ...]
    """For each stage, the most chunks with I done and W outstanding."""
    num_warmup: tuple[int, ...]
    """For each stage, the forwards before the first backward or pair."""
    num_actions: int
    num_messages: int


def validate(schedule: Schedule) -> ScheduleReport:
    """Prove the schedule, or raise ScheduleError.

    A schedule without any SEND or RECV is taken as one before `insert_p2p`: results then pass between stages at once.
    """
    has_messages = check_complete(schedule)
    counts = [_check_stage(schedule, stage) for stage in range(schedule.num_stages)]
    if has_messages:
        check_channels(schedule)
    check_progress(schedule, has_messages)
    return ScheduleReport(
        tuple(count.peak_in_flight for count in counts),
        tuple(count.peak_queue for count in counts),
        tuple(count.warmup for count in counts),
        sum(map(len, schedule.stages)),
        sum(count.sends for count in counts),
    )


@dataclass
class _Counts:
    in_flight: int = 0
    peak_in_flight: int = 0
    queue: int = 0
    peak_queue: int = 0
    warmup: int = 0
    sends: int = 0
    in_warmup: bool = True

    def compute(self, action: Action) -> None:
        if action.kind is Kind.F:
            self.in_flight += 1
            self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
            self.warmup += self.in_warmup
        elif action.kind in BACKWARDS:
            self.in_flight -= 1
            self.in_warmup = False
            self.queue += action.kind is Kind.I
            self.peak_queue = max(self.peak_queue, self.queue)
        elif action.kind is Kind.W:
            self.queue -= 1


_NEEDED_BEFORE = {
    Kind.SEND_F: (Kind.F, "its forward"),
    Kind.SEND_B: (Kind.I, "its backward"),
    Kind.W: (Kind.I, "its input gradient"),
    Kind.OFFLOAD: (Kind.F, "its forward"),
    Kind.RELOAD: (Kind.OFFLOAD, "its OFFLOAD"),
}


def _check_stage(schedule: Schedule, stage: int) -> _Counts:
    """Order within one stage. Whether F stands before its backward is left to `check_progress`, which knows the cycle."""
    has_messages = bool(schedule.kinds & MESSAGES)
    counts = _Counts()
    done: dict[Kind, set[int]] = {kind: set() for kind in Kind}
    width = schedule.num_microbatches
    for step in schedule.stages[stage]:
        if isinstance(step, Pair):
            counts.in_warmup = False
        for action in parts(step):
            kind, virtual_stage, microbatch = action
            key = virtual_stage * width + microbatch
            need = _NEEDED_BEFORE.get(kind)
            if need is not None and key not in done[need[0]]:
                raise _too_early(stage, step, action, f"{need[1]} stands later in the list")
            if (has_messages and kind is Kind.F) or kind in BACKWARDS:
                _check_inputs(schedule, stage, step, action, done, key, has_messages)
            elif kind is Kind.OFFLOAD and key in done[Kind.I]:
                raise _too_early(
                    stage, step, action, "its backward stands earlier, so it never comes back", "late"
                )
            counts.compute(action)
            counts.sends += kind in (Kind.SEND_F, Kind.SEND_B)
            done[Kind.I if kind is Kind.B else kind].add(key)
    return counts


def _check_inputs(
    schedule: Schedule,
    stage: int,
    step: Step,
    action: Action,
    done: dict[Kind, set[int]],
    key: int,
    has_messages: bool,
) -> None:
    forward = action.kind is Kind.F
    if not forward and key in done[Kind.OFFLOAD] and key not in done[Kind.RELOAD]:
        raise _too_early(stage, step, action, "it was offloaded and not reloaded before its use")
    if not has_messages:
        return
    neighbour = (schedule.previous if forward else schedule.next)[action.virtual_stage]
    if neighbour is None or schedule.placement[neighbour] == stage:
        return
    if key not in done[Kind.RECV_F if forward else Kind.RECV_B]:
        raise _too_early(stage, step, action, "its receive has not been posted")


def _too_early(stage: int, step: Step, action: Action, why: str, when: str = "early") -> ScheduleError:
    inside = f" inside {step}" if isinstance(step, Pair) else ""
    return ScheduleError(f"stage {stage}: {action}{inside} comes too {when}", [why])


def check_channels(schedule: Schedule) -> None:
    """Every ordered pair of stages: the sequence of RECVs is that of the SENDs. Raises ScheduleError."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    posted: dict[tuple[int, int], list[Action]] = defaultdict(list)
    place = schedule.placement
    for stage, line in enumerate(schedule.stages):
        for step in line:
            if isinstance(step, Pair):
                continue
            kind, virtual_stage, _ = step
            if kind is Kind.SEND_F or kind is Kind.SEND_B:
                receive = received_as(schedule, step)
                sent[stage, place[receive.virtual_stage]].append(receive)
            elif kind is Kind.RECV_F or kind is Kind.RECV_B:
                source = (schedule.previous if kind is Kind.RECV_F else schedule.next)[virtual_stage]
                assert source is not None
                posted[place[source], stage].append(step)
    for channel in sorted(sent.keys() | posted.keys()):
        _check_channel(channel, sent[channel], posted[channel])


def _check_channel(channel: tuple[int, int], sent: list[Action], posted: list[Action]) -> None:
    if sent == posted:
        return
    index = next(i for i, (s, r) in enumerate(zip(sent, posted, strict=True)) if s != r)
    source, target = channel
    raise ScheduleError(
        f"stage {source} to stage {target}: message {index} is sent as one thing and received as another",
        [
            f"stage {source} sends {_around(sent, index)}",
            f"stage {target} posts {_around(posted, index)}",
            "messages have no tags, so receives must be posted in the order of the sends",
        ],
    )


def _around(actions: list[Action], index: int) -> str:
    shown = " ".join(map(str, actions[index : index + 3]))
    return shown + (" ..." if len(actions) > index + 3 else "")
