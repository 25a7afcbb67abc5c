"""The validator's last check: does the schedule run to its end, and if not, who waits for whom.

Everything that waits in a `Replay` waits for exactly one other thing. A stage stands at a step and
waits for an action of its own, for another stage, or for the operation at the head of one of its
queues; an operation at the head of a queue waits for its other end, which another stage has not
issued yet or which is behind something in that stage's queue. So following the waits from any stage
ends in a cycle, and the cycle is the error.
"""

from __future__ import annotations

from typing import NamedTuple

from k2train.schedule.actions import Action, Kind, parts
from k2train.schedule.channels import ChannelForm
from k2train.schedule.errors import ScheduleError
from k2train.schedule.p2p import receive_of, received_as
from k2train.schedule.program import Schedule
from k2train.schedule.replay import Replay


def check_progress(
    schedule: Schedule,
    has_messages: bool = True,
    form: ChannelForm = ChannelForm.ORDERED_PAIR,
    max_sends: int | None = None,
) -> tuple[int, ...]:
    """Run the lists. Raises ScheduleError with the cycle of waits where they stand still.

    has_messages=False: before `insert_p2p`; results then pass between stages at once. max_sends: a
    SEND waits until fewer than so many messages of its ordered pair of stages are under way; None
    means that it never waits. Returns, for each stage, the most messages it had under way to any
    one other stage.
    """
    replay = Replay(schedule, has_messages, form, max_sends)
    replay.run()
    if replay.stuck:
        left = sum(len(line) - at for line, at in zip(schedule.stages, replay.position, strict=True))
        raise ScheduleError(
            f"deadlock: {len(replay.stuck)} of {schedule.num_stages} stages stand still, {left} steps are left",
            cycle(replay),
        )
    return tuple(max(peaks.values(), default=0) for peaks in replay.peak_sends)


class Waiting(NamedTuple):
    """What waits: a stage at its next step, or, with a key, the operation at the head of its queue
    of that communicator."""

    stage: int
    key: tuple[int, ...] | None = None


class Wait(NamedTuple):
    """A wait in words, and what it is for."""

    text: str
    waits_for: Waiting


def cycle(replay: Replay) -> list[str]:
    """The waits from a stage that stands still, cut down to the cycle they end in; a line for
    each."""
    path: list[Waiting] = []
    lines: list[str] = []
    here = Waiting(replay.stuck[0])
    while here not in path:
        path.append(here)
        wait = (
            _stage_wait(replay, here.stage) if here.key is None else _queue_wait(replay, here.stage, here.key)
        )
        lines.append(wait.text)
        here = wait.waits_for
    return lines[path.index(here) :]


def _stage_wait(replay: Replay, stage: int) -> Wait:
    schedule = replay.schedule
    step = schedule.stages[stage][replay.position[stage]]
    subject = f"stage {stage} stands at {step} and waits"
    action = next(action for action in parts(step) if action.kind in replay.ends or not replay.ready(action))
    if action.kind in replay.ends:
        end = replay.ends[action.kind][action.virtual_stage]
        assert end is not None
        queue = replay.queues[stage, end.key]
        oldest = next(other for peer, is_send, other in queue if is_send and peer == end.peer)
        return _message_wait(
            replay, f"{subject} until {oldest} has left, which waits", stage, end.key, oldest
        )
    needed = _own_need(replay, action)
    if needed is not None:
        where = "runs in the same pair" if needed in parts(step) else "stands later in the same list"
        return Wait(f"{subject} for {needed}, which {where}", Waiting(stage))
    if not replay.has_messages:
        needed = _source(replay, action)
        place = schedule.placement[needed.virtual_stage]
        return Wait(f"{subject} for {needed}, {_not_there(replay, place)}", Waiting(place))
    receive = receive_of(schedule, action)
    assert receive is not None
    end = replay.ends[receive.kind][receive.virtual_stage]
    assert end is not None
    return _message_wait(replay, subject, stage, end.key, receive)


def _own_need(replay: Replay, action: Action) -> Action | None:
    """What a compute action needs of its own stage and has not got."""
    schedule = replay.schedule
    cell = action.virtual_stage * replay.width + action.microbatch
    if action.kind is not Kind.F and not replay.forward_done[cell]:
        return Action(Kind.F, action.virtual_stage, action.microbatch)
    source = _source(replay, action)
    is_here = schedule.placement[source.virtual_stage] == schedule.placement[action.virtual_stage]
    return source if is_here else None


def _source(replay: Replay, action: Action) -> Action:
    """The compute action that gives a compute action its input."""
    forward = action.kind is Kind.F
    source = (replay.schedule.previous if forward else replay.schedule.next)[action.virtual_stage]
    assert source is not None
    return Action(Kind.F if forward else Kind.I, source, action.microbatch)


def _message_wait(replay: Replay, subject: str, stage: int, key: tuple[int, ...], action: Action) -> Wait:
    """A stage's wait for one of its own operations, which is in its queue of the communicator
    `key`."""
    queue = replay.queues[stage, key]
    if queue[0][2] == action:
        return _head_wait(replay, subject, stage, key)
    head = queue[0][2]
    return Wait(f"{subject} for {action}, which is behind {head} in {_name(key)}", Waiting(stage, key))


def _queue_wait(replay: Replay, stage: int, key: tuple[int, ...]) -> Wait:
    return _head_wait(replay, f"{replay.queues[stage, key][0][2]} of stage {stage} waits", stage, key)


def _head_wait(replay: Replay, subject: str, stage: int, key: tuple[int, ...]) -> Wait:
    """What the operation at the head of a stage's queue waits for: its other end."""
    peer, is_send, action = replay.queues[stage, key][0]
    other_end = _other_end(replay, action, is_send)
    theirs = replay.queues[peer, key]
    if not any(queued == other_end for _, _, queued in theirs):
        return Wait(f"{subject} for {other_end}, {_not_there(replay, peer)}", Waiting(peer))
    where = f"which on stage {peer} is behind {theirs[0][2]} in {_name(key)}"
    return Wait(f"{subject} for {other_end}, {where}", Waiting(peer, key))


def _other_end(replay: Replay, action: Action, is_send: bool) -> Action:
    schedule = replay.schedule
    if is_send:
        return received_as(schedule, action)
    forward = action.kind is Kind.RECV_F
    source = (schedule.previous if forward else schedule.next)[action.virtual_stage]
    assert source is not None
    return Action(Kind.SEND_F if forward else Kind.SEND_B, source, action.microbatch)


def _not_there(replay: Replay, stage: int) -> str:
    line, at = replay.schedule.stages[stage], replay.position[stage]
    if at == len(line):
        return f"which is not in the list of stage {stage}"
    return f"which stage {stage} reaches only after {line[at]}"


def _name(key: tuple[int, ...]) -> str:
    """A communicator in words."""
    return f"the channel of stages {key[0]} and {key[1]}" if key else "the channel of all stages"
