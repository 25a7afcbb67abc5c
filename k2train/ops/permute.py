"""Moving tokens to rows sorted by expert and back, by index in both directions.

A token's copies are its slots (token, k); a row is one slot after the sort by expert. Every
direction is a gather: no masks, no scatter with duplicates, sums in a fixed order. What order sums
take is worked out once and given to every sum as a table. Letters: T tokens, K experts per token, N
= T x K rows or copies, S sources of copies, D features.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Permutation:
    """Where every slot went, int32.

    slot_of_row (N,): the flat slot t * K + k of each row. row_of_slot (T, K): its inverse.
    token_of_row (N,).
    """

    slot_of_row: torch.Tensor
    row_of_slot: torch.Tensor
    token_of_row: torch.Tensor


def sort_slots(experts_TK: torch.Tensor) -> Permutation:
    """The stable order of slots by expert, so that equal routing gives equal rows on every
    layout."""
    slot_of_row_N = torch.sort(experts_TK.reshape(-1), stable=True).indices.to(torch.int32)
    row_of_slot_N = inverse(slot_of_row_N)
    token_of_row_N = torch.div(slot_of_row_N, experts_TK.shape[1], rounding_mode="floor")
    return Permutation(slot_of_row_N, row_of_slot_N.view(experts_TK.shape), token_of_row_N)


def inverse(permutation_N: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes another, in the same integer type."""
    places_N = torch.arange(permutation_N.numel(), dtype=permutation_N.dtype, device=permutation_N.device)
    return torch.empty_like(permutation_N).scatter_(0, permutation_N.long(), places_N)


def sum_slots(rows_ND: torch.Tensor, row_of_slot_TK: torch.Tensor) -> torch.Tensor:
    """Every token's K rows added up (T, D); the transpose of copying each token to its rows."""
    # Gather and sum in one pass: the gathered (T, K, D) is never written.
    return F.embedding_bag(row_of_slot_TK, rows_ND, mode="sum")


def sum_order(source_of_copy_N: torch.Tensor, num_sources: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables `sum_copies` needs, int32, by one stable sort: the copies in order of their
    sources (N,), and where each source's begin (S,)."""
    sorted_N, order_N = torch.sort(source_of_copy_N, stable=True)
    sources_S = torch.arange(num_sources, dtype=sorted_N.dtype, device=sorted_N.device)
    return order_N.to(torch.int32), torch.searchsorted(sorted_N, sources_S, out_int32=True)


def sum_copies(copies_ND: torch.Tensor, order_N: torch.Tensor, first_S: torch.Tensor) -> torch.Tensor:
    """The sum of each source's copies (S, D), any number of them; zero where there is none.

    order_N, first_S: `sum_order`'s. A source's copies are added in the order they stand in. The
    transpose of copying every source: no atomic additions, so it is the same at every run.
    """
    if not copies_ND.shape[0]:
        return copies_ND.new_zeros(first_S.shape[0], copies_ND.shape[1])
    return F.embedding_bag(order_N, copies_ND, first_S, mode="sum")
