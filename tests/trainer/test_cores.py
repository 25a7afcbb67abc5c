"""Cores of a node's processes: shared evenly, neighbours in number on different cores, beside the
process's GPU."""

from __future__ import annotations

import builtins
import itertools
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from k2train.trainer.cores import (
    bound_to_cores,
    cpus_near_gpu,
    cpus_of_process,
    cpus_of_share,
    numa_node,
    parse_cpu_list,
    physical_cores,
    share_of_cores,
)
from k2train.trainer.worlds import gpu_addresses

linux = pytest.mark.skipif(sys.platform != "linux", reason="binding is for Linux")


def make_sysfs(root: Path, cores_per_node: int, gpu_nodes: Iterable[int]) -> list[str]:
    """A machine of two NUMA nodes, two CPUs a core, numbered as x86 does: all first threads, then
    all second ones.

    Returns the GPUs' PCI addresses, in the order of `gpu_nodes`.
    """
    num_cores = 2 * cores_per_node
    for node in range(2):
        first = node * cores_per_node
        ranges = [f"{start}-{start + cores_per_node - 1}" for start in (first, first + num_cores)]
        write(root / f"devices/system/node/node{node}/cpulist", ",".join(ranges))
    for cpu in range(2 * num_cores):
        siblings = f"{cpu % num_cores},{cpu % num_cores + num_cores}"
        write(root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
    addresses = [f"0000:{0x1B + index:02x}:00.0" for index, _ in enumerate(gpu_nodes)]
    for address, node in zip(addresses, gpu_nodes, strict=True):
        write(root / f"bus/pci/devices/{address}/numa_node", str(node))
    return addresses


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


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


@pytest.mark.parametrize("size", range(1, 10))
def test_a_physical_core_is_divided_only_where_processes_are_more(size: int) -> None:
    cores = [frozenset({core, core + 4}) for core in range(4)]
    shares = [cpus_of_share(cores, rank, size) for rank in range(size)]
    assert set().union(*shares) == set(range(8))
    if size <= 4:
        assert all(core <= share or core.isdisjoint(share) for core in cores for share in shares)
    if size == 8:
        assert sorted(shares, key=min) == [{cpu} for cpu in range(8)]


@pytest.mark.parametrize("text", ["0-3,8,10-11", " 0-3,8,10-11\n"])
def test_a_list_of_cpus_is_read(text: str) -> None:
    assert parse_cpu_list(text) == {0, 1, 2, 3, 8, 10, 11}
    assert parse_cpu_list("\n") == set()  # a node with memory alone


def test_a_gpu_without_a_known_node_has_none(tmp_path: Path) -> None:
    (address,) = make_sysfs(tmp_path, 2, [-1])
    assert numa_node(address, tmp_path) is None
    assert numa_node("0000:ff:00.0", tmp_path) is None


@pytest.mark.parametrize("gpu_nodes", [(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1), (1,)])
@pytest.mark.parametrize("cores_per_node", [6, 12])
def test_ranks_get_the_cores_that_torchrun_would_bind_them_to(
    gpu_nodes: tuple[int, ...], cores_per_node: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is `torchrun --numa-binding=exclusive`, reading the same files; all counts divide
    evenly here."""
    binding = pytest.importorskip("torch.numa.binding")
    addresses = make_sysfs(tmp_path, cores_per_node, gpu_nodes)
    cpus = set(range(4 * cores_per_node))
    size = len(gpu_nodes)
    properties = [
        SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B + index, pci_device_id=0) for index in range(size)
    ]
    real_open = builtins.open

    def open_there(path: Any, *args: Any, **kwargs: Any) -> Any:
        name = str(path)
        return real_open(tmp_path / name[5:] if name.startswith("/sys/") else path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", open_there)
        patch.setattr(torch.cuda, "device_count", lambda: size)
        patch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
        patch.setattr(os, "sched_getaffinity", lambda thread: cpus)
        assert gpu_addresses(torch.device("cuda")) == addresses
        theirs = [binding._exclusive_get_logical_cpus_to_bind_to(gpu_index=rank) for rank in range(size)]
    ours = [cpus_of_process(cpus, rank, size, addresses, tmp_path) for rank in range(size)]
    assert ours == theirs


def test_ranks_without_a_core_near_their_gpu_share_all(tmp_path: Path) -> None:
    addresses = make_sysfs(tmp_path, 4, (0, 0, 1, 1))
    allowed = set(range(4))  # a container that was given cores of node 0 alone
    near = [cpus_of_process(allowed, rank, 4, addresses, tmp_path) for rank in range(4)]
    assert near == [{0, 1}, {2, 3}, {0, 1}, {2, 3}]


@pytest.mark.parametrize("nodes", [(None, None, None), (0, 0, 0)])
def test_ranks_of_more_gpus_than_cores_all_use_all_cores(nodes: tuple[int | None, ...]) -> None:
    cores = [frozenset({0, 2}), frozenset({1, 3})]
    shares = [cpus_near_gpu(rank, nodes, cores, {0: frozenset(range(4))}) for rank in range(3)]
    assert shares == [{0, 1, 2, 3}] * 3


@linux
def test_every_cpu_of_this_machine_is_in_one_physical_core() -> None:
    cpus = os.sched_getaffinity(0)
    cores = physical_cores(cpus)
    assert sorted(cpu for core in cores for cpu in core) == sorted(cpus)


@linux
def test_a_process_is_bound_inside_and_free_again_after() -> None:
    before = os.sched_getaffinity(0)
    with bound_to_cores({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "64"}):
        assert os.sched_getaffinity(0) == {sorted(before)[1 % len(before)]}
    assert os.sched_getaffinity(0) == before
    with bound_to_cores({}):
        assert os.sched_getaffinity(0) == before


@linux
def test_threads_that_run_already_are_bound_too_and_free_again_after() -> None:
    before = os.sched_getaffinity(0)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with bound_to_cores({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "64"}):
            assert os.sched_getaffinity(thread.native_id or 0) == {min(before)}
        assert os.sched_getaffinity(thread.native_id or 0) == before
    finally:
        done.set()
        thread.join()


@linux
@pytest.mark.parametrize("sharing", [True, False])
def test_only_processes_that_share_a_core_are_batch_jobs_and_only_inside(sharing: bool) -> None:
    size = len(os.sched_getaffinity(0)) + sharing
    with bound_to_cores({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(size)}):
        assert os.sched_getscheduler(0) == (os.SCHED_BATCH if sharing else os.SCHED_OTHER)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@linux
def test_a_process_with_a_gpu_is_never_a_batch_job() -> None:
    size = len(os.sched_getaffinity(0)) + 1
    with bound_to_cores({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(size)}, ["0000:ff:00.0"] * size):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
