"""Our use of DeepEP against a stand-in for its Buffer that follows its documentation, on the
CPU.

Letters: T tokens, K experts per token, E experts, M rows at local experts, D features.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from k2train.architecture.microbatch import workload
from k2train.architecture.routing_tables import table_bytes
from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.device.cpu import CpuDevice
from k2train.layout.grid import RankGrid
from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import Dispatcher
from k2train.model.layers import CombinePhase, DispatchPhase, RoutePhase
from k2train.model.saved import KeepEverything
from k2train.parallel.build import build_dispatcher
from k2train.parallel.communicator import Communicator, World
from k2train.parallel.deepep_dispatcher import DeepEPDispatcher, DeepEPRoute, build_buffer, check_deepep
from k2train.parallel.groups import build_groups
from k2train.parallel.side_stream import SideStream
from k2train.parallel.testing import run_distributed_test
from k2train.trainer.build import build_program

RANKS, EXPERTS, TOP_K, TOKENS, FEATURES = 4, 8, 3, 6, 8


class StandIn:
    """deep_ep.Buffer inside a node, as its documentation has it, over a Communicator.

    Rows come sorted by source and within a source by token; choices come as local experts or -1,
    with weight 0 where they are; the handle is a tuple of tensors, the one that intranode
    dispatches return in shape.
    """

    def __init__(self, group: Communicator) -> None:
        self.group = group
        self.calls: list[str] = []

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[Any, ...]:
        self.calls.append("layout")
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        self.num_local = num_experts // self.group.size
        is_in_rank = torch.zeros(len(topk_idx), self.group.size, dtype=torch.bool)
        is_in_rank.scatter_(1, topk_idx // self.num_local, True)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        return is_in_rank.sum(0).int(), None, per_expert, is_in_rank, None

    def dispatch(self, x: torch.Tensor, handle: Any = None, **routing: Any) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        if handle is not None:
            self.calls.append("dispatch again")
            assert not routing
            *_, is_in_rank, _ = handle
            return self._spread(x, is_in_rank), None, None, None, None, None
        self.calls.append("dispatch")
        is_in_rank, topk_idx = routing["is_token_in_rank"], routing["topk_idx"]
        assert routing["topk_weights"].dtype == torch.float32
        assert torch.equal(routing["num_tokens_per_rank"], is_in_rank.sum(0).int())
        first = self.group.rank * self.num_local
        local = self._spread(topk_idx, is_in_rank) - first
        here = (local >= 0) & (local < self.num_local)
        local = local.masked_fill(~here, -1)
        weights = self._spread(routing["topk_weights"], is_in_rank).masked_fill(~here, 0.0)
        counts = [int((local == expert).sum()) for expert in range(self.num_local)]
        small = torch.zeros(self.group.size, self.group.size, dtype=torch.int32)
        sources = self._spread(torch.arange(len(x), dtype=torch.int32), is_in_rank)
        heads = torch.zeros(is_in_rank.shape, dtype=torch.int32)
        handle = (small, small.clone(), small.clone(), sources, is_in_rank, heads)
        return self._spread(x, is_in_rank), local, weights, counts, handle, None

    def combine(
        self, x: torch.Tensor, handle: Any, topk_weights: torch.Tensor | None = None
    ) -> tuple[Any, ...]:
        self.calls.append("combine")
        assert x.dtype == torch.bfloat16
        assert topk_weights is None or topk_weights.dtype == torch.float32
        *_, is_in_rank, _ = handle
        weights = None if topk_weights is None else self._gathered(topk_weights, is_in_rank)
        return self._gathered(x.float(), is_in_rank).to(x.dtype), weights, None

    def _sizes(self, is_in_rank: torch.Tensor) -> tuple[list[int], list[int]]:
        leaving = is_in_rank.sum(0)
        arriving = torch.empty_like(leaving)
        self.group.all_to_all(arriving, leaving)
        return leaving.tolist(), arriving.tolist()

    def _spread(self, x: torch.Tensor, is_in_rank: torch.Tensor) -> torch.Tensor:
        leaving, arriving = self._sizes(is_in_rank)
        out = x.new_empty(sum(arriving), *x.shape[1:])
        self.group.all_to_all(out, x[is_in_rank.t().nonzero()[:, 1]], arriving, leaving)
        return out

    def _gathered(self, rows: torch.Tensor, is_in_rank: torch.Tensor) -> torch.Tensor:
        leaving, arriving = self._sizes(is_in_rank)
        back = rows.new_empty(sum(leaving), *rows.shape[1:])
        self.group.all_to_all(back, rows, leaving, arriving)
        out = rows.new_zeros(len(is_in_rank), *rows.shape[1:])
        return out.index_add(0, is_in_rank.t().nonzero()[:, 1], back)


def dispatchers(world: World) -> tuple[Dispatcher, Dispatcher, StandIn]:
    """DeepEP's, and the one that sends once for every rank."""
    device = CpuDevice(torch.device("cpu"))
    groups = build_groups(RankGrid(1, 1, RANKS), world, RANKS)
    stand_in = StandIn(world.group("deepep", range(RANKS)))
    deepep = DeepEPDispatcher(stand_in, EXPERTS, SideStream(device))
    return deepep, build_dispatcher(EXPERTS, groups, device), stand_in


def choices(load: str, rank: int) -> torch.Tensor:
    """(T, K): evenly drawn; every token to the last rank's two experts; no token at all."""
    if load == "one rank":
        return torch.tensor([[6, 7]] * TOKENS)
    generator = torch.Generator().manual_seed(rank)
    drawn = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K]
    return drawn if load == "even" else drawn[:0]


