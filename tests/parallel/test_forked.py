"""Forked ranks, when earlier groups of this process are garbage that nobody has collected."""

from __future__ import annotations

import gc

import torch

from k2train.parallel.communicator import Communicator, World
from k2train.parallel.processes import process_world
from k2train.parallel.testing import run_distributed_test


class Loop:
    """Keeps a group alive in a cycle."""

    def __init__(self, group: Communicator) -> None:
        self.me, self.group = self, group


def collecting(world: World) -> int:
    gc.collect()
    return world.rank


def test_a_forked_rank_that_collects_garbage_does_not_wait_for_threads_it_does_not_have() -> None:
    gc.disable()
    try:
        with process_world("single", torch.device("cpu")) as world:
            Loop(world.group("left", [0]))
        assert run_distributed_test(collecting, 2, "processes") == [0, 1]
    finally:
        gc.enable()
