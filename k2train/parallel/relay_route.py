"""Who sends which token to whom on the way to the experts: the plan of one exchange of `RelayDispatcher`, from all choices.

Every rank of an expert-parallel group knows every choice, so each works out its own part of the exchange and no row needs a
header. All sizes come to the host with one wait for the device.

Letters: T tokens, K experts per token, L local experts, P ranks of the group, N nodes, G ranks of the group on a node,
M rows at this rank's experts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch

from k2train.model.dispatcher import RouteTables, Tensors
from k2train.model.saved import SavedActivations
from k2train.ops.permute import sum_copies
from k2train.parallel.communicator import Communicator
from k2train.parallel.exchange import Moving, start_exchange

Masks = tuple[torch.Tensor, torch.Tensor]
"""Which copies leave in a hop, and which arrive."""


@dataclasses.dataclass(frozen=True)
class Hop:
    """One all-to-all of copies. leaving[p], arriving[p]: copies to and from rank p of the group; num_rows: rows before it."""

    group: Communicator
    leaving: list[int]
    arriving: list[int]
    num_rows: int

    @property
    def num_arriving(self) -> int:
        return sum(self.arriving)

    def go(self, rows: Tensors, row_of_copy: torch.Tensor, outs: Tensors | None = None) -> Moving:
        """Rows to their copies, where those are needed; into outs where they are given."""
        copies = tuple(t.index_select(0, row_of_copy) for t in rows)
        return start_exchange(self.group, copies, self.leaving, self.arriving, outs=outs)

    def back(self, copies: Tensors, row_of_copy: torch.Tensor) -> Moving:
        """The transpose: copies to the sums of each row's."""

        def add_up(returned: torch.Tensor) -> torch.Tensor:
            return sum_copies(returned, row_of_copy, self.num_rows)

        then = (add_up,) * len(copies)
        return start_exchange(self.group, copies, self.arriving, self.leaving, then)


@dataclasses.dataclass(frozen=True)
class RelayRoute:
    """One layer's exchange of one microbatch.

    parts: the hops of every part of its tokens. tables: for every part and hop the row of each copy; then for each of this
    rank's M expert rows its row among those that arrived (part by part), and its place row * K + k among their choices.
    num_choices: K. offsets (L,) int32.
    """

    parts: tuple[tuple[Hop, ...], ...]
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


def build_route(
    choices_PTK: torch.Tensor,
    num_local: int,
    rank: int,
    hop_groups: Sequence[Communicator],
    num_parts: int,
    saved: SavedActivations,
) -> RelayRoute:
    """The route of `rank` in the group. choices_PTK: every rank's experts, int64. hop_groups: the group of every hop, the last
    one that of its node. Waits for the device; communicates with nobody."""
    owner_PTK = choices_PTK // num_local
    chosen_PTK = owner_PTK == rank
    parts = [
        hop_masks(part_PTK, hop_groups[-1].size, rank)[-len(hop_groups) :]
        for part_PTK in owner_PTK.tensor_split(num_parts, 1)
    ]
    counts = [mask.flatten(1).sum(1) for masks in parts for hop in masks for mask in hop]
    *splits, (num_chosen,) = _to_host([*counts, chosen_PTK.sum().view(1)])
    sizes = iter(splits)
    hops, tables, rows = zip(*(_hops(hop_groups, masks, sizes) for masks in parts), strict=True)
    row_PT = torch.cat(_one_after_the_other(rows, [part[-1].num_arriving for part in hops]), 1)

    num_choices = choices_PTK.shape[2]
    row_PTK = row_PT.unsqueeze(-1).expand_as(chosen_PTK)
    place_PTK = row_PTK * num_choices + torch.arange(num_choices, dtype=torch.int32, device=row_PT.device)
    expert, row, place = (
        _selected(values, chosen_PTK, num_chosen) for values in (choices_PTK, row_PTK, place_PTK)
    )
    sorted_M, order_M = torch.sort(expert - rank * num_local, stable=True)
    next_L = torch.arange(1, num_local + 1, device=sorted_M.device)
    offsets_L = torch.searchsorted(sorted_M, next_L, out_int32=True)
    by_expert = row.index_select(0, order_M), place.index_select(0, order_M)
    kept = RouteTables(saved, *itertools.chain(*tables), *by_expert)
    return RelayRoute(hops, kept, num_choices, offsets_L)


def _hops(
    groups: Sequence[Communicator], masks: list[Masks], sizes: Iterator[list[int]]
) -> tuple[tuple[Hop, ...], Tensors, torch.Tensor]:
    """The hops of one part, their tables, and the row at this rank of every rank's token (P, T) that comes here."""
    hops, tables = [], []
    num_rows = masks[0][0].shape[-1]
    row_of_token = torch.arange(num_rows, dtype=torch.int32, device=masks[0][0].device)
    for group, (outgoing, incoming) in zip(groups, masks, strict=True):
        leaving, arriving = next(sizes), next(sizes)
        tables.append(_selected(row_of_token.expand_as(outgoing), outgoing, sum(leaving)))
        hops.append(Hop(group, leaving, arriving, num_rows))
        row_of_token, num_rows = _numbered(incoming), sum(arriving)
    return tuple(hops), tuple(tables), row_of_token.transpose(0, 1).flatten(0, 1)


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
