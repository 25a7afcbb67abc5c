"""Cores of a node's processes: all used, shared evenly, neighbours in number on different cores."""

from __future__ import annotations

import itertools
import os
import sys

import pytest

from k2train.trainer.cores import bound_to_cores, share_of_cores


@pytest.mark.parametrize("num_cores", range(1, 9))
@pytest.mark.parametrize("size", range(1, 12))
def test_shares_use_every_core_evenly(num_cores: int, size: int) -> None:
    cores = [3 * core + 1 for core in range(num_cores)]
    shares = [share_of_cores(cores, rank, size) for rank in range(size)]
    assert set().union(*shares) == set(cores)
    users = [sum(core in share for share in shares) for core in cores]
    assert max(users) - min(users) <= 1
    sizes = [len(share) for share in shares]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    if num_cores > 1:
        assert all(a.isdisjoint(b) for a, b in itertools.pairwise(shares))


@pytest.mark.skipif(sys.platform != "linux", reason="binding is for Linux")
def test_a_process_is_bound_inside_and_free_again_after() -> None:
    before = os.sched_getaffinity(0)
    with bound_to_cores({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "64"}):
        assert os.sched_getaffinity(0) == {sorted(before)[1 % len(before)]}
    assert os.sched_getaffinity(0) == before
    with bound_to_cores({}):
        assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(sys.platform != "linux", reason="policies are Linux's")
@pytest.mark.parametrize("sharing", [True, False])
def test_only_processes_that_share_a_core_are_batch_jobs_and_only_inside(sharing: bool) -> None:
    size = len(os.sched_getaffinity(0)) + sharing
    with bound_to_cores({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(size)}):
        assert os.sched_getscheduler(0) == (os.SCHED_BATCH if sharing else os.SCHED_OTHER)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
