"""The all-to-all that sends a row for every expert a token chose: model.dispatcher's protocol over
an ep group.

Expert e lives on ep rank e // L. Rows leave sorted by expert, so they are already sorted by
destination; they arrive sorted by source and within a source by expert, and are put in order once
more so that each local expert's rows are neighbours, which is what a grouped product needs.

    leave    | e0 e0 e1 | e2 e3 e3 |              rank 0 to ranks 0 and 1, L = 2
    arrive   | e0 e0 e1 | e0 e1    |              at rank 0, from ranks 0 and 1
    sorted   | e0 e0 e0 | e1 e1    |

Both moves are linear and each is the other's transpose; forward and backward share one route. Any
rank may send or receive nothing. Payloads keep their type: K2 computes in BF16 and sends BF16 (K2
report, section 2.4.3).

`relay_dispatcher.py` sends a token once for every rank or node instead.

Letters: T tokens, K experts per token, E experts, L local experts, P ranks of the group, N rows
here, M rows at local experts, D features.
"""

from __future__ import annotations

import dataclasses

import torch

from k2train.device.protocol import Event, Reading, integers
from k2train.model.dispatcher import Results, Route, RouteTables, SlotOrder, Tensors, with_added
from k2train.model.saved import SavedActivations
from k2train.ops.permute import inverse
from k2train.parallel.communicator import Communicator
from k2train.parallel.exchange import pack, start_exchange
from k2train.parallel.side_stream import SideStream


@dataclasses.dataclass(frozen=True)
class ExpertRoute:
    """One layer's exchange of one microbatch.

    here[p]: rows this rank has for rank p. there[p]: rows that come from rank p. slots: the order
    of the rows here. orders: of the rows that arrive, two int32 tables (M,), to the order of local
    experts and back.
    """

    slots: SlotOrder
    orders: RouteTables
    here: list[int]
    there: list[int]
    offsets: torch.Tensor
    rows_of_experts: tuple[int, ...]

    def settle(self, saved: SavedActivations) -> None:
        self.slots.settle(saved)
        self.orders.settle(saved)


@dataclasses.dataclass(frozen=True)
class ExpertRouting:
    """The counts are on their way to the host; the order of the rows here is known. arriving_PL:
    rows that come from each rank for each local expert."""

    side: SideStream
    saved: SavedActivations
    slots: SlotOrder
    arriving_PL: torch.Tensor
    counts: Reading
    counted: Event

    def wait(self) -> ExpertRoute:
        num_ranks, num_local = self.arriving_PL.shape
        numbers = integers(self.counts.wait())
        here = numbers[:num_ranks]
        there = [sum(numbers[i : i + num_local]) for i in range(num_ranks, len(numbers), num_local)]
        of_experts = tuple(sum(numbers[num_ranks + e :: num_local]) for e in range(num_local))
        with self.side.issue((), self.counted):
            to_source_M = expert_places(self.arriving_PL, sum(there))
            orders = RouteTables(self.saved, inverse(to_source_M), to_source_M)
            offsets_L = self.arriving_PL.sum(0).cumsum(0).to(torch.int32)
        return ExpertRoute(self.slots, orders, here, there, offsets_L, of_experts)


def expert_places(arriving_PL: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The place of every arrived row among rows sorted by expert (M,), int32.

    Arrived rows are sorted by source and within a source by expert, so each (source, expert) is a
    run that moves as a whole, and no sort is needed: a run's first place is that of all runs of
    experts before it, and of its expert's runs from sources before it.
    """
    by_expert_LP = arriving_PL.t().contiguous()
    sorted_first_PL = (by_expert_LP.flatten().cumsum(0).view_as(by_expert_LP) - by_expert_LP).t()
    arrived_first_PL = arriving_PL.flatten().cumsum(0).view_as(arriving_PL) - arriving_PL
    shift_M = torch.repeat_interleave(
        (sorted_first_PL - arrived_first_PL).flatten(), arriving_PL.flatten(), output_size=num_rows
    )
    return (shift_M + torch.arange(num_rows, device=shift_M.device)).to(torch.int32)


class AllToAllDispatcher:
    """Dispatcher over an expert-parallel group whose ranks hold equal numbers of consecutive
    experts.

    Every rank of the group calls `start_route`, `dispatch` and `combine` in the same order: each
    `start_route` is one all-to-all of counts, each move one all-to-all. Both go on beside the main
    stream. On a CPU a move has ended when it returns.
    """

    def __init__(self, group: Communicator, num_experts: int, side: SideStream) -> None:
        assert num_experts % group.size == 0, f"{num_experts} experts do not divide among {group.size} ranks"
        self.group, self.side, self.device = group, side, side.device
        self.num_local = num_experts // group.size

    def start_route(
        self,
        experts_TK: torch.Tensor,
        counts_E: torch.Tensor,
        saved: SavedActivations,
        ready: Event | None = None,
    ) -> ExpertRouting:
        with self.side.issue((experts_TK, counts_E), ready):
            sent_PL = counts_E.to(torch.int64).view(self.group.size, self.num_local).contiguous()
            arriving_PL = torch.empty_like(sent_PL)
            self.group.all_to_all(arriving_PL, sent_PL)
            numbers = torch.cat([sent_PL.sum(1), arriving_PL.flatten()])
            reading = self.device.start_read(numbers, "route")
            slots = SlotOrder(experts_TK, saved)
            counted = self.device.current.record()
        return ExpertRouting(self.side, saved, slots, arriving_PL, reading, counted)

    def dispatch(
        self,
        x_TD: torch.Tensor,
        route: Route,
        weights_TK: torch.Tensor | None = None,
        ready: Event | None = None,
    ) -> Results:
        assert isinstance(route, ExpertRoute)
        self.side.tables(route.slots.tables)
        to_expert_M, _ = self.side.tables(route.orders)

        def move(x_TD: torch.Tensor, *weights_TK: torch.Tensor) -> Tensors:
            rows = route.slots.copy(x_TD), *(route.slots.to_rows(w) for w in weights_TK)
            moving = start_exchange(self.group, pack(rows), rows, route.here, route.there)
            return tuple(part.index_select(0, to_expert_M) for part in moving.wait())

        return self.side.start(move, (x_TD,) if weights_TK is None else (x_TD, weights_TK), ready)

    def combine(
        self,
        rows_MD: torch.Tensor,
        route: Route,
        weights_M: torch.Tensor | None = None,
        plus_TD: torch.Tensor | None = None,
        ready: Event | None = None,
    ) -> Results:
        assert isinstance(route, ExpertRoute)
        self.side.tables(route.slots.tables)
        _, to_source_M = self.side.tables(route.orders)

        def move(*inputs: torch.Tensor) -> Tensors:
            rows = tuple(t.index_select(0, to_source_M) for t in (rows_MD, weights_M) if t is not None)
            moving = start_exchange(self.group, pack(rows), rows, route.there, route.here)
            rows_ND, *weights_N = moving.wait()
            sums_TD = with_added(route.slots.sum(rows_ND), plus_TD)
            return sums_TD, *(route.slots.to_slots(w) for w in weights_N)

        inputs = tuple(t for t in (rows_MD, weights_M, plus_TD) if t is not None)
        return self.side.start(move, inputs, ready)
