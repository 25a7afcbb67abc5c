"""How tokens reach their experts and come back. The model defines the protocol; the parallel room brings the all-to-all.

Letters: T tokens, K experts per token, M rows at the experts this rank holds, E experts, L local experts, D features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch

from k2train.model.saved import Held, KeptTensor, SavedActivations
from k2train.ops.permute import sort_slots, sum_slots

Tensors = tuple[torch.Tensor, ...]


class Pending(Protocol):
    """Rows under way."""

    def wait(self) -> Tensors:
        """The rows, once they are there."""
        ...


class Route(Protocol):
    """One layer's exchange of one microbatch: who sends what to whom. Forward and backward share it."""

    @property
    def offsets(self) -> torch.Tensor:
        """(L,) int32, on the rows' device: the row after the last of each local expert, in rows sorted by expert."""
        ...

    @property
    def rows_of_experts(self) -> tuple[int, ...] | None:
        """The rows of each local expert, on the host, once the dispatch has been waited for; None where the host would have
        to wait for the device to know."""
        ...

    def settle(self, saved: SavedActivations) -> None:
        """The forward has used it: hand what the backward needs to the store, and let go of what can be worked out again."""
        ...


class Dispatcher(Protocol):
    """Brings tokens to their experts and back. Both moves are linear and each is the other's transpose, so the backward
    of one is the other. Every rank of an expert-parallel group calls them in the same order. Zero rows are legal."""

    def route(self, experts_TK: torch.Tensor, counts_E: torch.Tensor, saved: SavedActivations) -> Route:
        """Agree on who sends what. experts_TK (T, K) int64 are this rank's choices, counts_E (E,) int64 how often each
        expert is among them. The index tables that live until the backward are named `routing` in `saved`."""
        ...

    def dispatch(self, x_TD: torch.Tensor, route: Route, weights_TK: torch.Tensor | None = None) -> Pending:
        """Start to copy tokens to their experts' rows (M, D), sorted by local expert; with weights, each one's (M,) too."""
        ...

    def combine(self, rows_MD: torch.Tensor, route: Route, weights_M: torch.Tensor | None = None) -> Pending:
        """Start to add up the rows of each token (T, D); with weights, they return to their places (T, K) too."""
        ...


class RouteTables:
    """A route's index tables: named `routing` at once, kept by the store from the end of the forward on."""

    def __init__(self, saved: SavedActivations, *tables: torch.Tensor) -> None:
        saved.name("routing", extras=tables)
        self._held: tuple[Held, ...] = tuple(KeptTensor(table) for table in tables)

    def settle(self, saved: SavedActivations) -> None:
        """Leave them to the store."""
        self._held = tuple(saved.hold(table.get()) for table in self._held)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._held[index].get()

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (table.get() for table in self._held)


class SlotOrder:
    """A token's copies sorted by expert: the tables between slots (token, k) and rows, N = T x K of them."""

    def __init__(self, experts_TK: torch.Tensor, saved: SavedActivations) -> None:
        order = sort_slots(experts_TK)
        self._slot_of_row_N: torch.Tensor | None = order.slot_of_row
        self._tables = RouteTables(saved, order.token_of_row, order.row_of_slot)

    def settle(self, saved: SavedActivations) -> None:
        """Keep what the backward needs."""
        self._slot_of_row_N = None
        self._tables.settle(saved)

    def copy(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Each token at its K rows (N, D)."""
        return x_TD.index_select(0, self._tables[0])

    def sum(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """Every token's K rows added up (T, D)."""
        return sum_slots(rows_ND, self._tables[1])

    def to_rows(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """The slots' values in row order (N,); in the forward alone, as no backward wants it."""
        assert self._slot_of_row_N is not None, "weights are dispatched in the forward alone"
        return weights_TK.reshape(-1).index_select(0, self._slot_of_row_N)

    def to_slots(self, weights_N: torch.Tensor) -> torch.Tensor:
        """The rows' values in slot order (T, K)."""
        row_of_slot_TK = self._tables[1]
        return weights_N.index_select(0, row_of_slot_TK.reshape(-1)).view(row_of_slot_TK.shape)


@dataclasses.dataclass(frozen=True)
class LocalRoute:
    """The route where all experts are here."""

    order: SlotOrder
    counts_E: torch.Tensor

    @property
    def offsets(self) -> torch.Tensor:
        return self.counts_E.cumsum(0).to(torch.int32)

    @property
    def rows_of_experts(self) -> None:
        return None

    def settle(self, saved: SavedActivations) -> None:
        self.order.settle(saved)


@dataclasses.dataclass(frozen=True)
class Arrived:
    """Rows that need no waiting for."""

    tensors: Tensors

    def wait(self) -> Tensors:
        return self.tensors


class LocalDispatcher:
    """Every expert is local: tokens are copied to their rows and added up again, and nothing moves."""

    def route(self, experts_TK: torch.Tensor, counts_E: torch.Tensor, saved: SavedActivations) -> LocalRoute:
        return LocalRoute(SlotOrder(experts_TK, saved), counts_E)

    def dispatch(self, x_TD: torch.Tensor, route: Route, weights_TK: torch.Tensor | None = None) -> Arrived:
        assert isinstance(route, LocalRoute)
        rows_MD = route.order.copy(x_TD)
        return Arrived((rows_MD,) if weights_TK is None else (rows_MD, route.order.to_rows(weights_TK)))

    def combine(self, rows_MD: torch.Tensor, route: Route, weights_M: torch.Tensor | None = None) -> Arrived:
        assert isinstance(route, LocalRoute)
        x_TD = route.order.sum(rows_MD)
        return Arrived((x_TD,) if weights_M is None else (x_TD, route.order.to_slots(weights_M)))
