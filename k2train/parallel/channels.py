"""The channels between pipeline stages: communicators that carry messages and nothing else.

For every ordered pair of neighbouring stages there is one (`schedule/channels.py` says why), and a
rank makes only those it takes part in. Making a communicator is itself a rendezvous: NCCL makes one
when it is first used, gloo when the group is formed, and both hold the caller until the other rank
comes. So channels are made and used once before the first step, in rounds. In a round every stage
has at most one partner:

    round 0   stages 0 and 1 | 2 and 3 | ...          forward, then back
    round 1   stages 1 and 2 | 3 and 4 | ... | last and 0

All ranks go through the rounds in one order, so nobody can wait for somebody who waits for him; and
as the pairs of a round are made side by side, start-up does not grow with the number of stages.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from k2train.parallel.communicator import Communicator, Work, World
from k2train.schedule.channels import ChannelForm
from k2train.schedule.messages import Messages, check_channels


@dataclass(frozen=True)
class Channel:
    """One end of a channel. peer: the other end's rank in `group`."""

    group: Communicator
    peer: int

    def start_send(self, t: torch.Tensor) -> Work:
        return self.group.start_send(t, self.peer)

    def start_recv(self, t: torch.Tensor) -> Work:
        return self.group.start_recv(t, self.peer)


@dataclass(frozen=True)
class Channels:
    """A rank's ends of all channels, by the stage at the other end.

    max_sends: how many messages may be under way to any one other stage (`Messages.max_sends`,
    which proves that they are enough).
    """

    outgoing: Mapping[int, Channel]
    incoming: Mapping[int, Channel]
    max_sends: int


def build_channels(messages: Messages, ranks: Sequence[int], world: World) -> Channels:
    """A rank's channels, each used once. Every rank of the world must call it, those of one
    pipeline together.

    ranks: the global ranks of this rank's pipeline, by stage. Raises ConfigError where the
    schedules need more than the world provides.
    """
    check_channels(messages, world.channel_form)
    return make_channels(messages, ranks, world)


def make_channels(messages: Messages, ranks: Sequence[int], world: World) -> Channels:
    """`build_channels` without its check."""
    stage = ranks.index(world.rank)
    if world.channel_form is ChannelForm.ORDERED_PAIR:
        outgoing, incoming = _separate(messages, ranks, world)
    else:
        # In these forms the communicator itself decides what shares a queue.
        group = world.group("pipeline messages", ranks)
        outgoing = {target: Channel(group, target) for source, target in messages.pairs if source == stage}
        incoming = {source: Channel(group, source) for source, target in messages.pairs if target == stage}
    return Channels(outgoing, incoming, messages.max_sends[stage])


def rounds_of_pairs(pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The neighbours among `pairs` (low, high), in rounds that name no stage twice: two rounds for
    an even ring."""
    rounds: list[list[tuple[int, int]]] = []
    for pair in sorted({(min(pair), max(pair)) for pair in pairs}):
        for together in rounds:
            if not any(set(pair) & set(other) for other in together):
                together.append(pair)
                break
        else:
            rounds.append([pair])
    return rounds


def _separate(
    messages: Messages, ranks: Sequence[int], world: World
) -> tuple[dict[int, Channel], dict[int, Channel]]:
    """A communicator for each ordered pair this rank is in: outgoing and incoming, by the other
    stage."""
    stage = ranks.index(world.rank)
    outgoing: dict[int, Channel] = {}
    incoming: dict[int, Channel] = {}
    for together, forward in itertools.product(rounds_of_pairs(messages.pairs), (True, False)):
        pair = next((pair for pair in together if stage in pair), None)
        if pair is None:
            # Every rank makes equally many groups, as `World.group` asks.
            world.group("no channel", [world.rank])
            continue
        source, target = pair if forward else pair[::-1]
        group = world.group(f"stage {source} to {target}", sorted(ranks[end] for end in pair))
        is_source = source == stage
        channel = Channel(group, 1 - group.rank)
        (outgoing if is_source else incoming)[target if is_source else source] = channel
        _use_once(channel, is_source, world.device)
    return outgoing, incoming


def _use_once(channel: Channel, is_source: bool, device: torch.device) -> None:
    """One number from end to end: both ranks of the channel call it."""
    token = torch.zeros(1, device=device)
    (channel.start_send(token) if is_source else channel.start_recv(token)).wait_host()
