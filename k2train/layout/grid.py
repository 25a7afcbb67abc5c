"""The grid of ranks: which rank is where, and who talks to whom.

    rank = (pp_rank * edp + edp_rank) * ep + ep_rank

The expert axis is innermost, so that an all-to-all stays on neighbouring ranks (K2's 16 fill two
nodes of 8); the pipeline is outermost, because its messages are the smallest. Between them lie the
replicas of every expert. Dense parameters are replicated over a whole stage, which is the product
of the two inner axes. Source: docs/design.md, "Layout"; K2 report, section 2.4.2.

    pp 2, edp 2, ep 2      stage 0: [0 1] [2 3]      stage 1: [4 5] [6 7]      ep groups in brackets
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Axis = Literal["pp", "ep", "edp", "dp"]
"""Groups: `pp` the stages of one pipeline, `ep` one all-to-all, `edp` the replicas of an expert,
`dp` a whole stage."""
AXES: tuple[Axis, ...] = get_args(Axis)


class Coordinates(NamedTuple):
    """Where a rank stands."""

    pp_rank: int
    edp_rank: int
    ep_rank: int


@dataclass(frozen=True)
class RankGrid:
    """All ranks of a run, `pp * edp * ep` of them."""

    pp: int
    edp: int
    ep: int

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.pp * self.edp * self.ep

    @property
    def dp(self) -> int:
        """Data-parallel degree: the ranks of a stage, each with its own microbatches."""
        return self.edp * self.ep

    def rank_of(self, pp_rank: int, edp_rank: int, ep_rank: int) -> int:
        """The rank at these coordinates."""
        for index, size in zip((pp_rank, edp_rank, ep_rank), (self.pp, self.edp, self.ep), strict=True):
            _check(index, size)
        return (pp_rank * self.edp + edp_rank) * self.ep + ep_rank

    def coordinates(self, rank: int) -> Coordinates:
        """The inverse of `rank_of`."""
        _check(rank, self.world)
        outer, ep_rank = divmod(rank, self.ep)
        pp_rank, edp_rank = divmod(outer, self.edp)
        return Coordinates(pp_rank, edp_rank, ep_rank)

    def dp_rank(self, rank: int) -> int:
        """The rank's place among the ranks of its stage: `edp_rank * ep + ep_rank`."""
        return rank % self.dp

    def group(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The ranks of `rank`'s group along an axis, ascending, `rank` among them."""
        pp_rank, edp_rank, ep_rank = self.coordinates(rank)
        if axis == "pp":
            return tuple(self.rank_of(stage, edp_rank, ep_rank) for stage in range(self.pp))
        if axis == "ep":
            return tuple(self.rank_of(pp_rank, edp_rank, peer) for peer in range(self.ep))
        if axis == "edp":
            return tuple(self.rank_of(pp_rank, replica, ep_rank) for replica in range(self.edp))
        first = pp_rank * self.dp
        return tuple(range(first, first + self.dp))

    def relay_groups(self, rank: int, relay_ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of `rank`'s ep group, in runs of `relay_ranks`: the ranks of its run, and those at its
        place in every run."""
        group = self.group("ep", rank)
        run, place = divmod(group.index(rank), relay_ranks)
        return group[run * relay_ranks : (run + 1) * relay_ranks], group[place::relay_ranks]

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """All groups of an axis, by their first rank. Every rank is in exactly one of them."""
        return tuple(group for rank in range(self.world) if (group := self.group(axis, rank))[0] == rank)

    def previous_stage(self, rank: int) -> int:
        """The same place one stage earlier; stage 0 wraps round to the last, where interleaving
        sends it."""
        pp_rank, edp_rank, ep_rank = self.coordinates(rank)
        return self.rank_of((pp_rank - 1) % self.pp, edp_rank, ep_rank)

    def next_stage(self, rank: int) -> int:
        """The same place one stage later, wrapping round."""
        pp_rank, edp_rank, ep_rank = self.coordinates(rank)
        return self.rank_of((pp_rank + 1) % self.pp, edp_rank, ep_rank)


def _check(index: int, size: int) -> None:
    if not 0 <= index < size:
        raise IndexError(f"{index} is outside 0 .. {size - 1}")
