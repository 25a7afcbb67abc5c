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

Letters: T tokens, K experts per token, L local experts, P ranks of the group, N nodes, G ranks of the group on a node,
R rows at this rank, M rows at its experts, D features.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from k2train.model.dispatcher import Arrived, Pending, Route, RouteTables, Tensors
from k2train.model.saved import SavedActivations
from k2train.ops.permute import sum_copies
from k2train.parallel.communicator import Communicator, Work
from k2train.parallel.side_stream import SideStream

Masks = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class _Moving:
    """Tensors under way, and what is made of them when they have arrived."""

    works: Sequence[Work]
    arrived: Tensors
    then: Callable[[torch.Tensor], torch.Tensor] | None = None

    def wait(self) -> Tensors:
        for work in self.works:
            work.wait()
        return self.arrived if self.then is None else tuple(self.then(t) for t in self.arrived)


@dataclasses.dataclass(frozen=True)
class _Hop:
    """One all-to-all of copies. leaving[p], arriving[p]: copies to and from rank p of the group; num_rows: rows before it."""

    group: Communicator
    leaving: list[int]
    arriving: list[int]
    num_rows: int

    @property
    def num_arriving(self) -> int:
        return sum(self.arriving)

    def go(self, rows: Tensors, row_of_copy: torch.Tensor, outs: Tensors | None = None) -> _Moving:
        """Rows to their copies, where those are needed; into outs where they are given."""
        copies = tuple(t.index_select(0, row_of_copy) for t in rows)
        if outs is None:
            outs = _like(copies, self.num_arriving)
        return _Moving(self._start(outs, copies, self.arriving, self.leaving), outs)

    def back(self, copies: Tensors, row_of_copy: torch.Tensor) -> _Moving:
        """The transpose: copies to the sums of each row's."""
        outs = _like(copies, sum(self.leaving))
        works = self._start(outs, copies, self.leaving, self.arriving)
        return _Moving(works, outs, lambda t: sum_copies(t, row_of_copy, self.num_rows))

    def _start(self, outs: Tensors, tensors: Tensors, arriving: list[int], leaving: list[int]) -> list[Work]:
        return [
            self.group.start_all_to_all(out, t.contiguous(), arriving, leaving)
            for out, t in zip(outs, tensors, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class RelayRoute:
    """One layer's exchange of one microbatch.

    parts: the hops of every part of its tokens. tables: for every part and hop the row of each copy; then for each of this
    rank's M expert rows its row among those that arrived (part by part), and its place row * K + k among their choices.
    num_choices: K. offsets (L,) int32.
    """

    parts: tuple[tuple[_Hop, ...], ...]
    tables: RouteTables
    num_choices: int
    offsets: torch.Tensor

    def settle(self, saved: SavedActivations) -> None:
        self.tables.settle(saved)

    def split_tables(self) -> tuple[list[Tensors], torch.Tensor, torch.Tensor]:
        """The tables by part, and the two of expert rows."""
        *sources, row_M, place_M = self.tables
        hops = len(self.parts[0])
        return [tuple(sources[i : i + hops]) for i in range(0, len(sources), hops)], row_M, place_M

    @property
    def tokens_of_parts(self) -> list[int]:
        return [hops[0].num_rows for hops in self.parts]

    @property
    def rows_of_parts(self) -> list[int]:
        """Rows that arrive here."""
        return [hops[-1].num_arriving for hops in self.parts]


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
        owner_PTK = choices_PTK // self.num_local
        chosen_PTK = owner_PTK == self.group.rank
        parts = [self._masks(part_PTK) for part_PTK in owner_PTK.tensor_split(self.num_parts, 1)]
        counts = [mask.flatten(1).sum(1) for masks in parts for hop in masks for mask in hop]
        *splits, (num_chosen,) = _to_host([*counts, chosen_PTK.sum().view(1)])
        sizes = iter(splits)
        hops, tables, rows = zip(*(self._hops(masks, sizes) for masks in parts), strict=True)
        row_PT = torch.cat(_one_after_the_other(rows, [part[-1].num_arriving for part in hops]), 1)

        num_choices = experts_TK.shape[1]
        row_PTK = row_PT.unsqueeze(-1).expand_as(chosen_PTK)
        place_PTK = row_PTK * num_choices + torch.arange(num_choices, dtype=torch.int32, device=row_PT.device)
        expert, row, place = (
            _selected(values, chosen_PTK, num_chosen) for values in (choices_PTK, row_PTK, place_PTK)
        )
        sorted_M, order_M = torch.sort(expert - self.group.rank * self.num_local, stable=True)
        next_L = torch.arange(1, self.num_local + 1, device=sorted_M.device)
        offsets_L = torch.searchsorted(sorted_M, next_L, out_int32=True)
        by_expert = row.index_select(0, order_M), place.index_select(0, order_M)
        kept = RouteTables(saved, *(table for part in tables for table in part), *by_expert)
        return RelayRoute(hops, kept, num_choices, offsets_L)

    def dispatch(self, x_TD: torch.Tensor, route: Route, weights_TK: torch.Tensor | None = None) -> Pending:
        assert isinstance(route, RelayRoute)
        tables, row_M, place_M = route.split_tables()

        def move(*rows: torch.Tensor) -> Tensors:
            outs = _like(rows, sum(route.rows_of_parts))
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

    def _masks(self, owner_PTK: torch.Tensor) -> list[Masks]:
        """Those of the hops there are."""
        masks = hop_masks(owner_PTK, self.hop_groups[-1].size, self.group.rank)
        return masks[-len(self.hop_groups) :]

    def _hops(
        self, masks: list[Masks], sizes: Iterator[list[int]]
    ) -> tuple[tuple[_Hop, ...], Tensors, torch.Tensor]:
        """The hops of one part, their tables, and the row at this rank of every rank's token (P, T) that comes here."""
        hops, tables = [], []
        num_rows = masks[0][0].shape[-1]
        row_of_token = torch.arange(num_rows, dtype=torch.int32, device=masks[0][0].device)
        for group, (outgoing, incoming) in zip(self.hop_groups, masks, strict=True):
            leaving, arriving = next(sizes), next(sizes)
            tables.append(_selected(row_of_token.expand_as(outgoing), outgoing, sum(leaving)))
            hops.append(_Hop(group, leaving, arriving, num_rows))
            row_of_token, num_rows = _numbered(incoming), sum(arriving)
        return tuple(hops), tuple(tables), row_of_token.transpose(0, 1).flatten(0, 1)

    def _all_choices(self, experts_TK: torch.Tensor) -> torch.Tensor:
        """Every rank's choices (P, T, K), int64."""
        mine_TK = experts_TK.to(torch.int32).contiguous()
        choices = mine_TK.new_empty(self.group.size * mine_TK.shape[0], mine_TK.shape[1])
        self.group.all_gather(choices, mine_TK)
        return choices.view(self.group.size, *mine_TK.shape).to(torch.int64)


def hop_masks(owner_PTK: torch.Tensor, ranks_per_node: int, rank: int) -> list[Masks]:
    """Which copies leave `rank` and which arrive, for the hop between nodes and the hop inside one.

    owner_PTK: the rank of every choice. Each mask's first dimension is the peer; then come the tokens the copies are of, in
    the order they travel in: (N, T) between nodes, where N is the peer's node, and (G, N, T) inside, where G is the peer's
    place on the node and N the node a token comes from.
    """
    num_ranks, tokens, _ = owner_PTK.shape
    nodes = num_ranks // ranks_per_node
    node, place = divmod(rank, ranks_per_node)
    needed_PTP = torch.zeros(num_ranks, tokens, num_ranks, dtype=torch.bool, device=owner_PTK.device)
    needed_PTP.scatter_(2, owner_PTK, True)
    # Token of (source's node, source's place), needed by (node, place).
    needed_NGTNG = needed_PTP.view(nodes, ranks_per_node, tokens, nodes, ranks_per_node)
    on_rail_NTNG = needed_NGTNG[:, place]
    crossing_NTN = on_rail_NTNG.any(-1)
    between = crossing_NTN[node].t(), crossing_NTN[:, :, node]
    inside = on_rail_NTNG[:, :, node].permute(2, 0, 1), needed_NGTNG[:, :, :, node, place].transpose(0, 1)
    return [between, inside]


def _like(tensors: Tensors, num_rows: int) -> Tensors:
    """Room for so many rows of each."""
    return tuple(t.new_empty(num_rows, *t.shape[1:]) for t in tensors)


def _parts(tensors: Tensors, sizes: Sequence[int]) -> list[Tensors]:
    """The tensors' rows, cut into parts of these sizes."""
    return list(zip(*(t.split(list(sizes)) for t in tensors), strict=True))


def _one_after_the_other(rows: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Row numbers of each part, counted on from those of the parts before it."""
    first = itertools.accumulate(sizes, initial=0)
    return [row + start for row, start in zip(rows, first, strict=False)]


def _to_host(counts: Sequence[torch.Tensor]) -> list[list[int]]:
    """The tensors' numbers, after one wait for the device."""
    numbers = iter(torch.cat(list(counts)).tolist())
    return [[next(numbers) for _ in range(count.numel())] for count in counts]


def _numbered(mask: torch.Tensor) -> torch.Tensor:
    """The place of every True among all of them, int32 like all tables."""
    return mask.flatten().cumsum(0, dtype=torch.int32).sub_(1).view(mask.shape)


def _selected(values: torch.Tensor, mask: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` values where the mask is True, in order, without a wait for the device."""
    where = torch.nonzero_static(mask.flatten(), size=size).squeeze(1)
    return values.flatten().index_select(0, where)
