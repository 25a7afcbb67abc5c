"""Moving tokens to rows sorted by expert and back, by index in both directions.

A token's copies are its slots (token, k); a row is one slot after the sort by expert. Both index tables are made once,
so every direction is a gather: no masks, no scatter with duplicates, sums in a fixed order.
Letters: T tokens, K experts per token, N = T x K rows, D features.
"""

from __future__ import annotations

import dataclasses
from typing import Any

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


def gather_rows(x_TD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """Each token's features at its K rows (N, D). Saves the index tables alone."""
    return _GatherRows.apply(x_TD, permutation.token_of_row, permutation.row_of_slot)


def gather_slots(w_TK: torch.Tensor, permutation: Permutation) -> torch.Tensor:
    """The slots' values in row order (N,). Saves the index table alone."""
    return _GatherSlots.apply(w_TK, permutation.slot_of_row, permutation.row_of_slot)


def sum_slots(rows_ND: torch.Tensor, row_of_slot_TK: torch.Tensor) -> torch.Tensor:
    """Every token's K rows added up (T, D); the transpose of gather_rows."""
    # Gather and sum in one pass: the gathered (T, K, D) is never written.
    return F.embedding_bag(row_of_slot_TK, rows_ND, mode="sum")


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, token_of_row_N: torch.Tensor, row_of_slot_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(row_of_slot_TK)
        return x_TD.index_select(0, token_of_row_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (row_of_slot_TK,) = ctx.saved_tensors
        return sum_slots(grads[0], row_of_slot_TK), None, None


class _GatherSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w_TK: torch.Tensor, slot_of_row_N: torch.Tensor, row_of_slot_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(row_of_slot_TK)
        return w_TK.reshape(-1).index_select(0, slot_of_row_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (row_of_slot_TK,) = ctx.saved_tensors
        return grads[0].index_select(0, row_of_slot_TK.reshape(-1)).view(row_of_slot_TK.shape), None, None
