"""The groups a rank belongs to: one Communicator each, made once from the layout."""

from __future__ import annotations

import dataclasses

from k2train.parallel.communicator import Communicator


@dataclasses.dataclass(frozen=True)
class Groups:
    """One rank's groups.

    world: all ranks. pp: the same place in every stage. ep: the ranks that share out one copy of the experts.
    edp: the replicas of this rank's experts. dp: the whole stage (edp x ep), which replicates everything else.
    """

    world: Communicator
    pp: Communicator
    ep: Communicator
    edp: Communicator
    dp: Communicator


def single_rank_groups(world: Communicator) -> Groups:
    """The groups of a world of one."""
    assert world.size == 1
    return Groups(world=world, pp=world, ep=world, edp=world, dp=world)
