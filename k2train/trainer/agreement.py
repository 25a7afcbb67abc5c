"""Ranks that are processes compile for themselves; here they make sure that they compiled the same.

Each was started with words of its own, perhaps on another machine with another version of this
program. Two programs that differ would meet in the middle of a step, as a message that never comes
or as numbers that are silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch

from k2train.config.errors import ConfigError
from k2train.parallel.communicator import Communicator
from k2train.parallel.objects import broadcast_object
from k2train.program import Program


def agree_on_program(program: Program, world: Communicator, device: torch.device) -> None:
    """Raise the same ConfigError on every rank where a rank has another program than rank 0.

    Every rank of the world must call it, before any other group is made: two broadcasts and a
    gather, and two more broadcasts where a rank differs.
    """
    mine = {"words": program.words, "fingerprint": program.fingerprint}
    first = broadcast_object(world, mine, 0, device)
    differs = torch.tensor([int(first["fingerprint"] != program.fingerprint)], device=device)
    all_differ = torch.zeros(world.size, dtype=differs.dtype, device=device)
    world.all_gather(all_differ, differs)
    others = [rank for rank, flag in enumerate(all_differ.tolist()) if flag]
    if not others:
        return
    found = broadcast_object(world, first_difference(first["words"], program.words), others[0], device)
    raise disagreement(others, found)


def first_difference(theirs: dict[str, Any], mine: dict[str, Any]) -> list[Any] | None:
    """[key, rank 0's value, this rank's] of the first key that two configs give different values;
    None for none."""
    for key in sorted(theirs.keys() | mine.keys()):
        pair = [theirs.get(key), mine.get(key)]
        if pair[0] != pair[1]:
            return [key, *pair]
    return None


def disagreement(others: list[int], found: list[Any] | None) -> ConfigError:
    """others: the ranks that differ from rank 0. found: `first_difference` of the first of them."""
    listed = ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")
    who = f"rank(s) {listed} compiled another program than rank 0"
    if found is None:
        return ConfigError(
            "config",
            f"of rank {others[0]}",
            f"{who} from the same words, so they run another version of k2train",
            "install one version on every machine",
        )
    key, first, own = found
    return ConfigError(
        key,
        own,
        f"{who}: rank {others[0]} was started with this value and rank 0 with {first}",
        "start every rank with the same words",
    )
