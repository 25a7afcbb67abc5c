"""DeepEP's kernels behind model.dispatcher's protocol: an optional fast path. Not yet run on a GPU.

DeepEP (github.com/deepseek-ai/DeepEP) sends a token once to every node that holds one of its
experts and there passes it on over NVLink, in one kernel: both wires are busy at once, where
`RelayDispatcher` has two all-to-alls and hides one under the other in parts. Its sums are added in
the kernel too. The interface used is `Buffer`'s, which version 1 has as its own and version 2 as
its legacy one; what is relied upon is its documentation, and a stand-in that follows it takes its
place in tests.

    get_dispatch_layout    from a rank's choices: how many tokens go where
    dispatch               tokens, choices and weights; rows come by source and token, a row once
                           for a rank, with
                           choices of other ranks' experts as -1. The handle it returns is the route
    dispatch(handle)       tokens alone the same way: the backward of combine
    combine                rows added up at their tokens, weights beside them

Streams: every call is made on the side stream, and DeepEP's own stream waits for it and is waited
for by it (`async_finish=False`). The host waits inside the first dispatch of a route, until the
kernel has told it how many rows come; in a pair the other half's compute has been issued by then.

Letters: T tokens, K experts per token, L local experts, R rows that arrive, M rows at local
experts, D features, E experts.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from k2train.config.errors import ConfigError
from k2train.device.protocol import Event
from k2train.model.dispatcher import Results, Route, RouteTables, Tensors, with_added
from k2train.model.saved import SavedActivations
from k2train.ops.permute import sum_copies, sum_order
from k2train.parallel.processes import ProcessCommunicator
from k2train.parallel.relay_route import ExpertTables, choices_by_expert
from k2train.parallel.side_stream import SideStream

# A row is read in words of 16 bytes.
_FEATURES_MULTIPLE = 8

Layout = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]
"""num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank."""


class ExpertBuffer(Protocol):
    """What is used of deep_ep.Buffer, with its names."""

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[Any, ...]: ...

    def dispatch(self, x: torch.Tensor, handle: Any = None, **routing: Any) -> tuple[Any, ...]: ...

    def combine(
        self, x: torch.Tensor, handle: Any, topk_weights: torch.Tensor | None = None
    ) -> tuple[Any, ...]: ...


class DeepEPRoute:
    """One layer's exchange of one microbatch: DeepEP's handle, and our order of its rows by expert.

    It is whole when its first dispatch has been started.
    """

    def __init__(self, experts_TK: torch.Tensor, layout: Layout, saved: SavedActivations) -> None:
        self.num_choices, self._saved = experts_TK.shape[1], saved
        self._told: tuple[torch.Tensor, Layout] | None = (experts_TK, layout)
        self._rows_of_experts: tuple[int, ...] | None = None
        self._offsets: torch.Tensor | None = None
        self.tables: RouteTables | None = None

    @property
    def told(self) -> tuple[torch.Tensor, Layout]:
        """The choices (T, K) and their layout, for the first dispatch."""
        assert self._told is not None, "dispatched before"
        return self._told

    @property
    def offsets(self) -> torch.Tensor:
        assert self._offsets is not None, "known with the first dispatch"
        return self._offsets

    @property
    def rows_of_experts(self) -> tuple[int, ...]:
        assert self._rows_of_experts is not None, "known with the first dispatch"
        return self._rows_of_experts

    def arrived(
        self, local_RK: torch.Tensor, rows_of_experts: Sequence[int], handle: Sequence[torch.Tensor]
    ) -> None:
        """Take up what the first dispatch returned. local_RK: each row's local experts, -1 for
        other ranks'."""
        self._told = None  # no other dispatch is told the choices
        self._rows_of_experts = tuple(rows_of_experts)
        choice_M = choices_by_expert(local_RK, local_RK >= 0, sum(rows_of_experts))
        next_L = torch.arange(1, len(rows_of_experts) + 1, dtype=local_RK.dtype, device=local_RK.device)
        expert_M = local_RK.flatten().index_select(0, choice_M)
        self._offsets = torch.searchsorted(expert_M, next_L, out_int32=True)
        row_M = torch.div(choice_M, local_RK.shape[1], rounding_mode="floor").to(torch.int32)
        order_M, first_R = sum_order(row_M, local_RK.shape[0])
        self.tables = RouteTables(self._saved, choice_M.to(torch.int32), order_M, first_R, *handle)

    def split_tables(self, tables: Tensors) -> tuple[ExpertTables, Tensors]:
        """Our tables, and DeepEP's handle."""
        return ExpertTables(*tables[:3]), tables[3:]

    def settle(self, saved: SavedActivations) -> None:
        assert self.tables is not None
        self.tables.settle(saved)


class DeepEPRouting:
    """The layout is known to the device; the host learns sizes with the first dispatch."""

    def __init__(self, route: DeepEPRoute) -> None:
        self._route = route

    def wait(self) -> DeepEPRoute:
        return self._route


