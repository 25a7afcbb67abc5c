"""The same properties for every implementation of Communicator: threads, and gloo processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import pytest
import torch

from k2train.config.errors import ConfigError
from k2train.parallel.communicator import CommunicationError, Communicator, World
from k2train.parallel.processes import process_world
from k2train.parallel.testing import RankFailedError, run_distributed_test

Backend = Literal["threads", "processes"]
BACKENDS: list[Backend] = ["threads", "processes"]
SIZES = [1, 2, 3, 5]
ARITHMETIC = [torch.float32, torch.float64, torch.bfloat16, torch.int64]
DTYPES = [*ARITHMETIC, torch.uint8, torch.float8_e4m3fn]


def everyone(world: World) -> Communicator:
    return world.group("all", range(world.size))


def values(rank: int, count: int, dtype: torch.dtype, columns: int = 2) -> torch.Tensor:
    """Small whole numbers that say who and where; sums of few of them are exact in every type."""
    flat = torch.arange(count * columns, dtype=torch.float32) % 4 + rank
    return flat.view(count, columns).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.float(), b.float())


def each(check: Callable[[Communicator, World], None], backend: Backend, size: int) -> None:
    run_distributed_test(lambda world: check(everyone(world), world), size, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_reductions_give_sum_and_maximum_everywhere(backend: Backend, size: int) -> None:
    def check(group: Communicator, world: World) -> None:
        for dtype in ARITHMETIC:
            t = values(world.rank, 3, dtype)
            group.all_reduce(t)
            assert same(t, torch.stack([values(rank, 3, dtype) for rank in range(size)]).sum(0).to(dtype))
            t = values(-world.rank, 3, dtype)
            group.all_reduce(t, op="max")
            assert same(t, values(0, 3, dtype))

    each(check, backend, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_all_gather_concatenates_even_and_uneven_parts(backend: Backend, size: int) -> None:
    def check(group: Communicator, world: World) -> None:
        for dtype, splits in itertools.product(
            DTYPES, [None, [2] * size, list(range(size)), [3] + [0] * (size - 1)]
        ):
            lengths = splits or [2] * size
            whole = torch.cat(
                [values(rank, length, dtype).float() for rank, length in enumerate(lengths)]
            ).to(dtype)
            out = torch.zeros(whole.shape, dtype=torch.float32).to(dtype)
            group.all_gather(out, values(world.rank, lengths[world.rank], dtype), splits)
            assert same(out, whole)

    each(check, backend, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter_leaves_every_rank_its_part_of_the_sum(backend: Backend, size: int) -> None:
    def check(group: Communicator, world: World) -> None:
        for dtype, splits in itertools.product(
            ARITHMETIC, [None, [2] * size, list(range(size)), [3] + [0] * (size - 1)]
        ):
            lengths = splits or [2] * size
            total = torch.stack([values(rank, sum(lengths), dtype) for rank in range(size)]).sum(0).to(dtype)
            expected = total.split(lengths)[world.rank]
            out = torch.zeros_like(expected)
            group.reduce_scatter(out, values(world.rank, sum(lengths), dtype), splits)
            assert same(out, expected)

    each(check, backend, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_bucket_collectives_work_in_place(backend: Backend, size: int) -> None:
    """The output of a reduce-scatter may be the rank's own part of the input, and the input of an
    all-gather likewise."""

    def check(group: Communicator, world: World) -> None:
        for splits in ([2] * size, [1 + rank for rank in range(size)], [0] * (size - 1) + [4]):
            flat = values(world.rank, sum(splits), torch.float32)
            own = flat.split(splits)[world.rank]
            group.reduce_scatter(own, flat, splits)
            total = torch.stack([values(rank, sum(splits), torch.float32) for rank in range(size)]).sum(0)
            assert same(own, total.split(splits)[world.rank])
            group.all_gather(flat, own, splits)
            assert same(flat, total)

    each(check, backend, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_all_to_all_transposes_uneven_parts_with_zeros(backend: Backend, size: int) -> None:
    def check(group: Communicator, world: World) -> None:
        for dtype in DTYPES:
            for seed in range(3):
                generator = torch.Generator().manual_seed(seed)
                counts = torch.randint(0, 4 if seed else 1, (size, size), generator=generator)
                sent = [
                    values(10 * world.rank + peer, int(counts[world.rank, peer]), dtype)
                    for peer in range(size)
                ]
                got = [
                    values(10 * peer + world.rank, int(counts[peer, world.rank]), dtype)
                    for peer in range(size)
                ]
                out = torch.zeros(int(counts[:, world.rank].sum()), 2).to(dtype)
                group.all_to_all(
                    out,
                    torch.cat([t.float() for t in sent]).to(dtype),
                    counts[:, world.rank].tolist(),
                    counts[world.rank].tolist(),
                )
                assert same(out, torch.cat([t.float() for t in got]).to(dtype))

    each(check, backend, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_broadcast_gives_the_roots_values(backend: Backend, size: int) -> None:
    def check(group: Communicator, world: World) -> None:
        for dtype, root in itertools.product(DTYPES, range(size)):
            t = values(world.rank, 2, dtype)
            group.broadcast(t, root)
            assert same(t, values(root, 2, dtype))
        group.barrier()

    each(check, backend, size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_messages_between_two_ranks_keep_their_order(backend: Backend) -> None:
    def check(group: Communicator, world: World) -> None:
        after, before = (world.rank + 1) % 3, (world.rank - 1) % 3
        works, received = [], []
        for dtype in DTYPES:
            received.append(torch.zeros(4, 2).to(dtype))
            works.append(group.start_recv(received[-1], before))
        sent = [values(world.rank + index, 4, dtype) for index, dtype in enumerate(DTYPES)]
        works += [group.start_send(t, after) for t in sent]
        for work in works:
            work.wait()
        for index, (t, dtype) in enumerate(zip(received, DTYPES, strict=True)):
            assert same(t, values(before + index, 4, dtype))

    each(check, backend, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_synchronous_messages_meet(backend: Backend) -> None:
    def check(group: Communicator, world: World) -> None:
        t = values(world.rank, 4, torch.float32)
        if world.rank == 0:
            group.send(t, 1)
            group.recv(t, 1)
        else:
            mine = t.clone()
            group.recv(t, 0)
            group.send(mine, 0)
        assert same(t, values(1 - world.rank, 4, torch.float32))

    each(check, backend, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_asynchronous_operations_overlap_and_complete_in_any_order_of_waiting(backend: Backend) -> None:
    def check(group: Communicator, world: World) -> None:
        reduced = [values(world.rank + n, 3, torch.float64) for n in range(4)]
        gathered = torch.zeros(9, 2)
        works = [group.start_all_reduce(t) for t in reduced]
        works.append(group.start_all_gather(gathered, values(world.rank, 3, torch.float32)))
        for work in reversed(works):
            work.wait()
        for n, t in enumerate(reduced):
            assert same(t, torch.stack([values(rank + n, 3, torch.float64) for rank in range(3)]).sum(0))
        assert same(gathered, torch.cat([values(rank, 3, torch.float32) for rank in range(3)]))

    each(check, backend, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_subgroups_count_ranks_from_their_own_first(backend: Backend) -> None:
    def check(everyone: Communicator, world: World) -> None:
        ranks = [rank for rank in range(5) if rank % 2 == world.rank % 2]
        group = world.group("parity", ranks)
        assert (group.rank, group.size) == (ranks.index(world.rank), len(ranks))
        t = torch.tensor([float(world.rank)])
        group.all_reduce(t)
        everyone.barrier()
        assert t.item() == sum(ranks)
        group.broadcast(t.fill_(world.rank), group.size - 1)
        assert t.item() == ranks[-1]

    each(check, backend, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_come_back_by_rank(backend: Backend) -> None:
    results = run_distributed_test(lambda world: torch.tensor([world.rank, world.size]), 3, backend)
    assert [t.tolist() for t in results] == [[0, 3], [1, 3], [2, 3]]


def test_a_process_that_stays_away_is_an_error_that_names_the_operation() -> None:
    def fn(world: World) -> str:
        group = world.group("stage", [0, 1])
        group.barrier()
        if world.rank == 1:
            return "left"
        try:
            group.all_reduce(torch.zeros(2))
        except CommunicationError as error:
            return str(error)
        return "no error"

    answers = run_distributed_test(fn, 2, "processes")
    assert answers[1] == "left"
    assert answers[0].startswith("rank 0: all_reduce in group stage (ranks [0, 1]) failed: ")


def test_an_exception_in_a_process_is_raised_with_its_traceback() -> None:
    def fn(world: World) -> None:
        if world.rank == 1:
            raise ZeroDivisionError("one")
        world.group("all", [0, 1]).barrier()

    with pytest.raises(RankFailedError, match=r"rank 1 failed:\n(.|\n)*ZeroDivisionError: one"):
        run_distributed_test(fn, 2, "processes")


def test_a_single_process_needs_no_launcher() -> None:
    with process_world("single", torch.device("cpu")) as world:
        group = world.group("world", [0])
        t = torch.arange(3.0)
        group.all_reduce(t)
        out = torch.zeros(3)
        group.all_gather(out, t)
        group.reduce_scatter(out, t)
        group.all_to_all(out, t)
        group.broadcast(out, 0)
        group.barrier()
        assert torch.equal(out, torch.arange(3.0))


def test_processes_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="RANK"), process_world("processes", torch.device("cpu")):
        pass