@pytest.mark.parametrize("load", ["even", "one rank", "nobody"])
def test_rows_weights_and_offsets_equal_the_other_dispatchers_to_the_bit(load: str) -> None:
    def check(world: World) -> None:
        generator = torch.Generator().manual_seed(10 + world.rank)
        experts_TK = choices(load, world.rank)
        x_TD = torch.randn(len(experts_TK), FEATURES, generator=generator).bfloat16()
        weights_TK = torch.rand(experts_TK.shape, generator=generator)
        counts_E = torch.bincount(experts_TK.flatten(), minlength=EXPERTS)
        found = []
        for dispatcher in dispatchers(world)[:2]:
            route = dispatcher.start_route(experts_TK, counts_E, KeepEverything()).wait()
            rows = dispatcher.dispatch(x_TD, route, weights_TK).tensors
            again = dispatcher.dispatch(x_TD, route).tensors
            found.append((*rows, *again, route.offsets, torch.tensor(route.rows_of_experts)))
        for mine, theirs in zip(*found, strict=True):
            assert torch.equal(mine, theirs)

    run_distributed_test(check, RANKS, "threads")


def test_a_layer_forward_and_backward_uses_one_handle_and_is_its_own_gradient() -> None:
    """Whole numbers, which BF16 adds exactly: sums equal the relay's; and the order of calls is the
    one documented."""

    def check(world: World) -> list[str]:
        generator = torch.Generator().manual_seed(20 + world.rank)
        experts_TK = choices("even", world.rank)
        x_TD, grad_TD = (
            torch.randint(-4, 5, (TOKENS, FEATURES), generator=generator).bfloat16() for _ in range(2)
        )
        weights_TK = torch.rand(TOKENS, TOP_K, generator=generator)
        counts_E = torch.bincount(experts_TK.flatten(), minlength=EXPERTS)
        *both, stand_in = dispatchers(world)
        found = []
        for dispatcher in both:
            context = MicrobatchContext(num_sequences=1)
            route, moved, combine = (
                make(0, dispatcher) for make in (RoutePhase, DispatchPhase, CombinePhase)
            )
            routed, _ = route.forward((x_TD, x_TD, weights_TK, experts_TK, counts_E), context)
            (_, _, rows_MD, weights_M, _), _ = moved.forward(routed, context)
            (out_TD,), _ = combine.forward((x_TD, rows_MD), context)
            _, drows_MD = combine.backward(None, (grad_TD,), context)
            grads = moved.backward(None, (grad_TD, x_TD, drows_MD, weights_M, None), context)
            dresidual_TD, dnormed_TD, dweights_TK, *_ = route.backward(None, grads, context)
            assert not context.routes
            found.append((out_TD, drows_MD, dresidual_TD, dnormed_TD, dweights_TK))
        for mine, theirs in zip(*found, strict=True):
            assert torch.equal(mine, theirs)
        return stand_in.calls

    calls = run_distributed_test(check, RANKS, "threads")[0]
    assert calls == ["layout", "dispatch", "combine", "dispatch again", "combine"]


def test_the_tables_take_the_bytes_the_plan_says_but_for_the_small_matrices() -> None:
    tokens = 400

    def check(world: World) -> int:
        generator = torch.Generator().manual_seed(world.rank)
        experts_TK = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K]
        dispatcher, _, _ = dispatchers(world)
        counts_E = torch.bincount(experts_TK.flatten(), minlength=EXPERTS)
        route = dispatcher.start_route(experts_TK, counts_E, KeepEverything()).wait()
        dispatcher.dispatch(torch.zeros(tokens, FEATURES).bfloat16(), route, torch.rand(tokens, TOP_K))
        assert isinstance(route, DeepEPRoute)
        assert route.tables is not None
        return sum(table.numel() * table.element_size() for table in route.tables)

    config = load_config(
        [
            f"model.n_routed_experts={EXPERTS}",
            f"model.num_experts_per_tok={TOP_K}",
            f"train.seq_len={tokens}",
            f"train.global_batch_tokens={tokens}",
            "train.microbatch_size=1",
            "model.max_position_embeddings=4096",
        ]
    )
    expected = table_bytes(workload(config.model, config.train, RANKS, deepep=True))
    found = run_distributed_test(check, RANKS, "threads")
    assert sum(found) / RANKS == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("device", "dtype", "features", "says"),
    [
        ("cpu", torch.bfloat16, 64, "run on CUDA"),
        ("cuda", torch.float32, 64, "train.dtype=bfloat16"),
        ("cuda", torch.bfloat16, 60, "multiple of 8"),
        ("cuda", torch.bfloat16, 64, "not installed"),
    ],
)
def test_what_deepep_cannot_do_is_refused_with_the_remedy(
    device: str, dtype: torch.dtype, features: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=r"layout\.dispatch=per_node") as error:
        check_deepep(torch.device(device), dtype, features)
    assert says in str(error.value)


def test_its_ranks_must_be_processes() -> None:
    def check(world: World) -> None:
        with pytest.raises(ConfigError, match="world=processes"):
            build_buffer(world.group("ep", range(2)), 64)

    run_distributed_test(check, 2, "threads")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["layout.ep=6", "model.n_routed_experts=12"], "no settings for layout.ep=6"),
        (["layout.ep=16", "model.n_routed_experts=32", "cluster.gpus_per_node=4"], "8 ranks for a node"),
        (["layout.ep=2"], "run on CUDA"),
    ],
)
def test_a_run_that_asks_for_it_where_it_cannot_be_is_refused_at_its_start(
    words: list[str], says: str
) -> None:
    config = load_config(["layout.dispatch=deepep", "train.device=cpu", *words])
    with pytest.raises(ConfigError, match=says):
        build_program(config)
