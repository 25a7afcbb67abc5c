"""Which cores a process runs on: on CPUs each process of a launcher keeps to its own share of a node's.

The ranks of an expert-parallel group compute at the same time and have neighbouring numbers, so they get different cores;
left to itself, the kernel puts two of them on one core for milliseconds while another idles (measured: `make train`'s
four processes on two cores take 1.09 times as long a step).

Where processes share a core, each also asks to be scheduled as a batch job: a message that arrives then does not interrupt
the other's product, only to find itself waiting again a moment later (measured on the same run: half the context
switches and half the time in the kernel, a step 1.07 to 1.2 times faster).
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

    With more processes than cores it is a batch job, too. Threads started inside inherit both. Does nothing without a
    launcher, and outside Linux.
    """
    if sys.platform != "linux" or "LOCAL_WORLD_SIZE" not in environment:
        yield
        return
    before, policy = os.sched_getaffinity(0), os.sched_getscheduler(0)
    rank, size = (int(environment[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    os.sched_setaffinity(0, share_of_cores(sorted(before), rank, size))
    if size > len(before) and policy == os.SCHED_OTHER:
        with contextlib.suppress(PermissionError):  # a container may forbid it; it is only faster
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, os.sched_param(0))
