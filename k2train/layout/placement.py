"""Where the parts of a model stand: the stage (pp_rank) of every part, in the order of the model.

    looped, 2 stages, 2 parts on each     0 1 0 1     part p on stage p % pp
    folded, 2 stages                      0 1 1 0     down the stages and back up, a V

Layouts are cut by it and schedules are built over it, so the two cannot disagree.
"""

from __future__ import annotations


def looped(pp: int, vpp: int) -> tuple[int, ...]:
    """`vpp` parts on each of `pp` stages, round and round."""
    return tuple(range(pp)) * vpp


def folded(pp: int) -> tuple[int, ...]:
    """Two parts on each of `pp` stages: the first half of them goes down the stages, the second
    comes back."""
    return (*range(pp), *range(pp - 1, -1, -1))
