"""The groups a rank belongs to: one Communicator each, made once from the layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from k2train.layout.grid import RankGrid
from k2train.parallel.channels import Channels, build_channels
from k2train.parallel.communicator import Communicator, World
from k2train.schedule.messages import Messages


@dataclasses.dataclass(frozen=True)
class Groups:
    """One rank's groups.

    world: all ranks. pp: the same place in every stage. ep: the ranks that share out one copy of
    the experts. edp: the replicas of this rank's experts. dp: the whole stage (edp x ep), which
    replicates everything else. relay: the ranks of the ep group among which a token is passed on,
    None where none is. rail: those at this rank's place in every such part of the ep group, None
    where there is one. channels: the messages between stages, None where there are none.
    """

    world: Communicator
    pp: Communicator
    ep: Communicator
    edp: Communicator
    dp: Communicator
    relay: Communicator | None = None
    rail: Communicator | None = None
    channels: Channels | None = None


def build_groups(
    grid: RankGrid,
    world: World,
    relay_ranks: int | None = None,
    messages: Messages | None = None,
    agree: Callable[[Communicator], None] | None = None,
) -> Groups:
    """One rank's groups, each used once. Every rank of the world must call it.

    relay_ranks: `Layout.relay_ranks`; None where every expert is sent its own copy. messages: what
    the schedules ask of the channels between stages; None where no messages are sent. agree: called
    with the group of all ranks before another one is made, to raise where ranks would make
    different ones. Groups of equal ranks are still separate, so that one axis's traffic does not
    queue behind another's. Raises ConfigError where the schedules need more than the world
    provides.
    """
    assert grid.world == world.size, f"the layout has {grid.world} ranks, the world {world.size}"
    everybody = world.group("world", range(world.size))
    if agree is not None:
        agree(everybody)
    groups = Groups(
        world=everybody,
        pp=world.group("pp", grid.group("pp", world.rank)),
        ep=world.group("ep", grid.group("ep", world.rank)),
        edp=world.group("edp", grid.group("edp", world.rank)),
        dp=world.group("dp", grid.group("dp", world.rank)),
    )
    if relay_ranks is not None:
        neighbours, places = grid.relay_groups(world.rank, relay_ranks)
        relay = world.group("relay", neighbours)
        rail = world.group("rail", places) if len(places) > 1 else None
        groups = dataclasses.replace(groups, relay=relay, rail=rail)
    warm_up(groups, world.device)
    if messages is None or not messages.pairs:
        return groups
    channels = build_channels(messages, grid.group("pp", world.rank), world)
    return dataclasses.replace(groups, channels=channels)


def warm_up(groups: Groups, device: torch.device) -> None:
    """Run every collective that a group is used for, once, and wait for it. Every rank of the world
    must call it.

    NCCL makes a communicator and its connections, and loads its kernels, when they are first used,
    and may hold the host or the device meanwhile. A posted receive keeps the device busy until its
    message comes; a first use behind it could wait for a rank that waits for this one. All ranks go
    through the groups in one order, so nothing waits in a circle.
    """
    for group in (groups.world, groups.pp):
        group.all_reduce(torch.zeros(1, device=device))
        group.broadcast(torch.zeros(1, device=device), 0)
    for group in (groups.edp, groups.dp):
        whole = torch.zeros(group.size, device=device)
        group.reduce_scatter(whole[group.rank : group.rank + 1], whole)
        group.all_gather(whole, whole[group.rank : group.rank + 1])
    for exchange in (groups.ep, groups.relay, groups.rail):
        if exchange is not None:
            whole = torch.zeros(exchange.size, device=device)
            exchange.all_to_all(torch.empty_like(whole), whole)
            exchange.all_gather(whole, whole[exchange.rank : exchange.rank + 1])
    groups.world.barrier()
