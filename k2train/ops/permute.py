"""Moving tokens to rows sorted by expert and back, by index in both directions.

A token's copies are its slots (token, k); a row is one slot after the sort by expert. Every direction is a gather: no
masks, no scatter with duplicates, sums in a fixed order.
Letters: T tokens, K experts per token, N = T x K rows, D features.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Permutation:
    """Where every slot went: slot_of_row (N,), the flat slot t * K + k of each row; row_of_slot (T, K), its inverse;
    token_of_row (N,)."""

    slot_of_row: torch.Tensor
    row_of_slot: torch.Tensor
    token_of_row: torch.Tensor


def sort_slots(experts_TK: torch.Tensor) -> Permutation:
    """The stable order of slots by expert, so that equal routing gives equal rows on every layout."""
    flat_N = experts_TK.reshape(-1)
    slot_of_row_N = torch.sort(flat_N, stable=True).indices
    rows_N = torch.arange(flat_N.numel(), device=flat_N.device)
    row_of_slot_N = torch.empty_like(slot_of_row_N).scatter_(0, slot_of_row_N, rows_N)
    token_of_row_N = torch.div(slot_of_row_N, experts_TK.shape[1], rounding_mode="floor")
    return Permutation(slot_of_row_N, row_of_slot_N.view(experts_TK.shape), token_of_row_N)


def sum_slots(rows_ND: torch.Tensor, row_of_slot_TK: torch.Tensor) -> torch.Tensor:
    """Every token's K rows added up (T, D); the transpose of copying each token to its rows."""
    # Gather and sum in one pass: the gathered (T, K, D) is never written.
    return F.embedding_bag(row_of_slot_TK, rows_ND, mode="sum")


def sum_copies(copies_ND: torch.Tensor, source_of_copy_N: torch.Tensor, num_sources: int) -> torch.Tensor:
    """The sum of each source's copies (S, D), any number of them, in the order they stand in; zero where there is none.

    The transpose of `sources.index_select(0, source_of_copy_N)`.
    """
    if not copies_ND.shape[0]:
        return copies_ND.new_zeros(num_sources, copies_ND.shape[1])
    sorted_N, order_N = torch.sort(source_of_copy_N, stable=True)
    sources_S = torch.arange(num_sources, dtype=sorted_N.dtype, device=sorted_N.device)
    first_S = torch.searchsorted(sorted_N, sources_S)
    return F.embedding_bag(order_N, copies_ND, first_S, mode="sum")
