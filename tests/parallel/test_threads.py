"""The threads world: deterministic, and every mistake named by rank, group, operation and line."""

from __future__ import annotations

import threading

import pytest
import torch

from k2train.parallel.baton import DeadlockError
from k2train.parallel.communicator import CommunicationError
from k2train.parallel.threads import ThreadWorld, run_threads


def test_ranks_run_one_at_a_time_in_one_order() -> None:
    def run() -> list[int]:
        order: list[int] = []

        def fn(world: ThreadWorld) -> None:
            group = world.group("all", range(world.size))
            for _ in range(3):
                order.append(world.rank)
                group.barrier()
                order.append(world.rank)

        run_threads(5, fn)
        return order

    first = run()
    assert first == run()
    assert first[:6] == [0, 1, 2, 3, 4, 4]


def test_256_ranks_pass_uneven_parts_around() -> None:
    def fn(world: ThreadWorld) -> float:
        group = world.group("all", range(world.size))
        row = world.group("row", range(world.rank // 16 * 16, world.rank // 16 * 16 + 16))
        out_splits = [(peer + row.rank) % 3 for peer in range(16)]
        t = torch.full((sum(out_splits), 4), float(world.rank))
        out = torch.zeros_like(t)
        for _ in range(3):
            row.all_to_all(out, t, out_splits, out_splits)
        right = torch.zeros(1)
        work = group.start_recv(right, (world.rank + 1) % world.size)
        group.send(torch.tensor([float(world.rank)]), (world.rank - 1) % world.size)
        work.wait()
        total = torch.cat([out[:, 0].sum(0, keepdim=True), right])
        group.all_reduce(total)
        return float(total.sum())

    results = run_threads(256, fn)
    assert len(set(results)) == 1
    sent = sum(rank * sum((peer + rank % 16) % 3 for peer in range(16)) for rank in range(256))
    assert results[0] == sent + sum(range(256))


def test_backward_may_communicate() -> None:
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t, group):  # type: ignore[no-untyped-def]
            ctx.group = group
            out = t.clone()
            group.all_reduce(out)
            return out

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            grad = grad.contiguous().clone()
            ctx.group.all_reduce(grad)
            return grad, None

    def fn(world: ThreadWorld) -> torch.Tensor:
        t = torch.tensor([float(world.rank + 1)], requires_grad=True)
        (Sum.apply(t, world.group("all", range(3))) * (world.rank + 1)).sum().backward()
        assert t.grad is not None
        return t.grad

    assert [t.item() for t in run_threads(3, fn)] == [6.0, 6.0, 6.0]


@pytest.mark.parametrize("enabled", [True, False])
def test_ranks_have_the_callers_grad_mode(enabled: bool) -> None:
    with torch.set_grad_enabled(enabled):
        assert run_threads(3, lambda world: torch.is_grad_enabled()) == [enabled] * 3


def test_a_mismatched_operation_is_named_with_both_ranks_and_lines() -> None:
    def fn(world: ThreadWorld) -> None:
        group = world.group("experts", [0, 1, 2])
        if world.rank == 2:
            group.broadcast(torch.zeros(2), 0)
        else:
            group.all_reduce(torch.zeros(2))

    with pytest.raises(
        CommunicationError,
        match=r"group experts \[0, 1, 2\]: rank 0 calls all_reduce, rank 2 calls broadcast",
    ) as raised:
        run_threads(3, fn)
    assert str(raised.value).count("test_threads.py") == 2


@pytest.mark.parametrize(
    ("shape", "dtype", "op", "message"),
    [
        ((3,), torch.float32, "sum", r"shape \(2,\) on rank 0, \(3,\) on rank 1"),
        ((2,), torch.float64, "sum", "dtype torch.float32 on rank 0, torch.float64 on rank 1"),
        ((2,), torch.float32, "max", "op sum on rank 0, max on rank 1"),
    ],
)
def test_unequal_arguments_are_named(shape: tuple[int], dtype: torch.dtype, op: str, message: str) -> None:
    def fn(world: ThreadWorld) -> None:
        group = world.group("all", [0, 1])
        if world.rank == 0:
            group.all_reduce(torch.zeros(2))
        else:
            group.all_reduce(torch.zeros(shape, dtype=dtype), op=op)  # type: ignore[arg-type]

    with pytest.raises(CommunicationError, match=message):
        run_threads(2, fn)


def test_all_to_all_splits_that_disagree_are_named() -> None:
    def fn(world: ThreadWorld) -> None:
        sizes = [[2, 2], [2, 3]][world.rank]
        out = torch.zeros(sum(sizes))
        world.group("ep", [0, 1]).all_to_all(out, torch.zeros(4), sizes, [2, 2])

    with pytest.raises(CommunicationError, match="rank 1 sends 2 entries to rank 1, which expects 3"):
        run_threads(2, fn)


def test_a_message_of_the_wrong_form_is_named() -> None:
    def fn(world: ThreadWorld) -> None:
        group = world.group("pp", [0, 1])
        if world.rank == 0:
            group.send(torch.zeros(3), 1)
        else:
            group.recv(torch.zeros(4), 0)

    with pytest.raises(
        CommunicationError, match=r"rank 0 sends float32 \(3,\), rank 1 expects float32 \(4,\)"
    ):
        run_threads(2, fn)


def test_a_missing_collective_is_a_deadlock_that_names_who_is_absent() -> None:
    def fn(world: ThreadWorld) -> None:
        if world.rank != 1:
            world.group("all", range(3)).barrier()

    with pytest.raises(
        DeadlockError, match=r"rank 0 waits in barrier of group all \[0, 1, 2\], .*ranks \[1\]"
    ) as raised:
        run_threads(3, fn)
    assert "ranks that have ended: [1]" in str(raised.value)


def test_two_ranks_that_both_send_first_are_a_deadlock() -> None:
    def fn(world: ThreadWorld) -> None:
        group = world.group("pp", [0, 1])
        group.send(torch.zeros(1), 1 - world.rank)
        group.recv(torch.zeros(1), 1 - world.rank)

    with pytest.raises(DeadlockError, match="rank 0 waits in send to rank 1 of group pp"):
        run_threads(2, fn)


def test_an_operation_nobody_completes_is_named_at_the_end() -> None:
    def fn(world: ThreadWorld) -> None:
        group = world.group("pp", [0, 1])
        if world.rank == 0:
            group.start_send(torch.zeros(1), 1)

    with pytest.raises(CommunicationError, match="never completed:\n  send to rank 1 in group pp"):
        run_threads(2, fn)


def test_the_first_exception_ends_all_ranks_and_is_the_one_raised() -> None:
    ended: list[int] = []

    def fn(world: ThreadWorld) -> None:
        group = world.group("all", range(4))
        group.barrier()
        try:
            if world.rank == 2:
                raise ZeroDivisionError("two")
            group.barrier()
        finally:
            ended.append(world.rank)

    with pytest.raises(ZeroDivisionError, match="two") as raised:
        run_threads(4, fn)
    assert "rank 2 of 4" in str(raised.value.__cause__)
    assert sorted(ended) == [0, 1, 2, 3]
    assert not any(thread.name.startswith("rank ") for thread in threading.enumerate())


def test_an_exception_while_others_clean_up_does_not_hide_the_first() -> None:
    def fn(world: ThreadWorld) -> None:
        group = world.group("all", range(3))
        try:
            if world.rank == 2:
                raise ValueError("first")
            group.barrier()
        finally:
            if world.rank == 0:
                raise KeyError("second")

    with pytest.raises(ValueError, match="first"):
        run_threads(3, fn)


def test_a_group_must_hold_its_caller() -> None:
    with pytest.raises(CommunicationError, match="rank 1 cannot make group x"):
        run_threads(2, lambda world: world.group("x", [0]))
