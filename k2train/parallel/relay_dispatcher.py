"""The all-to-all that sends a token once: model.dispatcher's protocol over an ep group, in one hop or two.

A token goes once to every node that holds one of its experts, there once to every rank that does, and only on that rank
is it copied for each of its experts. On the way back the copies are added up where they were made. Half of K2's eight
experts are on the other of two nodes; its network then carries one row instead of four (the way of DeepEP,
github.com/deepseek-ai/DeepEP).

    two nodes of two, a token of rank 0 with experts on ranks 2 and 3:

    hop between nodes     0 -> 2            each rank to those at its own place on other nodes, by its own network card
    hop inside a node     2 -> 2, 2 -> 3    each rank to those of its node
    at ranks 2 and 3      a row for each expert chosen there

With one node there is only the second hop. Every rank knows every choice of its group (one all-gather of small integers),
so that who sends what is worked out everywhere alike and rows travel without a word about them. Rows come out in the same
order as `AllToAllDispatcher`'s, equal to the bit; sums on the way back are rounded to the rows' type at every hop.

`relay_route.py` works out who sends what. Letters: T tokens, K experts per token, P ranks of the group, R rows at this rank,
M rows at its experts, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from k2train.model.dispatcher import Arrived, Pending, Route, Tensors
from k2train.model.saved import SavedActivations
from k2train.ops.permute import sum_copies
from k2train.parallel.communicator import Communicator
from k2train.parallel.exchange import like
from k2train.parallel.relay_route import RelayRoute, build_route
from k2train.parallel.side_stream import SideStream


class RelayDispatcher:
    """Dispatcher over an expert-parallel group whose ranks hold equal numbers of consecutive experts and whose nodes hold
    equal numbers of consecutive ranks.

    group: all P ranks. node: those of this rank's node. rail: those at this rank's place on every node, None where there is
    one node. num_parts: how many parts the tokens are sent in, so that one's hop between nodes goes on under another's
    inside them. Every rank of `group` calls `route`, `dispatch` and `combine` in the same order, with as many tokens as the
    others: a `route` is one all-gather in `group`, a move one all-to-all in `rail` and one in `node` for every part and
    tensor. `route` waits for the device, because counts become splits. On a CPU a move has ended when its start returns.
    """

    def __init__(
        self,
        group: Communicator,
        node: Communicator,
        rail: Communicator | None,
        num_experts: int,
        side: SideStream,
        num_parts: int = 1,
    ) -> None:
        assert num_experts % group.size == 0, f"{num_experts} experts do not divide among {group.size} ranks"
        self.group, self.side, self.num_parts = group, side, num_parts
        self.hop_groups = (node,) if rail is None else (rail, node)
        self.num_local = num_experts // group.size

    def route(self, experts_TK: torch.Tensor, counts_E: torch.Tensor, saved: SavedActivations) -> RelayRoute:
        choices_PTK = self._all_choices(experts_TK)
        return build_route(
            choices_PTK, self.num_local, self.group.rank, self.hop_groups, self.num_parts, saved
        )

    def dispatch(self, x_TD: torch.Tensor, route: Route, weights_TK: torch.Tensor | None = None) -> Pending:
        assert isinstance(route, RelayRoute)
        tables, row_M, place_M = route.split_tables()

        def move(*rows: torch.Tensor) -> Tensors:
            outs = like(rows, sum(route.rows_of_parts))
            landing = _parts(outs, route.rows_of_parts)
            moving: list[Pending] = [Arrived(part) for part in _parts(rows, route.tokens_of_parts)]
            for hop in range(len(self.hop_groups)):
                last = hop == len(self.hop_groups) - 1
                moving = [
                    hops[hop].go(pending.wait(), table[hop], out if last else None)
                    for pending, hops, table, out in zip(moving, route.parts, tables, landing, strict=True)
                ]
            for pending in moving:
                pending.wait()
            rows_RD, *weights = outs
            return rows_RD.index_select(0, row_M), *(w.reshape(-1).index_select(0, place_M) for w in weights)

        rows = (x_TD,) if weights_TK is None else (x_TD, weights_TK)
        return self.side.start(move, rows, reads=(*itertools.chain(*tables), row_M, place_M))

    def combine(self, rows_MD: torch.Tensor, route: Route, weights_M: torch.Tensor | None = None) -> Pending:
        assert isinstance(route, RelayRoute)
        tables, row_M, place_M = route.split_tables()

        def move(*rows: torch.Tensor) -> Tensors:
            rows_MD, *weights = rows
            shape = sum(route.rows_of_parts), route.num_choices
            # A place belongs to one expert, so nothing is added up here: the other places wait for other ranks.
            placed = (w.new_zeros(shape).view(-1).scatter_(0, place_M.long(), w).view(shape) for w in weights)
            sums = sum_copies(rows_MD, row_M, shape[0]), *placed
            moving: list[Pending] = [Arrived(part) for part in _parts(sums, route.rows_of_parts)]
            for hop in reversed(range(len(self.hop_groups))):
                moving = [
                    hops[hop].back(pending.wait(), table[hop])
                    for pending, hops, table in zip(moving, route.parts, tables, strict=True)
                ]
            return tuple(
                torch.cat(parts) for parts in zip(*(pending.wait() for pending in moving), strict=True)
            )

        rows = (rows_MD,) if weights_M is None else (rows_MD, weights_M)
        return self.side.start(move, rows, reads=(*itertools.chain(*tables), row_M, place_M))

    def _all_choices(self, experts_TK: torch.Tensor) -> torch.Tensor:
        """Every rank's choices (P, T, K), int64."""
        mine_TK = experts_TK.to(torch.int32).contiguous()
        choices = mine_TK.new_empty(self.group.size * mine_TK.shape[0], mine_TK.shape[1])
        self.group.all_gather(choices, mine_TK)
        return choices.view(self.group.size, *mine_TK.shape).to(torch.int64)


def _parts(tensors: Tensors, sizes: Sequence[int]) -> list[Tensors]:
    """The tensors' rows, cut into parts of these sizes."""
    return list(zip(*(t.split(list(sizes)) for t in tensors), strict=True))