class DeepEPDispatcher:
    """Dispatcher over an expert-parallel group, by DeepEP. BF16 rows and FP32 weights, as its
    kernels take them.

    Every rank of the buffer's group calls `dispatch` and `combine` in the same order.
    """

    def __init__(self, buffer: ExpertBuffer, num_experts: int, side: SideStream) -> None:
        self.buffer, self.num_experts, self.side, self.device = buffer, num_experts, side, side.device

    def start_route(
        self,
        experts_TK: torch.Tensor,
        counts_E: torch.Tensor,
        saved: SavedActivations,
        ready: Event | None = None,
    ) -> DeepEPRouting:
        with self.side.issue((experts_TK,), ready):
            choices_TK = experts_TK.to(torch.int64).contiguous()
            *layout, _ = self.buffer.get_dispatch_layout(choices_TK, self.num_experts)
        return DeepEPRouting(DeepEPRoute(choices_TK, tuple(layout), saved))

    def dispatch(
        self,
        x_TD: torch.Tensor,
        route: Route,
        weights_TK: torch.Tensor | None = None,
        ready: Event | None = None,
    ) -> Results:
        assert isinstance(route, DeepEPRoute)
        if weights_TK is not None:
            return self.side.start(_first(self.buffer, route), (x_TD, weights_TK), ready)
        assert route.tables is not None, "a route's first dispatch carries weights"
        experts, handle = route.split_tables(self.side.tables(route.tables))

        def again(x_TD: torch.Tensor) -> Tensors:
            rows_RD, *_ = self.buffer.dispatch(x_TD.contiguous(), handle=handle)
            return (rows_RD.index_select(0, experts.rows(route.num_choices)),)

        return self.side.start(again, (x_TD,), ready)

    def combine(
        self,
        rows_MD: torch.Tensor,
        route: Route,
        weights_M: torch.Tensor | None = None,
        plus_TD: torch.Tensor | None = None,
        ready: Event | None = None,
    ) -> Results:
        assert isinstance(route, DeepEPRoute)
        assert route.tables is not None, "a route begins with a dispatch"
        experts, handle = route.split_tables(self.side.tables(route.tables))
        num_choices = route.num_choices

        def move(*inputs: torch.Tensor) -> Tensors:
            sums_RD = sum_copies(rows_MD, experts.order, experts.first)
            weights_RK = None if weights_M is None else experts.placed(weights_M, num_choices)
            sums_TD, weights_TK, _ = self.buffer.combine(sums_RD, handle, topk_weights=weights_RK)
            sums_TD = with_added(sums_TD, plus_TD)
            return (sums_TD,) if weights_M is None else (sums_TD, weights_TK)

        inputs = tuple(t for t in (rows_MD, weights_M, plus_TD) if t is not None)
        return self.side.start(move, inputs, ready)


def _first(buffer: ExpertBuffer, route: DeepEPRoute) -> Any:
    """The dispatch that makes a route's handle."""

    def move(x_TD: torch.Tensor, weights_TK: torch.Tensor) -> Tensors:
        experts_TK, (per_rank, per_rdma_rank, per_expert, is_in_rank) = route.told
        rows_RD, local_RK, weights_RK, rows_of_experts, handle, _ = buffer.dispatch(
            x_TD.contiguous(),
            topk_idx=experts_TK,
            topk_weights=weights_TK.to(torch.float32).contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
        )
        route.arrived(local_RK, rows_of_experts, handle)
        assert route.tables is not None
        experts, _ = route.split_tables(tuple(route.tables))
        weights_M = weights_RK.reshape(-1).index_select(0, experts.place)
        return rows_RD.index_select(0, experts.rows(route.num_choices)), weights_M

    return move


def check_deepep(device: torch.device, dtype: torch.dtype, num_features: int) -> None:
    """Raise ConfigError where layout.dispatch=deepep cannot run here."""
    remedy = "use layout.dispatch=per_node"
    if device.type != "cuda":
        raise ConfigError(
            "layout.dispatch", "deepep", f"its kernels run on CUDA, not on {device.type}", remedy
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            "layout.dispatch",
            "deepep",
            "its kernels carry BF16 rows",
            f"set train.dtype=bfloat16, or {remedy}",
        )
    if num_features % _FEATURES_MULTIPLE:
        raise ConfigError(
            "layout.dispatch",
            "deepep",
            f"rows must be whole words of 16 bytes, and model.hidden_size={num_features} is no multiple "
            f"of {_FEATURES_MULTIPLE}",
            remedy,
        )
    if importlib.util.find_spec("deep_ep") is None:
        raise ConfigError(
            "layout.dispatch",
            "deepep",
            "the package deep_ep is not installed",
            f"install it from github.com/deepseek-ai/DeepEP, or {remedy}",
        )


def build_buffer(group: Any, num_features: int) -> ExpertBuffer:
    """DeepEP's buffer over an ep group, as large as its own hints say. Every rank of the group must
    call it.

    Raises ConfigError where the ranks are not processes.
    """
    if not isinstance(group, ProcessCommunicator):
        raise ConfigError("layout.dispatch", "deepep", "its ranks must be processes", "set world=processes")
    buffer = importlib.import_module("deep_ep").Buffer
    row_bytes = num_features * torch.bfloat16.itemsize
    configs = [buffer.get_dispatch_config(group.size), buffer.get_combine_config(group.size)]
    nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, group.size) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(row_bytes, group.size) for config in configs)
    found: ExpertBuffer = buffer(group.process_group, nvlink, rdma)
    return found
