"""Channels: which messages wait behind each other, and what a run must know of its messages.

A communicator is a queue. NCCL runs what a rank gives to one communicator in the order in which it
was given, and a message of more than a few megabytes moves only while both of its ends are at the
head of their queues (rendezvous). So it matters which messages share a communicator:

    ordered pair     one for each ordered pair of stages: stage 3 to stage 4 is one queue, stage 4
                     to stage 3 another
    unordered pair   one for each two stages: what goes back queues behind what goes forward. torch
                     does this with single sends and receives in a group over NCCL that was made
                     without a `device_id`
    one              one for all stages. torch does this where a `device_id` was given

The schedules are built for ordered pairs, and `validate` proves them for ordered pairs. `replay.py`
holds a schedule against any of the three.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import Enum

from k2train.schedule.actions import Action, Kind, Pair
from k2train.schedule.errors import ScheduleError
from k2train.schedule.p2p import received_as
from k2train.schedule.program import Schedule


class ChannelForm(str, Enum):
    """Which messages share a communicator; the value says it in words, for errors."""

    ORDERED_PAIR = "a communicator for every ordered pair of stages"
    UNORDERED_PAIR = "a communicator for every two stages, for both directions"
    ONE = "a communicator for all stages"

    def __str__(self) -> str:
        return self.value

    def key(self, source: int, target: int) -> tuple[int, ...]:
        """What names the communicator of a message from stage `source` to stage `target`."""
        if self is ChannelForm.ORDERED_PAIR:
            return source, target
        if self is ChannelForm.UNORDERED_PAIR:
            return min(source, target), max(source, target)
        return ()


@dataclass(frozen=True)
class MessageEnd:
    """Where the messages of one kind and one virtual stage go to or come from.

    peer: the stage at the other end. key: the communicator, by `ChannelForm.key`.
    """

    is_send: bool
    stage: int
    peer: int
    key: tuple[int, ...]


def message_ends(schedule: Schedule, form: ChannelForm) -> dict[Kind, list[MessageEnd | None]]:
    """For each kind of message and each virtual stage its end there, None where no other stage is
    involved."""
    ends: dict[Kind, list[MessageEnd | None]] = {}
    for kind, around, is_send in (
        (Kind.SEND_F, schedule.next, True),
        (Kind.RECV_F, schedule.previous, False),
        (Kind.SEND_B, schedule.previous, True),
        (Kind.RECV_B, schedule.next, False),
    ):
        ends[kind] = [
            _end(schedule.placement[vs], schedule.placement[other], is_send, form)
            if other is not None and schedule.placement[other] != schedule.placement[vs]
            else None
            for vs, other in enumerate(around)
        ]
    return ends


def _end(stage: int, peer: int, is_send: bool, form: ChannelForm) -> MessageEnd:
    source, target = (stage, peer) if is_send else (peer, stage)
    return MessageEnd(is_send, stage, peer, form.key(source, target))


def message_pairs(schedule: Schedule) -> tuple[tuple[int, int], ...]:
    """The ordered pairs of stages (from, to) that exchange messages, ascending."""
    ends = message_ends(schedule, ChannelForm.ORDERED_PAIR)
    sends = [*ends[Kind.SEND_F], *ends[Kind.SEND_B]]
    return tuple(sorted({(end.stage, end.peer) for end in sends if end is not None}))


def check_order(schedule: Schedule) -> None:
    """Every ordered pair of stages: the sequence of RECVs is that of the SENDs. Raises
    ScheduleError."""
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
