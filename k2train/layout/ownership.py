"""Who updates which parameter under ZeRO-1: whole tensors by cost, or ranges of rows.

A rule that needs whole matrices (Muon orthogonalises them) gives each matrix exactly one owner
among the ranks that replicate it. The owner alone keeps its states and alone makes the update, so
matrices are dealt out by what the update costs. For an elementwise rule (AdamW) tensors are cut
into rows. Everything here is a function of integers: every rank computes the same answer without
talking to the others. Sources: docs/design.md, "MuonClip with ZeRO-1"; Graham, "Bounds on
multiprocessing timing anomalies" (1969), for the greedy rule and its bound.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

from k2train.config.errors import ConfigError


def assign_owners(costs: Sequence[float], num_owners: int) -> tuple[int, ...]:
    """An owner in `range(num_owners)` for each cost: dearest first, each to the least loaded owner.

    Deterministic: equal costs are taken in the order given, and of equally loaded owners the one
    with fewer items, then the lower number, is chosen. No owner gets more than the mean plus
    (1 - 1/num_owners) of the dearest item. Raises ConfigError for no owners or a negative cost.
    """
    _check_owners(num_owners)
    if any(cost < 0 for cost in costs):
        raise ConfigError("costs", min(costs), "a cost cannot be negative")
    owners = [0] * len(costs)
    loads: list[tuple[float, int, int]] = [(0, 0, owner) for owner in range(num_owners)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, count, owner = loads[0]
        heapq.heapreplace(loads, (load + costs[index], count + 1, owner))
        owners[index] = owner
    return tuple(owners)


def row_ranges(num_rows: int, num_owners: int) -> tuple[tuple[int, int], ...]:
    """The half-open range of rows of every owner, in order; sizes differ by at most one.

    The longer ranges come first. With fewer rows than owners the last ones are empty. Raises
    ConfigError for no owners or negative rows.
    """
    _check_owners(num_owners)
    if num_rows < 0:
        raise ConfigError("num_rows", num_rows, "must be at least 0")
    size, longer = divmod(num_rows, num_owners)
    starts = [owner * size + min(owner, longer) for owner in range(num_owners + 1)]
    return tuple(itertools.pairwise(starts))


def _check_owners(num_owners: int) -> None:
    if num_owners < 1:
        raise ConfigError("num_owners", num_owners, "must be at least 1")
