"""Who sends which token to whom on the way to the experts: the plan of one exchange of
`RelayDispatcher`, from all choices.

Every rank of an expert-parallel group knows every choice, so each works out its own part of the
exchange and no row needs a header. `count_route` is the part that needs no sizes: it ends in one
tensor of counts, which the host reads. `build_route` is the rest, when the host has them.

Letters: T tokens, K experts per token, L local experts, P ranks of the group, N nodes, G ranks of
the group on a node, M rows at this rank's experts, C copies that leave in a hop, S rows they are
copies of, R rows that arrive at this rank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from k2train.model.dispatcher import RouteTables, Tensors
from k2train.model.saved import SavedActivations
from k2train.ops.permute import sum_copies, sum_order
from k2train.parallel.communicator import Communicator
from k2train.parallel.exchange import Moving, pack, start_exchange

Masks = tuple[torch.Tensor, torch.Tensor]
"""Which copies leave in a hop, and which arrive."""


class HopTables(NamedTuple):
    """One hop of one part, int32."""

    row_of_copy: torch.Tensor
    """(C,)."""
    order: torch.Tensor
    """(C,): copies in order of their rows."""
    first: torch.Tensor
    """(S,): where each row's copies begin in that order."""


class ExpertTables(NamedTuple):
    """The rows at this rank's experts, int32."""

    place: torch.Tensor
    """(M,): of each expert row its place row * K + k among the choices of the R rows that arrived
    (part by part)."""
    order: torch.Tensor
    """(M,): expert rows in order of the rows that arrived."""
    first: torch.Tensor
    """(R,): where each one's begin in that order."""

    def rows(self, num_choices: int) -> torch.Tensor:
        """(M,): of each expert row its row among those that arrived."""
        return torch.div(self.place, num_choices, rounding_mode="floor")

    def placed(self, weights_M: torch.Tensor, num_choices: int) -> torch.Tensor:
        """The experts' weights at their places among the choices (R, K).

        A place belongs to one expert, so nothing is added up: the other places wait for other
        ranks.
        """
        weights_RK = weights_M.new_zeros(self.first.shape[0], num_choices)
        weights_RK.view(-1).scatter_(0, self.place.long(), weights_M)
        return weights_RK


@dataclasses.dataclass(frozen=True)
class Hop:
    """One all-to-all of copies. leaving[p], arriving[p]: copies to and from rank p of the group."""

    group: Communicator
    leaving: list[int]
    arriving: list[int]
    num_rows: int
    """Rows before it."""

    @property
    def num_arriving(self) -> int:
        return sum(self.arriving)

    def go(
        self, message: torch.Tensor, like: Tensors, tables: HopTables, out: torch.Tensor | None = None
    ) -> Moving:
        """Rows of a packed message to their copies, where those are needed; into `out` where it is
        given."""
        copies = message.index_select(0, tables.row_of_copy)
        return start_exchange(self.group, copies, like, self.leaving, self.arriving, out=out)

    def back(self, copies: Tensors, tables: HopTables) -> Moving:
        """The transpose: copies to the sums of each row's."""

        def add_up(returned: torch.Tensor) -> torch.Tensor:
            return sum_copies(returned, tables.order, tables.first)

        then = (add_up,) * len(copies)
        return start_exchange(self.group, pack(copies), copies, self.arriving, self.leaving, then)


@dataclasses.dataclass(frozen=True)
class RelayRoute:
    """One layer's exchange of one microbatch.

    parts: the hops of every part of its tokens. tables: those of every hop, all parts one behind
    the other, then the experts'. num_choices: K. offsets (L,) int32.
    """

    parts: tuple[tuple[Hop, ...], ...]
    tables: RouteTables
    num_choices: int
    offsets: torch.Tensor
    rows_of_experts: tuple[int, ...]

    def settle(self, saved: SavedActivations) -> None:
        self.tables.settle(saved)

    def split_tables(self, tables: Tensors) -> tuple[list[list[HopTables]], ExpertTables]:
        """The tables by part and hop, and those of the expert rows."""
        *of_hops, place_M, order_M, first_R = tables
        by_hop = []
        for hop, column in enumerate(zip(*self.parts, strict=True)):
            copies, rows = [sum(part.leaving) for part in column], [part.num_rows for part in column]
            cut = (
                t.split(sizes) for t, sizes in zip(of_hops[3 * hop :], (copies, copies, rows), strict=False)
            )
            by_hop.append([HopTables(*found) for found in zip(*cut, strict=True)])
        parts = [list(found) for found in zip(*by_hop, strict=True)]
        return parts, ExpertTables(place_M, order_M, first_R)

    @property
    def tokens_of_parts(self) -> list[int]:
        return [hops[0].num_rows for hops in self.parts]

    @property
    def rows_of_parts(self) -> list[int]:
        """Rows that arrive here."""
        return [hops[-1].num_arriving for hops in self.parts]


