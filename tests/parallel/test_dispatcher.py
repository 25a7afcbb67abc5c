"""Tokens reach their experts in order and come back, whoever has how many; each move is the
transpose of the other.

Letters: T tokens, K experts per token, L local experts, P ranks of the group, M rows at local
experts, D features.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from k2train.architecture.microbatch import workload
from k2train.architecture.routing_tables import hit_probability, table_bytes
from k2train.config.compose import load_config
from k2train.config.sections import DispatchKind
from k2train.device.cpu import CpuDevice
from k2train.layout.grid import RankGrid
from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import Dispatcher
from k2train.model.layers import CombinePhase, DispatchPhase, RoutePhase
from k2train.model.saved import KeepEverything
from k2train.parallel.build import build_dispatcher
from k2train.parallel.communicator import World
from k2train.parallel.groups import build_groups
from k2train.parallel.relay_route import RelayRoute
from k2train.parallel.testing import run_distributed_test

Backend = Literal["threads", "processes"]
BACKENDS: list[Backend] = ["threads", "processes"]
LOADS = ["uneven", "all to one rank", "one rank has one expert", "nobody has any", "one expert gets all"]
# (ranks, experts, ranks a token is passed on among, parts it is sent in; None: a copy for every
# expert). One expert a rank, several, an odd group, one node, nodes of one rank, nodes of several,
# parts of several tokens, of one, and of none.
SIZES = [
    (1, 3, None, 1),
    (2, 2, None, 1),
    (3, 6, None, 1),
    (4, 8, None, 1),
    (2, 2, 2, 1),
    (3, 6, 3, 1),
    (4, 8, 4, 1),
    (2, 4, 1, 1),
    (4, 8, 2, 1),
    (6, 12, 2, 2),
    (6, 6, 3, 7),
    (4, 8, 2, 5),
]
TOKENS, FEATURES = 5, 3


def choices(load: str, ranks: int, experts: int) -> torch.Tensor:
    """(ranks, T, K): distinct experts of every token, any number of tokens but the same on every
    rank."""
    generator = torch.Generator().manual_seed(ranks * 100 + experts)
    allowed = torch.arange(experts)
    tokens = 0 if load == "nobody has any" else TOKENS
    if load == "all to one rank":
        allowed = allowed[experts - experts // ranks :]
    elif load == "one expert gets all":
        allowed = allowed[:1]
    top_k = min(3, len(allowed))
    drawn = torch.rand(ranks, tokens, len(allowed), generator=generator).argsort(-1)[..., :top_k]
    found = allowed[drawn]
    if load == "one rank has one expert" and top_k == 1:
        found[0] = 0
    elif load == "one rank has one expert":
        # Rank 0's tokens all choose the same experts, so that it has nothing for most of the
        # others.
        found[0] = torch.arange(top_k)
    return found


def dispatcher_of(
    world: World, ranks: int, experts: int, relay_ranks: int | None, num_parts: int = 1
) -> Dispatcher:
    groups = build_groups(RankGrid(1, 1, ranks), world, relay_ranks)
    return build_dispatcher(experts, groups, CpuDevice(torch.device("cpu")), num_parts)


def counted(experts_TK: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.bincount(experts_TK.flatten(), minlength=experts)


def random(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ranks", "experts", "relay_ranks", "num_parts"), SIZES)
def test_rows_arrive_sorted_by_expert_then_by_source_and_then_by_token(
    backend: Backend, ranks: int, experts: int, relay_ranks: int | None, num_parts: int
) -> None:
    """The same rows, weights and offsets to the bit, however often a token was sent."""
    local = experts // ranks

    def check(world: World) -> None:
        dispatcher = dispatcher_of(world, ranks, experts, relay_ranks, num_parts)
        for load in LOADS:
            every_PTK = choices(load, ranks, experts)
            mine_TK = every_PTK[world.rank]
            tokens, top_k = mine_TK.shape
            numbers_T = torch.arange(tokens, dtype=torch.float64)
            x_TD = torch.stack([torch.full_like(numbers_T, world.rank), numbers_T], 1)
            weights_TK = x_TD.sum(1, keepdim=True) * 100 + mine_TK
            route = dispatcher.start_route(mine_TK, counted(mine_TK, experts), KeepEverything()).wait()
            rows_MD, weights_M = dispatcher.dispatch(x_TD, route, weights_TK).tensors
            here = range(world.rank * local, (world.rank + 1) * local)
            expected = [
                (e, p, t)
                for e in here
                for p in range(ranks)
                for t in range(tokens)
                if e in every_PTK[p, t].tolist()
            ]
            assert rows_MD.tolist() == [[p, t] for _, p, t in expected]
            assert weights_M.tolist() == [(p + t) * 100 + e for e, p, t in expected]
            assert route.offsets.dtype == torch.int32
            assert list(route.rows_of_experts) == [sum(found[0] == e for found in expected) for e in here]
            assert route.offsets.tolist() == [sum(found[0] <= e for found in expected) for e in here]
            sums_TD, back_TK = dispatcher.combine(rows_MD, route, weights_M).tensors
            assert torch.equal(sums_TD, x_TD * top_k)
            assert torch.equal(back_TK, weights_TK)

    run_distributed_test(check, ranks, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ranks", "experts", "relay_ranks", "num_parts"), SIZES)
def test_dispatch_and_combine_are_transposes(
    backend: Backend, ranks: int, experts: int, relay_ranks: int | None, num_parts: int
) -> None:
    def check(world: World) -> None:
        group = world.group("all", range(ranks))
        dispatcher = dispatcher_of(world, ranks, experts, relay_ranks, num_parts)
        for load in LOADS:
            mine_TK = choices(load, ranks, experts)[world.rank]
            route = dispatcher.start_route(mine_TK, counted(mine_TK, experts), KeepEverything()).wait()
            num_rows = int(route.offsets[-1].item())
            x_TD, w_TK = random(world.rank, len(mine_TK), FEATURES), random(world.rank, *mine_TK.shape)
            y_MD, v_M = random(world.rank, num_rows, FEATURES), random(world.rank, num_rows)
            rows_MD, weights_M = dispatcher.dispatch(x_TD, route, w_TK).tensors
            sums_TD, back_TK = dispatcher.combine(y_MD, route, v_M).tensors
            forward = torch.stack([(rows_MD * y_MD).sum(), (weights_M * v_M).sum()])
            backward = torch.stack([(x_TD * sums_TD).sum(), (w_TK * back_TK).sum()])
            group.all_reduce(forward)
            group.all_reduce(backward)
            torch.testing.assert_close(forward, backward, rtol=1e-12, atol=1e-12)

    run_distributed_test(check, ranks, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("ranks", "experts", "relay_ranks", "num_parts"), [(3, 6, None, 1), (4, 8, 2, 1), (4, 8, 2, 2)]
)
def test_moves_under_way_at_once_do_not_mix(
    backend: Backend, ranks: int, experts: int, relay_ranks: int | None, num_parts: int
) -> None:
    def check(world: World) -> None:
        dispatcher = dispatcher_of(world, ranks, experts, relay_ranks, num_parts)
        tables = [choices(load, ranks, experts)[world.rank] for load in LOADS]
        routes = [dispatcher.start_route(t, counted(t, experts), KeepEverything()).wait() for t in tables]
        sent = [random(world.rank + index, len(t), FEATURES) for index, t in enumerate(tables)]
        moving = [dispatcher.dispatch(x, route) for x, route in zip(sent, routes, strict=True)]
        arrived = [pending.tensors[0] for pending in reversed(moving)][::-1]
        back = [dispatcher.combine(t, route) for t, route in zip(arrived, routes, strict=True)]
        for pending, x, table in zip(back, sent, tables, strict=True):
            torch.testing.assert_close(pending.tensors[0], x * table.shape[1])

    run_distributed_test(check, ranks, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("relay_ranks", "num_parts"), [(None, 1), (4, 1), (2, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("load", LOADS)
def test_backward_of_both_phases_is_the_gradient_of_their_forward(
    backend: Backend, load: str, relay_ranks: int | None, num_parts: int
) -> None:
    """The layer's exchange with experts that multiply by weight and e + 1, against plain autograd
    without any exchange."""

    def check(world: World) -> None:
        mine_TK = choices(load, 4, 8)[world.rank]
        shape = (len(mine_TK), FEATURES)
        x_TD, weights_TK = random(world.rank, *shape), random(world.rank + 9, *mine_TK.shape)
        grad_TD, dshared_TD = random(world.rank + 19, *shape), random(world.rank + 29, *shape)

        leaves = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        factor_TK = leaves[1] * (mine_TK + 1)
        plain_TD = x_TD + factor_TK.sum(1, keepdim=True) * leaves[0]
        dplain_TD, dweights_TK = torch.autograd.grad(plain_TD, leaves, grad_TD)

        dispatcher = dispatcher_of(world, 4, 8, relay_ranks, num_parts)
        route, dispatch, combine = (make(0, dispatcher) for make in (RoutePhase, DispatchPhase, CombinePhase))
        context = MicrobatchContext(num_sequences=1)
        inputs = (x_TD, x_TD, weights_TK, mine_TK, counted(mine_TK, 8))
        routed, _ = route.forward(inputs, context)
        (_, _, rows_MD, weights_M, offsets_L), _ = dispatch.forward(routed, context)
        per_expert_L = torch.diff(offsets_L, prepend=torch.zeros(1, dtype=torch.int32))
        number_M = torch.repeat_interleave(torch.arange(1.0, 3.0) + 2 * world.rank, per_expert_L)
        factor_M1 = (weights_M * number_M).unsqueeze(1)
        (out_TD,), record = combine.forward((x_TD, rows_MD * factor_M1), context)
        torch.testing.assert_close(out_TD, plain_TD.detach())

        dpartial_TD, drows_MD = combine.backward(record, (grad_TD,), context)
        assert dpartial_TD is not None
        assert drows_MD is not None
        assert torch.equal(dpartial_TD, grad_TD)
        dweights_M = (drows_MD * rows_MD).sum(1) * number_M
        grads = (dpartial_TD, dshared_TD, drows_MD * factor_M1, dweights_M, None)
        dresidual_TD, dnormed_TD, dback_TK, *_ = route.backward(
            None, dispatch.backward(None, grads, context), context
        )
        torch.testing.assert_close(dresidual_TD, grad_TD)
        torch.testing.assert_close(dnormed_TD, dplain_TD + dshared_TD)
        torch.testing.assert_close(dback_TK, dweights_TK)
        assert not context.routes

    run_distributed_test(check, 4, backend)


def test_a_token_crosses_to_a_node_once_and_there_reaches_every_rank_once() -> None:
    """Rows each rank sends over each hop, counted by hand: experts 4 to 7 are ranks 2 and 3, on the
    other node of two."""
    chosen = torch.tensor([[0, 1, 4], [4, 5, 6], [2, 4, 6], [0, 1, 1]])
    chosen[3, 2] = 3

    def check(world: World) -> list[list[int]]:
        mine_TK = chosen if world.rank == 0 else chosen.new_zeros(4, 3) + torch.arange(3)
        dispatcher = dispatcher_of(world, 4, 8, 2)
        route = dispatcher.start_route(mine_TK, counted(mine_TK, 8), KeepEverything()).wait()
        assert isinstance(route, RelayRoute)
        (hops,) = route.parts
        return [hop.leaving for hop in hops]

    between, inside = run_distributed_test(check, 4, "threads")[0]
    # Of rank 0's tokens 0, 2 and 3 stay on its node; 0, 1 and 2 go to the other, each once.
    assert between == [3, 3]
    # On its own node rank 0 keeps tokens 0 and 3 and hands on 2 and 3; rank 2's four need rank 0
    # (experts 0, 1) and 1 (2).
    assert inside == [2 + 4, 2 + 4]


@pytest.mark.parametrize(("dispatch", "num_parts"), [("per_rank", 1), ("per_node", 1), ("per_node", 3)])
def test_a_routes_tables_take_the_bytes_that_even_routing_makes_them_take(
    dispatch: DispatchKind, num_parts: int
) -> None:
    """Drawn evenly, many tokens: within 2 % of `estimate`'s expectation; and copies between ranks
    as `estimate` has them."""
    tokens, top_k, experts, ranks = 2000, 3, 16, 4
    relay_ranks = 2 if dispatch == "per_node" else 4

    def check(world: World) -> tuple[int, list[int]]:
        generator = torch.Generator().manual_seed(world.rank)
        mine_TK = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]
        dispatcher = dispatcher_of(world, ranks, experts, relay_ranks, num_parts)
        route = dispatcher.start_route(mine_TK, counted(mine_TK, experts), KeepEverything()).wait()
        assert isinstance(route, RelayRoute)
        num_bytes = sum(table.numel() * table.element_size() for table in route.tables)
        hops = [sum(sum(part[hop].leaving) for part in route.parts) for hop in range(len(route.parts[0]))]
        return num_bytes, hops

    found = run_distributed_test(check, ranks, "threads")
    config = load_config(
        [
            f"model.n_routed_experts={experts}",
            f"model.num_experts_per_tok={top_k}",
            f"train.seq_len={tokens}",
            f"train.global_batch_tokens={tokens}",
            "train.microbatch_size=1",
            "model.max_position_embeddings=4096",
        ]
    )
    w = workload(config.model, config.train, ranks, relay_ranks)
    expected = [tokens * ranks * hit_probability(w, 1)]
    if dispatch == "per_node":
        expected.insert(0, tokens * 2 * hit_probability(w, 2))
    sizes = [sum(rank[1][hop] for rank in found) / ranks for hop in range(len(expected))]
    assert sizes == pytest.approx(expected, rel=0.02)
    assert sum(rank[0] for rank in found) / ranks == pytest.approx(table_bytes(w), rel=0.02)
