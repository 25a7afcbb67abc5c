"""Who sends which token to whom on the way to the experts: the plan of one exchange of `RelayDispatcher`, from all
choices.

Every rank of an expert-parallel group knows every choice, so each works out its own part of the exchange and no
row needs a header. `count_route` is the part that needs no sizes: it ends in one tensor of counts, which the host
reads. `build_route` is the rest, when the host has them.

Letters: T tokens, K experts per token, L local experts, P ranks of the group, N nodes, G ranks of the group on a
node, M rows at this rank's experts, C copies that leave in a hop, S rows they are copies of.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch

from k2train.model.dispatcher import RouteTables, Tensors
from k2train.model.saved import SavedActivations
from k2train.ops.permute import sum_copies, sum_order
from k2train.parallel.communicator import Communicator
from k2train.parallel.exchange import Moving, pack, start_exchange

Masks = tuple[torch.Tensor, torch.Tensor]
"""Which copies leave in a hop, and which arrive."""


@dataclasses.dataclass(frozen=True)
class HopTables:
    """One hop of one part, int32: the row of each copy (C,), copies in order of their rows (C,), and where each
    row's begin there (S,)."""

    row_of_copy: torch.Tensor
    order: torch.Tensor
    first: torch.Tensor


@dataclasses.dataclass(frozen=True)
class ExpertTables:
    """The rows at this rank's experts, int32.

    row, place (M,): of each expert row its row among those that arrived (part by part), and its place row * K + k
    among their choices. order (M,), first (R,): the expert rows in order of the R rows that arrived.
    """

    row: torch.Tensor
    place: torch.Tensor
    order: torch.Tensor
    first: torch.Tensor


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
        """Rows of a packed message to their copies, where those are needed; into `out` where it is given."""
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

    parts: the hops of every part of its tokens. tables: those of every part and hop, then the experts'.
    num_choices: K. offsets (L,) int32.
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
        *of_hops, row_M, place_M, order_M, first_R = tables
        found = iter(of_hops)
        parts = [[HopTables(next(found), next(found), next(found)) for _ in hops] for hops in self.parts]
        return parts, ExpertTables(row_M, place_M, order_M, first_R)

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

    choices (P, T, K) int64 are every rank's experts, chosen (P, T, K) which of them are here. masks: of every
    part's hops. offsets (L,) int32. numbers: for every part, hop and direction the copies by peer, then the rows
    of each local expert.
    """

    choices: torch.Tensor
    chosen: torch.Tensor
    masks: list[list[Masks]]
    offsets: torch.Tensor
    numbers: torch.Tensor


def count_route(
    choices_PTK: torch.Tensor, num_local: int, rank: int, hop_groups: Sequence[Communicator], num_parts: int
) -> RouteCounts:
    """Count the route of `rank` in the group; waits for nothing and communicates with nobody.

    choices_PTK: every rank's experts, int64. hop_groups: the group of every hop, the last one that of its node.
    """
    owner_PTK = choices_PTK // num_local
    chosen_PTK = owner_PTK == rank
    whole = hop_masks(owner_PTK, hop_groups[-1].size, rank)[-len(hop_groups) :]
    cut = [[mask.tensor_split(num_parts, -1) for mask in hop] for hop in whole]
    masks = [[(outgoing[part], incoming[part]) for outgoing, incoming in cut] for part in range(num_parts)]
    counts = [mask.flatten(1).sum(1) for hops in masks for hop in hops for mask in hop]
    # One place more, for the choices of other ranks' experts.
    local_PTK = torch.where(chosen_PTK, choices_PTK - rank * num_local, num_local).flatten()
    rows_L = choices_PTK.new_zeros(num_local + 1).scatter_add_(0, local_PTK, torch.ones_like(local_PTK))
    rows_L = rows_L[:num_local]
    offsets_L = rows_L.cumsum(0).to(torch.int32)
    return RouteCounts(choices_PTK, chosen_PTK, masks, offsets_L, torch.cat([*counts, rows_L]))


def build_route(
    counts: RouteCounts, numbers: Sequence[int], hop_groups: Sequence[Communicator], saved: SavedActivations
) -> RelayRoute:
    """The route, from its counts and the same on the host; waits for nothing and communicates with nobody."""
    found = iter(numbers)
    hops, tables, rows = zip(*(_hops(hop_groups, masks, found) for masks in counts.masks), strict=True)
    rows_of_experts = tuple(found)
    row_PT = torch.cat(_one_after_the_other(rows, [part[-1].num_arriving for part in hops]), 1)
    experts = _expert_tables(
        counts, row_PT, sum(rows_of_experts), sum(part[-1].num_arriving for part in hops)
    )
    kept = RouteTables(saved, *itertools.chain(*tables), *experts)
    return RelayRoute(hops, kept, counts.choices.shape[2], counts.offsets, rows_of_experts)


def _expert_tables(
    counts: RouteCounts, row_PT: torch.Tensor, num_chosen: int, num_arrived: int
) -> tuple[torch.Tensor, ...]:
    """`ExpertTables`, from the row of every rank's token that arrived here."""
    num_choices = counts.choices.shape[2]
    row_PTK = row_PT.unsqueeze(-1).expand_as(counts.chosen)
    place_PTK = row_PTK * num_choices + torch.arange(num_choices, dtype=torch.int32, device=row_PT.device)
    where_M = _places(counts.chosen, num_chosen)
    expert_M = counts.choices.flatten().index_select(0, where_M)
    by_expert_M = where_M.index_select(0, torch.sort(expert_M, stable=True).indices)
    row_M, place_M = (t.flatten().index_select(0, by_expert_M) for t in (row_PTK, place_PTK))
    return row_M, place_M, *sum_order(row_M, num_arrived)


