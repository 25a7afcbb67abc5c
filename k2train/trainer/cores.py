"""Which cores a process runs on: on CPUs each process of a launcher keeps to its own share of a node's.

The ranks of an expert-parallel group compute at the same time and have neighbouring numbers, so they get different cores;
left to itself, the kernel puts two of them on one core for milliseconds while another idles (measured: `make train`'s
four processes on two cores take 1.09 times as long a step).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence


def share_of_cores(cores: Sequence[int], local_rank: int, local_size: int) -> set[int]:
    """The cores of one of a node's processes: neighbours, as evenly many as they go; one, in turns, where processes are more."""
    if local_size >= len(cores):
        return {cores[local_rank % len(cores)]}
    first, beyond = (len(cores) * rank // local_size for rank in (local_rank, local_rank + 1))
    return set(cores[first:beyond])


@contextlib.contextmanager
def bound_to_cores(environment: Mapping[str, str]) -> Iterator[None]:
    """Keep this process to its share, by the launcher's LOCAL_RANK and LOCAL_WORLD_SIZE, of the cores it may use.

    Threads started inside inherit it. Does nothing without a launcher, and outside Linux.
    """
    if sys.platform != "linux" or "LOCAL_WORLD_SIZE" not in environment:
        yield
        return
    before = os.sched_getaffinity(0)
    rank, size = (int(environment[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    os.sched_setaffinity(0, share_of_cores(sorted(before), rank, size))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