@dataclasses.dataclass(frozen=True)
class RouteCounts:
    """A route before its sizes are known.

    choices (P, T, K) int64 are every rank's experts, chosen (P, T, K) which of them are here. here
    (parts, T / parts): this rank's tokens, without those that fill up the last parts. masks: of
    every hop, a part for every first index. offsets (L,) int32. numbers: for every hop and
    direction the copies by part and peer, then the rows of each local expert.
    """

    choices: torch.Tensor
    chosen: torch.Tensor
    here: torch.Tensor
    masks: list[Masks]
    offsets: torch.Tensor
    numbers: torch.Tensor


def count_route(
    choices_PTK: torch.Tensor,
    num_tokens: int,
    num_local: int,
    rank: int,
    hop_groups: Sequence[Communicator],
    num_parts: int,
) -> RouteCounts:
    """Count the route of `rank` in the group; waits for nothing and communicates with nobody.

    choices_PTK: every rank's experts, int64; T is a multiple of num_parts, and tokens from
    num_tokens on choose an expert that does not exist. hop_groups: the group of every hop, the last
    one that of its node.
    """
    owner_PTK = choices_PTK // num_local
    chosen_PTK = owner_PTK == rank
    masks = hop_masks(owner_PTK, hop_groups[-1].size, rank, num_parts)[-len(hop_groups) :]
    counts = [mask.flatten(2).sum(2).flatten() for hop in masks for mask in hop]
    # One place more, for the choices of other ranks' experts.
    local_PTK = torch.where(chosen_PTK, choices_PTK - rank * num_local, num_local).flatten()
    rows_L = choices_PTK.new_zeros(num_local + 1).scatter_add_(0, local_PTK, torch.ones_like(local_PTK))
    rows_L = rows_L[:num_local]
    here = (torch.arange(choices_PTK.shape[1], device=owner_PTK.device) < num_tokens).view(num_parts, -1)
    offsets_L = rows_L.cumsum(0, dtype=torch.int32)
    return RouteCounts(choices_PTK, chosen_PTK, here, masks, offsets_L, torch.cat([*counts, rows_L]))


def build_route(
    counts: RouteCounts,
    numbers: Sequence[int],
    num_tokens: int,
    hop_groups: Sequence[Communicator],
    saved: SavedActivations,
) -> RelayRoute:
    """The route, from its counts and the same on the host; waits for nothing and communicates with
    nobody."""
    num_parts, part_tokens = counts.here.shape
    found = iter(numbers)
    rows = [max(0, min(part_tokens, num_tokens - part * part_tokens)) for part in range(num_parts)]
    row_of_token = torch.arange(part_tokens, dtype=torch.int32, device=counts.here.device)
    row_of_token, here = row_of_token.expand_as(counts.here), counts.here
    hops: list[list[Hop]] = []
    tables: list[torch.Tensor] = []
    for group, (outgoing, incoming) in zip(hop_groups, counts.masks, strict=True):
        leaving, arriving = (_by_part(found, num_parts, group.size) for _ in range(2))
        hops.append([Hop(group, *sizes) for sizes in zip(leaving, arriving, rows, strict=True)])
        tables += _hop_tables(row_of_token, here, outgoing, sum(rows), sum(map(sum, leaving)))
        row_of_token, here, rows = _numbered(incoming), incoming, [sum(sizes) for sizes in arriving]
    rows_of_experts = tuple(found)
    experts = _expert_tables(counts, sum(rows_of_experts), sum(rows))
    kept = RouteTables(saved, *tables, *experts)
    parts = tuple(zip(*hops, strict=True))
    return RelayRoute(parts, kept, counts.choices.shape[2], counts.offsets, rows_of_experts)


def _by_part(numbers: Iterator[int], num_parts: int, size: int) -> list[list[int]]:
    """The next num_parts x size numbers."""
    return [list(itertools.islice(numbers, size)) for _ in range(num_parts)]