def _hops(
    groups: Sequence[Communicator], masks: list[Masks], numbers: Iterator[int]
) -> tuple[tuple[Hop, ...], Tensors, torch.Tensor]:
    """The hops of one part, their tables, and the row at this rank of every rank's token (P, T) that comes here."""
    hops: list[Hop] = []
    tables: list[torch.Tensor] = []
    num_rows = masks[0][0].shape[-1]
    row_of_token = torch.arange(num_rows, dtype=torch.int32, device=masks[0][0].device)
    here = torch.ones_like(row_of_token, dtype=torch.bool)
    for group, (outgoing, incoming) in zip(groups, masks, strict=True):
        leaving = list(itertools.islice(numbers, group.size))
        arriving = list(itertools.islice(numbers, group.size))
        tables += _hop_tables(row_of_token, here, outgoing, num_rows, sum(leaving))
        hops.append(Hop(group, leaving, arriving, num_rows))
        row_of_token, here, num_rows = _numbered(incoming), incoming, sum(arriving)
    return tuple(hops), tuple(tables), row_of_token.transpose(0, 1).flatten(0, 1)


def _hop_tables(
    row_of_token: torch.Tensor, here: torch.Tensor, outgoing: torch.Tensor, num_rows: int, num_copies: int
) -> tuple[torch.Tensor, ...]:
    """`HopTables` without a sort. here: which tokens' rows are at this rank, numbered by row_of_token; outgoing has
    one dimension more in front, the peers that copies leave for."""
    row_C = _selected(row_of_token.expand_as(outgoing), outgoing, num_copies)
    # Copies leave in order of peer and token; for the sums they are wanted in order of token and peer.
    order_C = _selected(_numbered(outgoing).movedim(0, -1), outgoing.movedim(0, -1), num_copies)
    copies_S = _selected(outgoing.sum(0, dtype=torch.int32), here, num_rows)
    return row_C, order_C, copies_S.cumsum(0, dtype=torch.int32) - copies_S


def hop_masks(owner_PTK: torch.Tensor, ranks_per_node: int, rank: int) -> list[Masks]:
    """Which copies leave `rank` and which arrive, for the hop between nodes and the hop inside one.

    owner_PTK: the rank of every choice. Each mask's first dimension is the peer; then come the tokens the copies
    are of, in the order they travel in: (N, T) between nodes, where N is the peer's node, and (G, N, T) inside,
    where G is the peer's place on the node and N the node a token comes from.
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


def _one_after_the_other(rows: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Row numbers of each part, counted on from those of the parts before it."""
    first = itertools.accumulate(sizes, initial=0)
    return [row + start for row, start in zip(rows, first, strict=False)]


def _numbered(mask: torch.Tensor) -> torch.Tensor:
    """The place of every True among all of them, int32 like all tables."""
    return mask.flatten().cumsum(0, dtype=torch.int32).sub_(1).view(mask.shape)


def _places(mask: torch.Tensor, size: int) -> torch.Tensor:
    """Where the `size` True of a mask are, flat, without a wait for the device."""
    return torch.nonzero_static(mask.flatten(), size=size).squeeze(1)


def _selected(values: torch.Tensor, mask: torch.Tensor, size: int) -> torch.Tensor:
    """The `size` values where the mask is True, in order, without a wait for the device."""
    return values.flatten().index_select(0, _places(mask, size))
