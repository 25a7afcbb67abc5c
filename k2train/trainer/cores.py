"""Which cores a launcher's process runs on: a share of its node's, beside its GPU where it has one.

**On CPUs.** The ranks of an expert-parallel group compute at the same time and have neighbouring
numbers, so they get different cores. Left to itself, the kernel puts two of them on one core for
milliseconds while another idles (measured: `make train`'s four processes on two cores take 1.09
times as long a step). Where processes share a core, each also asks to be scheduled as a batch job:
a message that arrives then does not interrupt the other's product, only to find itself waiting
again a moment later (measured on the same run: half the context switches and half the time in the
kernel, a step 1.07 to 1.2 times faster).

**On GPUs.** A rank keeps to the cores of its GPU's NUMA node, shared evenly with the other GPUs
there. That places its memory too: Linux takes a page from the node of the core that touches it
first (`MPOL_DEFAULT` in set_mempolicy(2)), so pinned buffers that are allocated inside lie beside
the GPU that copies them. A policy that was set outside, for example by `numactl --interleave`,
stays. Not yet run on a GPU.

The kernel's sysfs says which GPU, core and node belong together:

    /sys/bus/pci/devices/0000:1b:00.0/numa_node                     0, or -1 where the firmware does
                                                                    not say
    /sys/devices/system/node/node0/cpulist                          0-55,112-167
    /sys/devices/system/cpu/cpu3/topology/thread_siblings_list      3,115: the CPUs of one physical
                                                                    core
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SYSFS = Path("/sys")


def share_of_cores(cores: Sequence[T], local_rank: int, local_size: int) -> set[T]:
    """The cores of one of a node's processes: neighbours, shared evenly.

    Where there are more processes than cores, each gets one, in turns.
    """
    if local_size >= len(cores):
        return {cores[local_rank % len(cores)]}
    first, beyond = (len(cores) * rank // local_size for rank in (local_rank, local_rank + 1))
    return set(cores[first:beyond])


def cpus_of_share(cores: Sequence[frozenset[int]], local_rank: int, local_size: int) -> set[int]:
    """The CPUs of one process's share of `cores`, each of which is the set of a physical core's
    CPUs.

    A physical core is divided only where there are fewer of them than processes.
    """
    if local_size > len(cores):
        return share_of_cores(sorted(set().union(*cores)), local_rank, local_size)
    return set().union(*share_of_cores(cores, local_rank, local_size))


def cpus_near_gpu(
    local_rank: int,
    nodes: Sequence[int | None],
    cores: Sequence[frozenset[int]],
    cpus_of_nodes: Mapping[int, frozenset[int]],
) -> set[int]:
    """The CPUs of the process `local_rank`, whose GPU is the one with the same number.

    nodes: the NUMA node of every local rank's GPU; None where it is not known. cores: the CPUs of
    each physical core that the process may use. The ranks of a node's GPUs share its cores. They
    all use all of them where they are more than the cores, because a rank has several threads at
    work. Where the process may use no core of the node, or the node is not known, the ranks alike
    share all cores.
    """
    node = nodes[local_rank]
    near = [core for core in cores if node is not None and core <= cpus_of_nodes[node]] or cores
    ranks = [rank for rank, other in enumerate(nodes) if other == node]
    if len(ranks) > len(near):
        return set().union(*near)
    return cpus_of_share(near, ranks.index(local_rank), len(ranks))


def parse_cpu_list(text: str) -> frozenset[int]:
    """CPU numbers from sysfs's form, such as `0-3,8`."""
    ranges = (part.partition("-") for part in text.strip().split(",") if part)
    return frozenset(cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1))


def pci_address(gpu: Any) -> str:
    """A GPU's address as sysfs writes it (`0000:1b:00.0`), from what
    torch.cuda.get_device_properties says of it.

    The argument has no type because torch's stubs leave these three fields out.
    """
    return f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"


def numa_node(pci_address: str, sysfs: Path = SYSFS) -> int | None:
    """The NUMA node of a device, by its PCI address (`0000:1b:00.0`); None where the machine does
    not say."""
    try:
        node = int((sysfs / "bus/pci/devices" / pci_address / "numa_node").read_text())
    except OSError:
        return None
    return node if node >= 0 else None


def cpus_of_node(node: int, sysfs: Path = SYSFS) -> frozenset[int]:
    """The CPUs of a NUMA node."""
    return parse_cpu_list((sysfs / f"devices/system/node/node{node}/cpulist").read_text())


def physical_cores(cpus: Iterable[int], sysfs: Path = SYSFS) -> list[frozenset[int]]:
    """`cpus`, grouped by the physical core they are threads of, in the order of each group's
    smallest."""
    allowed = frozenset(cpus)
    return sorted({_siblings(cpu, sysfs) & allowed for cpu in allowed}, key=min)


def _siblings(cpu: int, sysfs: Path) -> frozenset[int]:
    try:
        text = (sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:  # some virtual machines do not say
        return frozenset({cpu})
    return parse_cpu_list(text) | {cpu}


def cpus_of_process(
    cpus: Iterable[int], local_rank: int, local_size: int, gpus: Sequence[str] = (), sysfs: Path = SYSFS
) -> set[int]:
    """Which of `cpus`, those that it may use, a process keeps to. gpus: as in bound_to_cores."""
    cores = physical_cores(cpus, sysfs)
    if not gpus:
        return cpus_of_share(cores, local_rank, local_size)
    nodes = [numa_node(address, sysfs) for address in gpus[:local_size]]
    cpus_of_nodes = {node: cpus_of_node(node, sysfs) for node in nodes if node is not None}
    return cpus_near_gpu(local_rank, nodes, cores, cpus_of_nodes)


@contextlib.contextmanager
def bound_to_cores(environment: Mapping[str, str], gpus: Sequence[str] = ()) -> Iterator[None]:
    """Keep this process to its share, by the launcher's LOCAL_RANK and LOCAL_WORLD_SIZE, of the
    cores it may use.

    gpus: on GPUs, the PCI addresses of all that the process sees, in their order; its own is number
    LOCAL_RANK. On CPUs, with more processes than cores, it is a batch job, too. Threads that run
    already are bound with it, and threads started inside inherit what holds then. Does nothing
    without a launcher, and outside Linux.
    """
    if sys.platform != "linux" or "LOCAL_WORLD_SIZE" not in environment:
        yield
        return
    before, policy = os.sched_getaffinity(0), os.sched_getscheduler(0)
    rank, size = (int(environment[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    bound = _move_threads(before, cpus_of_process(before, rank, size, gpus))
    if not gpus and size > len(before) and policy == os.SCHED_OTHER:
        with contextlib.suppress(PermissionError):  # a container may forbid it; it is only faster
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        for thread in bound:
            _move_thread(thread, before)
        if os.sched_getscheduler(0) != policy:
            os.sched_setscheduler(0, policy, os.sched_param(0))


def _move_threads(before: set[int], cpus: set[int]) -> list[int]:
    """Bind this process's threads, but those that somebody has bound already; the ids of those it
    has bound."""
    threads = [int(entry.name) for entry in Path("/proc/self/task").iterdir()]
    return [thread for thread in threads if _allowed(thread) == before and _move_thread(thread, cpus)]


def _allowed(thread: int) -> set[int]:
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:  # it has ended meanwhile
        return set()


def _move_thread(thread: int, cpus: set[int]) -> bool:
    try:
        os.sched_setaffinity(thread, cpus)
    except ProcessLookupError:
        return False
    return True