def _hop_tables(
    row_of_token: torch.Tensor, here: torch.Tensor, outgoing: torch.Tensor, num_rows: int, num_copies: int
) -> tuple[torch.Tensor, ...]:
    """`HopTables` of all parts, without a sort.

    here (parts, ...): which tokens' rows are at this rank, numbered within their part by
    row_of_token. outgoing (parts, peers, ...): which copies leave. num_rows, num_copies: of all
    parts.
    """
    row_C = _selected(row_of_token.unsqueeze(1).expand_as(outgoing), outgoing, num_copies)
    # Copies leave in order of peer and token; for the sums they are wanted in order of token and
    # peer.
    order_C = _selected(_numbered(outgoing).movedim(1, -1), outgoing.movedim(1, -1), num_copies)
    copies = outgoing.sum(1, dtype=torch.int32)
    first = copies.flatten(1).cumsum(1, dtype=torch.int32).view_as(copies) - copies
    return row_C, order_C, _selected(first, here, num_rows)


def _expert_tables(counts: RouteCounts, num_chosen: int, num_arrived: int) -> ExpertTables:
    num_choices = counts.choices.shape[2]
    incoming = counts.masks[-1][1]
    row = incoming.flatten().cumsum(0, dtype=torch.int32).sub_(1).view_as(incoming)
    # (parts, G, N, T / parts) to every rank's tokens (P, T).
    row_PT = row.permute(2, 1, 0, 3).reshape(counts.choices.shape[:2])
    choice_M = choices_by_expert(counts.choices, counts.chosen, num_chosen)
    token_M = torch.div(choice_M, num_choices, rounding_mode="floor")
    row_M = row_PT.flatten().index_select(0, token_M)
    place_M = row_M * num_choices + (choice_M % num_choices).to(torch.int32)
    return ExpertTables(place_M, *sum_order(row_M, num_arrived))


def choices_by_expert(experts: torch.Tensor, chosen: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """The chosen ones of many choices, in order of expert and within one as they stand: flat places
    (M,) int64."""
    where_M = _places(chosen, num_chosen)
    expert_M = experts.flatten().index_select(0, where_M)
    return where_M.index_select(0, torch.sort(expert_M, stable=True).indices)


def hop_masks(owner_PTK: torch.Tensor, ranks_per_node: int, rank: int, num_parts: int) -> list[Masks]:
    """Which copies leave `rank` and which arrive, for the hop between nodes and the hop inside one.

    owner_PTK: the rank of every choice, P where there is none. Each mask's first dimension is the
    part, the second the peer; then come the tokens the copies are of, in the order they travel in:
    N x T / parts between nodes, where N is the peer's node, and G x N x T / parts inside, where G
    is the peer's place on the node and N the node a token comes from.
    """
    num_ranks, tokens, _ = owner_PTK.shape
    nodes = num_ranks // ranks_per_node
    node, place = divmod(rank, ranks_per_node)
    needed = torch.zeros(num_ranks, tokens, num_ranks + 1, dtype=torch.bool, device=owner_PTK.device)
    needed_PTP = needed.scatter_(2, owner_PTK, True)[..., :num_ranks]
    # Token of (source's node, source's place), needed by (node, place).
    needed_NGTNG = needed_PTP.unflatten(2, (nodes, ranks_per_node)).unflatten(0, (nodes, ranks_per_node))
    on_rail_NTNG = needed_NGTNG[:, place]
    crossing_NTN = on_rail_NTNG.any(-1)
    between = crossing_NTN[node].t(), crossing_NTN[:, :, node]
    inside = on_rail_NTNG[:, :, node].permute(2, 0, 1), needed_NGTNG[:, :, :, node, place].transpose(0, 1)
    by_part = [
        [mask.unflatten(-1, (num_parts, -1)).movedim(-2, 0) for mask in hop] for hop in (between, inside)
    ]
    return [(outgoing, incoming) for outgoing, incoming in by_part]


def _numbered(mask: torch.Tensor) -> torch.Tensor:
    """The place of every True among all of its part, int32 like all tables."""
    return mask.flatten(1).cumsum(1, dtype=torch.int32).sub_(1).view(mask.shape)


def _places(mask: torch.Tensor, size: int) -> torch.Tensor:
    """Where the `size` True of a mask are, flat, without a wait for the device."""
    return torch.nonzero_static(mask.flatten(), size=size).squeeze(1)


def _selected(values: torch.Tensor, mask: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` values where the mask is True, in order, without a wait for the device."""
    return values.flatten().index_select(0, _places(mask, size))
