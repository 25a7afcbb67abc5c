"""The all-to-all that sends a token once: model.dispatcher's protocol over an ep group, in one hop
or two.

A token goes once to every node that holds one of its experts, there once to every rank that does,
and only on that rank is it copied for each of its experts. On the way back the copies are added up
where they were made. Half of K2's eight experts are on the other of two nodes; its network then
carries one row instead of four (the way of DeepEP, github.com/deepseek-ai/DeepEP).

    two nodes of two, a token of rank 0 with experts on ranks 2 and 3:

    hop between nodes     0 -> 2            each rank to those at its own place on other nodes, by
                          its own network card
    hop inside a node     2 -> 2, 2 -> 3    each rank to those of its node
    at ranks 2 and 3      a row for each expert chosen there

With one node there is only the second hop. Every rank knows every choice of its group (one
all-gather of small integers), so that who sends what is worked out everywhere alike and rows travel
without a word about them. Rows come out in the same order as `AllToAllDispatcher`'s, equal to the
bit; sums on the way back are rounded to the rows' type at every hop.

`relay_route.py` works out who sends what. Letters: T tokens, K experts per token, P ranks of the
group, R rows at this rank, M rows at its experts, D features, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from k2train.device.protocol import Event, Reading, integers
from k2train.model.dispatcher import Results, Route, Tensors, with_added
from k2train.model.saved import SavedActivations
from k2train.ops.permute import sum_copies
from k2train.parallel.communicator import Communicator
from k2train.parallel.exchange import pack, unpack
from k2train.parallel.relay_route import (
    HopTables,
    RelayRoute,
    RouteCounts,
    build_route,
    count_route,
)
from k2train.parallel.side_stream import SideStream


@dataclasses.dataclass(frozen=True)
class RelayRouting:
    """The counts are on their way to the host; what needs no sizes is worked out."""

    side: SideStream
    saved: SavedActivations
    hop_groups: Sequence[Communicator]
    num_tokens: int
    counts: RouteCounts
    reading: Reading
    counted: Event

    def wait(self) -> RelayRoute:
        numbers = integers(self.reading.wait())
        with self.side.issue((), self.counted):
            return build_route(self.counts, numbers, self.num_tokens, self.hop_groups, self.saved)


class RelayDispatcher:
    """Dispatcher over an expert-parallel group whose ranks hold equal numbers of consecutive
    experts and whose nodes hold equal numbers of consecutive ranks.

    group: all P ranks. node: those of this rank's node. rail: those at this rank's place on every
    node, None where there is one node. num_parts: how many parts the tokens are sent in, so that
    one's hop between nodes goes on under another's inside them.

    Every rank of `group` calls `start_route`, `dispatch` and `combine` in the same order, with as
    many tokens as the others: a `start_route` is one all-gather in `group`, a move one all-to-all
    in `rail` and one in `node` for every part. All go on beside the main stream. On a CPU a move
    has ended when it returns.
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
        self.group, self.side, self.device, self.num_parts = group, side, side.device, num_parts
        self.hop_groups = (node,) if rail is None else (rail, node)
        self.num_local = num_experts // group.size

    def start_route(
        self,
        experts_TK: torch.Tensor,
        counts_E: torch.Tensor,
        saved: SavedActivations,
        ready: Event | None = None,
    ) -> RelayRouting:
        with self.side.issue((experts_TK,), ready):
            choices_PTK = self._all_choices(experts_TK)
            num_tokens, group = experts_TK.shape[0], self.group
            counts = count_route(
                choices_PTK, num_tokens, self.num_local, group.rank, self.hop_groups, self.num_parts
            )
            reading = self.device.start_read(counts.numbers, "route")
            counted = self.device.current.record()
        return RelayRouting(self.side, saved, self.hop_groups, num_tokens, counts, reading, counted)

    def dispatch(
        self,
        x_TD: torch.Tensor,
        route: Route,
        weights_TK: torch.Tensor | None = None,
        ready: Event | None = None,
    ) -> Results:
        assert isinstance(route, RelayRoute)
        hops, experts = route.split_tables(self.side.tables(route.tables))

        def move(*rows: torch.Tensor) -> Tensors:
            rows_RD, *weights_RK = unpack(self._spread(route, hops, rows), rows)
            found = (w.reshape(-1).index_select(0, experts.place) for w in weights_RK)
            return rows_RD.index_select(0, experts.rows(route.num_choices)), *found

        return self.side.start(move, (x_TD,) if weights_TK is None else (x_TD, weights_TK), ready)

    def combine(
        self,
        rows_MD: torch.Tensor,
        route: Route,
        weights_M: torch.Tensor | None = None,
        plus_TD: torch.Tensor | None = None,
        ready: Event | None = None,
    ) -> Results:
        assert isinstance(route, RelayRoute)
        hops, experts = route.split_tables(self.side.tables(route.tables))

        def move(*inputs: torch.Tensor) -> Tensors:
            sums: Tensors = (sum_copies(rows_MD, experts.order, experts.first),)
            if weights_M is not None:
                sums += (experts.placed(weights_M, route.num_choices),)
            sums_TD, *weights_TK = self._gathered(route, hops, sums)
            return with_added(sums_TD, plus_TD), *weights_TK

        inputs = tuple(t for t in (rows_MD, weights_M, plus_TD) if t is not None)
        return self.side.start(move, inputs, ready)

    def _spread(self, route: RelayRoute, tables: list[list[HopTables]], rows: Tensors) -> torch.Tensor:
        """Tokens to the ranks that need them: a packed message of the rows that arrive here, part
        by part."""
        message = pack(rows)
        out = message.new_empty(sum(route.rows_of_parts), *message.shape[1:])
        landing = out.split(route.rows_of_parts)
        parts: Iterable[torch.Tensor] = message.split(route.tokens_of_parts)
        for hop in range(len(self.hop_groups)):
            last = hop == len(self.hop_groups) - 1
            moving = [
                hops[hop].go(part, rows, of_hop[hop], end if last else None)
                for part, hops, of_hop, end in zip(parts, route.parts, tables, landing, strict=True)
            ]
            # Waited for one by one, so that a part's next hop is started while later parts are
            # under way.
            parts = (one.message() for one in moving)
        for _ in parts:
            pass
        return out

    def _gathered(self, route: RelayRoute, tables: list[list[HopTables]], sums: Tensors) -> Tensors:
        """The transpose: what the rows that arrived here have become, added up at their tokens."""
        parts: Iterable[Tensors] = zip(*(t.split(route.rows_of_parts) for t in sums), strict=True)
        for hop in reversed(range(len(self.hop_groups))):
            moving = [
                hops[hop].back(part, of_hop[hop])
                for part, hops, of_hop in zip(parts, route.parts, tables, strict=True)
            ]
            parts = (one.wait() for one in moving)
        return tuple(_joined(found) for found in zip(*parts, strict=True))

    def _all_choices(self, experts_TK: torch.Tensor) -> torch.Tensor:
        """Every rank's choices (P, T, K), int64, T filled up to equal parts with choices of no
        expert."""
        mine_TK = experts_TK.to(torch.int32).contiguous()
        missing = -len(mine_TK) % self.num_parts
        if missing:
            mine_TK = F.pad(mine_TK, (0, 0, 0, missing), value=self.num_local * self.group.size)
        choices = mine_TK.new_empty(self.group.size * mine_TK.shape[0], mine_TK.shape[1])
        self.group.all_gather(choices, mine_TK)
        return choices.view(self.group.size, *mine_TK.shape).to(torch.int64)


def _joined(parts: Tensors) -> torch.Tensor:
    """The parts one behind the other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
