"""The groups a rank belongs to: one Communicator each, made once from the layout."""

from __future__ import annotations

import dataclasses

from k2train.layout.grid import RankGrid
from k2train.parallel.communicator import Communicator, World


@dataclasses.dataclass(frozen=True)
class Groups:
    """One rank's groups.

    world: all ranks. pp: the same place in every stage. ep: the ranks that share out one copy of the experts.
    edp: the replicas of this rank's experts. dp: the whole stage (edp x ep), which replicates everything else.
    relay: the ranks of the ep group among which a token is passed on, None where none is. rail: those at this rank's place
    in every such part of the ep group, None where there is one.
    """

    world: Communicator
    pp: Communicator
    ep: Communicator
    edp: Communicator
    dp: Communicator
    relay: Communicator | None = None
    rail: Communicator | None = None


def build_groups(grid: RankGrid, world: World, relay_ranks: int | None = None) -> Groups:
    """One rank's groups. Every rank of the world must call it.

    relay_ranks: `Layout.relay_ranks`; None where every expert is sent its own copy. Groups of equal ranks are still
    separate, so that one axis's traffic does not queue behind another's.
    """
    assert grid.world == world.size, f"the layout has {grid.world} ranks, the world {world.size}"
    groups = Groups(
        world=world.group("world", range(world.size)),
        pp=world.group("pp", grid.group("pp", world.rank)),
        ep=world.group("ep", grid.group("ep", world.rank)),
        edp=world.group("edp", grid.group("edp", world.rank)),
        dp=world.group("dp", grid.group("dp", world.rank)),
    )
    if relay_ranks is None:
        return groups
    neighbours, places = grid.relay_groups(world.rank, relay_ranks)
    relay = world.group("relay", neighbours)
    return dataclasses.replace(
        groups, relay=relay, rail=world.group("rail", places) if len(places) > 1 else None
    )
