"""The all-to-all that sends a row for every expert a token chose: model.dispatcher's protocol over an ep group.

Expert e lives on ep rank e // L. Rows leave sorted by expert, so they are already sorted by destination; they arrive
sorted by source and within a source by expert, and are sorted once more so that each local expert's rows are neighbours,
which is what a grouped product needs.

    leave    | e0 e0 e1 | e2 e3 e3 |              rank 0 to ranks 0 and 1, L = 2
    arrive   | e0 e0 e1 | e0 e1    |              at rank 0, from ranks 0 and 1
    sorted   | e0 e0 e0 | e1 e1    |

Both moves are linear and each is the other's transpose; forward and backward share one Route. Any rank may send or
receive nothing. Payloads keep their type: K2 computes in BF16 and sends BF16 (K2 report, section 2.4.3).

`relay_dispatcher.py` sends a token once for every rank or node instead.

Letters: T tokens, K experts per token, E experts, L local experts, P ranks of the group, N rows here, M rows at local
experts.
"""

from __future__ import annotations

import torch

from k2train.model.dispatcher import Pending, Route, SlotOrder, Tensors
from k2train.model.saved import SavedActivations
from k2train.parallel.communicator import Communicator
from k2train.parallel.exchange import start_exchange


class ExpertRoute:
    """One layer's exchange of one microbatch.

    here[p]: rows this rank has for rank p; there[p]: rows that come from rank p. arriving_PL: the same for each local
    expert. offsets (L,) int32: the row after each local expert's last. What is kept from forward to backward are these
    counts and `slots`, the order of the rows here; the order of those that arrive, 16 bytes a row, is worked out from the
    counts when it is needed.
    """

    def __init__(
        self, slots: SlotOrder, here: list[int], there: list[int], arriving_PL: torch.Tensor
    ) -> None:
        self.slots, self.here, self.there, self.arriving_PL = slots, here, there, arriving_PL
        self._orders: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def offsets(self) -> torch.Tensor:
        return self.arriving_PL.sum(0).cumsum(0).to(torch.int32)

    def settle(self, saved: SavedActivations) -> None:
        """Let the permutations go until the backward."""
        self.slots.settle(saved)
        self._orders = None

    @property
    def to_expert(self) -> torch.Tensor:
        """(M,): takes arrived rows to the order of local experts."""
        return self._permutations()[0]

    @property
    def to_source(self) -> torch.Tensor:
        """(M,): takes them back."""
        return self._permutations()[1]

    def _permutations(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._orders is None:
            self._orders = _orders(self.arriving_PL, sum(self.there))
        return self._orders


def _orders(arriving_PL: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sorted by source, and within a source by expert, to rows sorted by expert, and back."""
    num_ranks, num_local = arriving_PL.shape
    expert_of_row_M = torch.repeat_interleave(
        torch.arange(num_local, device=arriving_PL.device).repeat(num_ranks),
        arriving_PL.flatten(),
        output_size=num_rows,
    )
    to_expert_M = torch.argsort(expert_of_row_M, stable=True)
    to_source_M = torch.empty_like(to_expert_M)
    to_source_M[to_expert_M] = torch.arange(num_rows, device=arriving_PL.device)
    return to_expert_M, to_source_M


class AllToAllDispatcher:
    """Dispatcher over an expert-parallel group whose ranks hold equal numbers of consecutive experts.

    Every rank of the group calls `route`, `dispatch` and `combine` in the same order: each `route` is one all-to-all of
    counts, each move one all-to-all for every tensor. `route` waits for the device, because the counts become splits.
    """

    def __init__(self, group: Communicator, num_experts: int) -> None:
        assert num_experts % group.size == 0, f"{num_experts} experts do not divide among {group.size} ranks"
        self.group = group
        self.num_local = num_experts // group.size

    def route(self, experts_TK: torch.Tensor, counts_E: torch.Tensor, saved: SavedActivations) -> ExpertRoute:
        slots = SlotOrder(experts_TK, saved)
        sent_PL = counts_E.to(torch.int64).view(self.group.size, self.num_local).contiguous()
        arriving_PL = torch.empty_like(sent_PL)
        self.group.all_to_all(arriving_PL, sent_PL)
        here, there = torch.stack([sent_PL.sum(1), arriving_PL.sum(1)]).tolist()
        return ExpertRoute(slots, here, there, arriving_PL)

    def dispatch(self, x_TD: torch.Tensor, route: Route, weights_TK: torch.Tensor | None = None) -> Pending:
        assert isinstance(route, ExpertRoute)
        order_M = route.to_expert
        rows: Tensors = (route.slots.copy(x_TD),)
        if weights_TK is not None:
            rows += (route.slots.to_rows(weights_TK),)

        def sort(arrived: torch.Tensor) -> torch.Tensor:
            return arrived.index_select(0, order_M)

        return start_exchange(self.group, rows, route.here, route.there, (sort, sort))

    def combine(self, rows_MD: torch.Tensor, route: Route, weights_M: torch.Tensor | None = None) -> Pending:
        assert isinstance(route, ExpertRoute)
        order_M = route.to_source
        rows = tuple(t.index_select(0, order_M) for t in (rows_MD, weights_M) if t is not None)
        last = route.slots.sum, route.slots.to_slots
        return start_exchange(self.group, rows, route.there, route.here, last)
