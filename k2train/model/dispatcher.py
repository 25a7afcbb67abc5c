"""How tokens reach their experts and come back. The model defines the protocol; the parallel room
brings the all-to-all.

Letters: T tokens, K experts per token, M rows at the experts this rank holds, E experts, L local
experts, D features, N rows (token, expert) in order of expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from k2train.device.protocol import Device, Event, Reading, Stream, integers
from k2train.model.saved import Held, KeptTensor, SavedActivations
from k2train.ops.permute import sort_slots, sum_slots

Tensors = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Results:
    """Tensors, and when they are there.

    ready: the event at which they are; None where the current stream made them, so that what it is
    given next may use them.
    """

    tensors: tuple[torch.Tensor | None, ...]
    ready: Event | None = None

    def on(self, stream: Stream) -> tuple[Any, ...]:
        """The tensors, which `stream` may use from here on: the current one, unless they say when
        they are ready."""
        stream.wait(self.ready)
        stream.uses(*(tensor for tensor in self.tensors if tensor is not None))
        return self.tensors


class Route(Protocol):
    """One layer's exchange of one microbatch: who sends what to whom. Forward and backward share
    it."""

    @property
    def offsets(self) -> torch.Tensor:
        """(L,) int32, on the rows' device: the row after each local expert's last, in rows sorted
        by expert."""
        ...

    @property
    def rows_of_experts(self) -> tuple[int, ...]:
        """Rows of each local expert, known to the host; `offsets` are their sums. Not before
        `dispatch`."""
        ...

    def settle(self, saved: SavedActivations) -> None:
        """The forward has used it: hand what the backward needs to the store, and let go of the
        rest."""
        ...


class Routing(Protocol):
    """A route that the device is still counting."""

    def wait(self) -> Route:
        """The route. The host waits here for the counts, and for nothing that was issued after
        them."""
        ...


class Dispatcher(Protocol):
    """Brings tokens to their experts and back.

    Both moves are linear and each is the other's transpose, so the backward of one is the other.
    Every rank of an expert-parallel group calls them in the same order. Zero rows are legal.
    `ready` is the event at which the given tensors are there (None: behind what the current stream
    has been given); the results say when they are.
    """

    @property
    def device(self) -> Device:
        """Whose streams the results are handed on to."""
        ...

    def start_route(
        self,
        experts_TK: torch.Tensor,
        counts_E: torch.Tensor,
        saved: SavedActivations,
        ready: Event | None = None,
    ) -> Routing:
        """Begin to agree on who sends what.

        experts_TK (T, K) int64 are this rank's choices, counts_E (E,) int64 how often each expert
        is among them. The index tables that live until the backward are named `routing` in `saved`.
        """
        ...

    def dispatch(
        self,
        x_TD: torch.Tensor,
        route: Route,
        weights_TK: torch.Tensor | None = None,
        ready: Event | None = None,
    ) -> Results:
        """Start to copy tokens to their experts' rows (M, D), sorted by local expert; with weights,
        each one's (M,) too."""
        ...

    def combine(
        self,
        rows_MD: torch.Tensor,
        route: Route,
        weights_M: torch.Tensor | None = None,
        plus_TD: torch.Tensor | None = None,
        ready: Event | None = None,
    ) -> Results:
        """Start to add up the rows of each token (T, D), and plus_TD to that; with weights, they
        return to their places (T, K) too."""
        ...


class RouteTables:
    """A route's index tables: named `routing` at once, kept by the store from the end of the
    forward on."""

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
    """A token's copies sorted by expert: the tables between slots (token, k) and rows, N = T x K of
    them."""

    def __init__(self, experts_TK: torch.Tensor, saved: SavedActivations) -> None:
        order = sort_slots(experts_TK)
        self._slot_of_row_N: torch.Tensor | None = order.slot_of_row
        self.tables = RouteTables(saved, order.token_of_row, order.row_of_slot)

    def settle(self, saved: SavedActivations) -> None:
        """Keep what the backward needs."""
        self._slot_of_row_N = None
        self.tables.settle(saved)

    def copy(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Each token at its K rows (N, D)."""
        return x_TD.index_select(0, self.tables[0])

    def sum(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """Every token's K rows added up (T, D)."""
        return sum_slots(rows_ND, self.tables[1])

    def to_rows(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """The slots' values in row order (N,); in the forward alone, as no backward wants it."""
        assert self._slot_of_row_N is not None, "weights are dispatched in the forward alone"
        return weights_TK.reshape(-1).index_select(0, self._slot_of_row_N)

    def to_slots(self, weights_N: torch.Tensor) -> torch.Tensor:
        """The rows' values in slot order (T, K)."""
        row_of_slot_TK = self.tables[1]
        return weights_N.index_select(0, row_of_slot_TK.reshape(-1)).view(row_of_slot_TK.shape)


@dataclasses.dataclass(frozen=True)
class LocalRoute:
    """The route where all experts are here."""

    order: SlotOrder
    offsets: torch.Tensor
    rows_of_experts: tuple[int, ...]

    def settle(self, saved: SavedActivations) -> None:
        self.order.settle(saved)


@dataclasses.dataclass(frozen=True)
class LocalRouting:
    """Nothing is to be agreed upon, but the host learns how many rows each expert has."""

    order: SlotOrder
    offsets: torch.Tensor
    reading: Reading

    def wait(self) -> LocalRoute:
        return LocalRoute(self.order, self.offsets, tuple(integers(self.reading.wait())))


class LocalDispatcher:
    """Every expert is local: tokens are copied to their rows and added up again, on the current
    stream."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def start_route(
        self,
        experts_TK: torch.Tensor,
        counts_E: torch.Tensor,
        saved: SavedActivations,
        ready: Event | None = None,
    ) -> LocalRouting:
        Results((experts_TK, counts_E), ready).on(self.device.current)
        reading = self.device.start_read(counts_E, "route")
        return LocalRouting(SlotOrder(experts_TK, saved), counts_E.cumsum(0).to(torch.int32), reading)

    def dispatch(
        self,
        x_TD: torch.Tensor,
        route: Route,
        weights_TK: torch.Tensor | None = None,
        ready: Event | None = None,
    ) -> Results:
        assert isinstance(route, LocalRoute)
        Results((x_TD, weights_TK), ready).on(self.device.current)
        rows: Tensors = (route.order.copy(x_TD),)
        if weights_TK is not None:
            rows += (route.order.to_rows(weights_TK),)
        return Results(rows, self.device.current.record())

    def combine(
        self,
        rows_MD: torch.Tensor,
        route: Route,
        weights_M: torch.Tensor | None = None,
        plus_TD: torch.Tensor | None = None,
        ready: Event | None = None,
    ) -> Results:
        assert isinstance(route, LocalRoute)
        Results((rows_MD, weights_M, plus_TD), ready).on(self.device.current)
        sums: Tensors = (with_added(route.order.sum(rows_MD), plus_TD),)
        if weights_M is not None:
            sums += (route.order.to_slots(weights_M),)
        return Results(sums, self.device.current.record())


def with_added(sum_TD: torch.Tensor, plus_TD: torch.Tensor | None) -> torch.Tensor:
    """The sum, and plus_TD added to it in place where there is one."""
    return sum_TD if plus_TD is None else sum_TD.add_(plus_TD)
