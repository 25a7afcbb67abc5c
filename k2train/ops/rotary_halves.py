"""Rotary embedding of halves, and heads copied for the query heads that share them.

Feature i is turned with feature i + P, and the first 2P features are the rotated ones, as in
transformers' Llama and GLM models; `rotary` turns neighbours instead. Both are linear, so autograd
saves nothing but the tables, which are constants of the model.

Letters: B sequences, S positions, G heads as they come, C copies of each, H = G x C heads as they
go, F features of a head, P pairs of rotated features.
"""

from __future__ import annotations

from typing import Any

import torch

from k2train.ops.rotary import RotaryTables


def rotary_halves(
    x_BSGF: torch.Tensor, tables: RotaryTables, copies: int = 1, heads_inside: bool = False
) -> torch.Tensor:
    """Queries or keys with their first 2P features turned, each head `copies` times in a row.

    Contiguous: (B, H, S, F), or (B, S, H, F) with heads_inside. Tables of S positions, in x's type.
    """
    return _CopiedHeads.apply(x_BSGF, tables, copies, heads_inside)


def copied_heads(x_BSGF: torch.Tensor, copies: int, heads_inside: bool = False) -> torch.Tensor:
    """The same for values, which are not turned."""
    return _CopiedHeads.apply(x_BSGF, None, copies, heads_inside)


def _turned(x_BSGF: torch.Tensor, tables: RotaryTables, back: bool = False) -> torch.Tensor:
    """x with its halves turned (back) by the tables."""
    pairs = tables.cos.shape[1]
    cos_S1P, sin_S1P = tables.cos.unsqueeze(1), tables.sin.unsqueeze(1)
    first, second = x_BSGF[..., :pairs], x_BSGF[..., pairs : 2 * pairs]
    out_BSGF = x_BSGF.clone(memory_format=torch.contiguous_format)
    sign = -1 if back else 1
    torch.mul(first, cos_S1P, out=out_BSGF[..., :pairs]).addcmul_(second, sin_S1P, value=-sign)
    torch.mul(second, cos_S1P, out=out_BSGF[..., pairs : 2 * pairs]).addcmul_(first, sin_S1P, value=sign)
    return out_BSGF


class _CopiedHeads(torch.autograd.Function):
    """Turn where there are tables, then copy. Backward adds up the copies and turns back."""

    @staticmethod
    def forward(
        ctx: Any, x_BSGF: torch.Tensor, tables: RotaryTables | None, copies: int, heads_inside: bool
    ) -> torch.Tensor:
        ctx.tables, ctx.copies, ctx.heads_inside = tables, copies, heads_inside
        turned_BSGF = x_BSGF if tables is None else _turned(x_BSGF, tables)
        copied_BSGCF = turned_BSGF.unsqueeze(3).expand(-1, -1, -1, copies, -1)
        if heads_inside:
            return copied_BSGCF.clone(memory_format=torch.contiguous_format).flatten(2, 3)
        copied_BGCSF = copied_BSGCF.permute(0, 2, 3, 1, 4)
        return copied_BGCSF.clone(memory_format=torch.contiguous_format).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_BSHF = grads[0] if ctx.heads_inside else grads[0].transpose(1, 2)
        dx_BSGF = grad_BSHF.unflatten(2, (-1, ctx.copies)).sum(3)
        return dx_BSGF if ctx.tables is None else _turned(dx_BSGF, ctx.tables, back=True), None, None, None
