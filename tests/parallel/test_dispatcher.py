"""Rows reach their experts in order and come back, whoever has how many; each move is the transpose of the other."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from k2train.model.context import MicrobatchContext
from k2train.model.layers import CombinePhase, DispatchPhase
from k2train.ops.permute import sort_slots
from k2train.parallel.communicator import World
from k2train.parallel.dispatcher import AllToAllDispatcher
from k2train.parallel.testing import run_distributed_test

Backend = Literal["threads", "processes"]
BACKENDS: list[Backend] = ["threads", "processes"]
LOADS = ["uneven", "all to one rank", "one rank has none", "nobody has any", "one expert gets all"]
# (ranks, experts): one expert a rank, several, an odd group.
SIZES = [(1, 3), (2, 2), (3, 6), (4, 8)]


def counts(load: str, ranks: int, experts: int) -> torch.Tensor:
    """(ranks, experts): how many rows each rank has for each expert."""
    drawn = torch.randint(0, 4, (ranks, experts), generator=torch.Generator().manual_seed(ranks))
    if load == "all to one rank":
        drawn[:, : experts - experts // ranks] = 0
    elif load == "one rank has none":
        drawn[0] = 0
    elif load == "nobody has any":
        drawn.zero_()
    elif load == "one expert gets all":
        drawn[:, 1:] = 0
    return drawn


def rows(rank: int, counts_E: torch.Tensor) -> torch.Tensor:
    """Rows sorted by expert that say where they come from: (rank, expert, number)."""
    found = [(rank, e, i) for e, count in enumerate(counts_E.tolist()) for i in range(count)]
    return torch.tensor(found, dtype=torch.float64).view(len(found), 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ranks", "experts"), SIZES)
def test_rows_arrive_sorted_by_expert_then_by_source_and_come_back(
    backend: Backend, ranks: int, experts: int
) -> None:
    local = experts // ranks

    def check(world: World) -> None:
        dispatcher = AllToAllDispatcher(world.group("ep", range(ranks)), experts)
        for load in LOADS:
            every = counts(load, ranks, experts)
            mine = rows(world.rank, every[world.rank])
            route = dispatcher.route(every[world.rank])
            arrived, weights = dispatcher.dispatch((mine, mine[:, 2]), route).wait()
            here = range(world.rank * local, (world.rank + 1) * local)
            expected = [(p, e, i) for e in here for p in range(ranks) for i in range(int(every[p, e].item()))]
            assert torch.equal(arrived, torch.tensor(expected, dtype=torch.float64).view(-1, 3))
            assert torch.equal(weights, arrived[:, 2])
            assert route.offsets.dtype == torch.int32
            assert route.offsets.tolist() == every[:, list(here)].sum(0).cumsum(0).tolist()
            assert torch.equal(dispatcher.combine((arrived,), route).wait()[0], mine)

    run_distributed_test(check, ranks, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ranks", "experts"), SIZES)
def test_dispatch_and_combine_are_transposes(backend: Backend, ranks: int, experts: int) -> None:
    def check(world: World) -> None:
        group = world.group("ep", range(ranks))
        dispatcher = AllToAllDispatcher(group, experts)
        for load in LOADS:
            counts_E = counts(load, ranks, experts)[world.rank]
            route = dispatcher.route(counts_E)
            generator = torch.Generator().manual_seed(world.rank)
            x_ND = torch.randn(int(counts_E.sum()), 5, dtype=torch.float64, generator=generator)
            y_MD = torch.randn(int(route.offsets[-1].item()), 5, dtype=torch.float64, generator=generator)
            (moved_MD,) = dispatcher.dispatch((x_ND,), route).wait()
            (back_ND,) = dispatcher.combine((y_MD,), route).wait()
            products = torch.stack([(moved_MD * y_MD).sum(), (x_ND * back_ND).sum()])
            group.all_reduce(products)
            torch.testing.assert_close(products[0], products[1], rtol=1e-12, atol=1e-12)

    run_distributed_test(check, ranks, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moves_under_way_at_once_do_not_mix(backend: Backend) -> None:
    def check(world: World) -> None:
        dispatcher = AllToAllDispatcher(world.group("ep", range(3)), 6)
        tables = [counts(load, 3, 6)[world.rank] for load in LOADS]
        routes = [dispatcher.route(table) for table in tables]
        sent = [rows(world.rank, table) for table in tables]
        moving = [dispatcher.dispatch((t,), route) for t, route in zip(sent, routes, strict=True)]
        arrived = [pending.wait()[0] for pending in reversed(moving)][::-1]
        back = [dispatcher.combine((t,), route) for t, route in zip(arrived, routes, strict=True)]
        for pending, t in zip(back, sent, strict=True):
            assert torch.equal(pending.wait()[0], t)

    run_distributed_test(check, 3, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("favourites", [6, 2, 1])
def test_backward_of_both_phases_is_the_gradient_of_their_forward(backend: Backend, favourites: int) -> None:
    """The layer's exchange with experts that multiply by e + 1, against the same without any exchange, by autograd."""

    def check(world: World) -> None:
        generator = torch.Generator().manual_seed(world.rank)
        x_TD = torch.randn(4, 5, dtype=torch.float64, generator=generator)
        top_k = min(2, favourites)
        experts_TK = torch.rand(4, favourites, generator=generator).topk(top_k).indices + 6 - favourites
        grad_TD = torch.randn(4, 5, dtype=torch.float64, generator=generator)

        leaf_TD = x_TD.clone().requires_grad_()
        plain_TD = leaf_TD + sum((experts_TK[:, k : k + 1] + 1) * leaf_TD for k in range(top_k))
        (dplain_TD,) = torch.autograd.grad(plain_TD, leaf_TD, grad_TD)

        order = sort_slots(experts_TK)
        dispatcher = AllToAllDispatcher(world.group("ep", range(3)), 6)
        dispatch, combine = DispatchPhase(0, dispatcher), CombinePhase(0, dispatcher)
        context = MicrobatchContext(num_sequences=1)
        rows_ND = x_TD[order.token_of_row]
        counts_E = torch.bincount(experts_TK.flatten(), minlength=6)
        inputs = (x_TD, x_TD, rows_ND, rows_ND[:, 0], order.token_of_row, order.row_of_slot, counts_E)
        outputs, _ = dispatch.forward(inputs, context)
        _, _, rows_MD, _, token_of_row, row_of_slot, offsets_L = outputs
        per_expert_L = torch.diff(offsets_L, prepend=torch.zeros(1, dtype=torch.int32))
        factor_M1 = torch.repeat_interleave(
            torch.arange(2, dtype=torch.float64) + 2 * world.rank + 1, per_expert_L
        ).unsqueeze(1)
        (out_TD,), record = combine.forward((x_TD, rows_MD * factor_M1, token_of_row, row_of_slot), context)
        torch.testing.assert_close(out_TD, plain_TD.detach())

        dpartial_TD, drows_MD, *_ = combine.backward(record, (grad_TD,), context)
        assert dpartial_TD is not None
        assert drows_MD is not None
        zero_M = torch.zeros(len(drows_MD), dtype=torch.float64)
        grads = (
            torch.zeros_like(x_TD),
            torch.zeros_like(x_TD),
            drows_MD * factor_M1,
            zero_M,
            None,
            None,
            None,
        )
        *_, drows_ND, dweights_N, _, _, _ = dispatch.backward(None, grads, context)
        assert drows_ND is not None
        assert dweights_N is not None
        dx_TD = dpartial_TD.index_add(0, order.token_of_row, drows_ND)
        torch.testing.assert_close(dx_TD, dplain_TD)
        assert not context.routes

    run_distributed_test(check, 3, backend)
