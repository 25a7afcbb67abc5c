"""Inserting the pipeline's sends and receives.

Semantics, which validator, simulator and runtime share. Between every ordered pair of stages there
is one channel (a communicator and a stream of its own). It carries messages without tags, in order:
the n-th SEND on it meets the n-th RECV, whatever they are called. With pp = 2 the next and the
previous stage are one peer, so activations and gradients share a channel; therefore the order is
part of the schedule and not left to the runtime.

    SEND   asynchronous. It returns at once, and its buffer lives until the message has gone.
    RECV   asynchronous. It posts a buffer ahead of the step that needs it; that step waits for the
           message.
    a message moves when both are posted and every earlier message of its channel has moved
        (rendezvous)

Nothing ever blocks on a SEND or a RECV, only a compute step on its inputs. A receive is posted one
compute step ahead of the step that needs it: while a weight gradient runs, in the steady phase of
K2's schedule, both neighbours' messages move. Source: Kimi K2 report, 2.4.2; NCCL's point-to-point
calls have no tags.
"""

from __future__ import annotations

from dataclasses import replace

from k2train.schedule.actions import BACKWARDS, Action, Kind, Step, parts
from k2train.schedule.program import Schedule


def insert_p2p(schedule: Schedule, ahead: int = 1) -> Schedule:
    """Add SEND and RECV for every hop between two stages to a schedule that has none.

    ahead: compute steps between posting a receive and the step that needs it, at least 0.
    """
    lines = [_with_sends(schedule, line) for line in schedule.stages]
    channels = _channels(schedule, lines)
    received = tuple(
        _with_receives(schedule, stage, lines[stage], channels, ahead) for stage in range(len(lines))
    )
    return replace(schedule, stages=received)


def received_as(schedule: Schedule, send: Action) -> Action:
    """The RECV that meets a SEND."""
    if send.kind is Kind.SEND_F:
        target = schedule.next[send.virtual_stage]
        kind = Kind.RECV_F
    else:
        target = schedule.previous[send.virtual_stage]
        kind = Kind.RECV_B
    assert target is not None, f"{send} has no neighbour to go to"
    return Action(kind, target, send.microbatch)


def sends_of(schedule: Schedule, action: Action) -> Action | None:
    """The SEND a compute action makes necessary, None where its result stays on the stage."""
    if action.kind is Kind.F:
        target, kind = schedule.next[action.virtual_stage], Kind.SEND_F
    elif action.kind in BACKWARDS:
        target, kind = schedule.previous[action.virtual_stage], Kind.SEND_B
    else:
        return None
    if target is None or schedule.placement[target] == schedule.placement[action.virtual_stage]:
        return None
    return Action(kind, action.virtual_stage, action.microbatch)


def receive_of(schedule: Schedule, action: Action) -> Action | None:
    """The RECV a compute action's input comes by, None where it is on the stage already."""
    if action.kind is Kind.F:
        source, kind = schedule.previous[action.virtual_stage], Kind.RECV_F
    elif action.kind in BACKWARDS:
        source, kind = schedule.next[action.virtual_stage], Kind.RECV_B
    else:
        return None
    if source is None or schedule.placement[source] == schedule.placement[action.virtual_stage]:
        return None
    return Action(kind, action.virtual_stage, action.microbatch)


_Line = list[tuple[Step, tuple[Action, ...]]]
"""Compute steps, each with the sends that follow it."""
_Channels = dict[int, dict[int, list[Action]]]
"""Receives in the order of the sends, by receiving and by sending stage."""


def _with_sends(schedule: Schedule, line: tuple[Step, ...]) -> _Line:
    return [(step, tuple(s for action in parts(step) if (s := sends_of(schedule, action)))) for step in line]


def _channels(schedule: Schedule, lines: list[_Line]) -> _Channels:
    channels: _Channels = {stage: {} for stage in range(len(lines))}
    for stage, line in enumerate(lines):
        for _, sends in line:
            for send in sends:
                receive = received_as(schedule, send)
                to = schedule.placement[receive.virtual_stage]
                channels[to].setdefault(stage, []).append(receive)
    return channels


def _with_receives(
    schedule: Schedule, stage: int, line: _Line, channels: _Channels, ahead: int
) -> tuple[Step, ...]:
    """Post receives in the order of the sends: a step that needs the n-th message of a channel has
    all n posted."""
    queues = channels[stage]
    place = {receive: (source, n) for source, queue in queues.items() for n, receive in enumerate(queue)}
    posted = dict.fromkeys(queues, 0)
    before: list[list[Action]] = [[] for _ in line]
    for index, (step, _) in enumerate(line):
        for action in parts(step):
            receive = receive_of(schedule, action)
            if receive is None:
                continue
            source, n = place[receive]
            before[max(0, index - ahead)] += queues[source][posted[source] : n + 1]
            posted[source] = max(posted[source], n + 1)
    out: list[Step] = []
    for receives, (step, sends) in zip(before, line, strict=True):
        out += receives
        out.append(step)
        out += sends
    return tuple(out)
