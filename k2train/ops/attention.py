"""Causal attention that also returns every head's largest logit, one tile of scores at a time.

QK-Clip needs max(q.k * scale) per head before the softmax (K2 report, section 2.1). Stock attention keeps it to itself
or hands out all scores, S x S a head. Here a tile is some heads' rows against all keys up to the last row's; its
softmax is complete, so nothing is rescaled between tiles, keys after the tile are never touched, and backward rebuilds
each tile from q and k: only q, k and v are saved. Transformer Engine's fused attention is the fast path on a GPU.

Letters: B sequences, H heads, G = B x H, S positions, K query and key features, V value features, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from k2train.ops.weight_grad import accumulation_dtype

# A tile of 2 MiB in FP32 stays in a core's cache; a GPU wants larger products.
CPU_TILE_ELEMENTS = 2**19
CUDA_TILE_ELEMENTS = 2**26
_MIN_ROWS = 16
_MAX_CPU_ROWS = 128


def causal_attention(
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSV: torch.Tensor,
    scale: float,
    tile_elements: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T, causal) v as (B, S, H, V), and the largest scaled logit of each head (H,), FP32 or FP64.

    tile_elements bounds the scores alive at once (16 rows of one head at least). The maximum has no gradient.
    """
    if tile_elements is None:
        tile_elements = CUDA_TILE_ELEMENTS if q_BHSK.is_cuda else CPU_TILE_ELEMENTS
    return _CausalAttention.apply(q_BHSK, k_BHSK, v_BHSV, scale, tile_elements)


def causal_attention_reference(
    q_BHSK: torch.Tensor, k_BHSK: torch.Tensor, v_BHSV: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with all scores at once, for tests."""
    length = q_BHSK.shape[2]
    scores_BHSS = torch.matmul(q_BHSK, k_BHSK.transpose(2, 3)) * scale
    future_SS = torch.ones(length, length, dtype=torch.bool, device=q_BHSK.device).triu_(1)
    scores_BHSS = scores_BHSS.masked_fill(future_SS, float("-inf"))
    out_BHSV = torch.matmul(scores_BHSS.softmax(-1), v_BHSV)
    return out_BHSV.transpose(1, 2), scores_BHSS.detach().amax((0, 2, 3))


def _tiles(groups: int, length: int, tile_elements: int, max_rows: int) -> Iterator[tuple[slice, int, int]]:
    """(heads, first row, row after the last) of every tile."""
    rows = max(min(tile_elements // length, max_rows, length), min(_MIN_ROWS, length), 1)
    heads = max(tile_elements // (rows * length), 1)
    for first in range(0, groups, heads):
        for start in range(0, length, rows):
            yield slice(first, min(first + heads, groups)), start, min(start + rows, length)


def _max_rows(device: torch.device, length: int) -> int:
    return _MAX_CPU_ROWS if device.type == "cpu" else length


def _scores(q_GRK: torch.Tensor, k_GSK: torch.Tensor, scale: float, start: int) -> torch.Tensor:
    """Scaled logits of a tile whose first row is `start`, minus infinity after each row's own position."""
    scores_GRS = torch.baddbmm(q_GRK.new_empty(()), q_GRK, k_GSK.transpose(1, 2), beta=0, alpha=scale)
    rows = q_GRK.shape[1]
    future_RR = torch.ones(rows, rows, dtype=torch.bool, device=q_GRK.device).triu_(1)
    scores_GRS[:, :, start:].masked_fill_(future_RR, float("-inf"))
    return scores_GRS


class _CausalAttention(torch.autograd.Function):
    """Saves q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, tile_elements: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.tile_elements = scale, tile_elements
        batch, heads, length, _ = q.shape
        wide = accumulation_dtype(q.dtype)
        q_GSK, k_GSK, v_GSV = (t.flatten(0, 1) for t in (q, k, v))
        out_BSHV = q.new_empty(batch, length, heads, v.shape[-1])
        out_GSV = out_BSHV.transpose(1, 2)
        out_tile = q.new_empty(q_GSK.shape[0], length, v.shape[-1])
        max_G = torch.full((batch * heads,), float("-inf"), dtype=wide, device=q.device)
        max_rows = _max_rows(q.device, length)
        for group, start, end in _tiles(batch * heads, length, tile_elements, max_rows):
            scores = _scores(q_GSK[group, start:end].to(wide), k_GSK[group, :end].to(wide), scale, start)
            torch.maximum(max_G[group], scores.flatten(1).amax(1), out=max_G[group])
            scores = torch.softmax(scores, -1)
            out_tile[group, start:end] = torch.bmm(scores, v_GSV[group, :end].to(wide))
        out_GSV.copy_(out_tile.unflatten(0, (batch, heads)))
        max_H = max_G.view(batch, heads).amax(0)
        ctx.mark_non_differentiable(max_H)
        ctx.set_materialize_grads(False)
        return out_BSHV, max_H

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None, None, None
        q, k, v = ctx.saved_tensors
        batch, heads, length, _ = q.shape
        wide = accumulation_dtype(q.dtype)
        q_GSK, k_GSK, v_GSV = (t.flatten(0, 1) for t in (q, k, v))
        do_GSV = grads[0].transpose(1, 2).flatten(0, 1)
        dq_GSK = torch.empty_like(q_GSK)
        dk_GSK = torch.zeros_like(k_GSK, dtype=wide)
        dv_GSV = torch.zeros_like(v_GSV, dtype=wide)
        max_rows = _max_rows(q.device, length)
        for group, start, end in _tiles(batch * heads, length, ctx.tile_elements, max_rows):
            q_t, do_t = q_GSK[group, start:end].to(wide), do_GSV[group, start:end].to(wide)
            k_t, v_t = k_GSK[group, :end].to(wide), v_GSV[group, :end].to(wide)
            p = torch.softmax(_scores(q_t, k_t, ctx.scale, start), -1)
            dv_GSV[group, :end].baddbmm_(p.transpose(1, 2), do_t)
            dp = torch.bmm(do_t, v_t.transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, wide)
            del dp, p
            dq_GSK[group, start:end] = torch.baddbmm(q_t, ds, k_t, beta=0, alpha=ctx.scale)
            dk_GSK[group, :end].baddbmm_(ds.transpose(1, 2), q_t, alpha=ctx.scale)
        dq, dk, dv = (
            t.unflatten(0, (batch, heads)) for t in (dq_GSK, dk_GSK.to(k.dtype), dv_GSV.to(v.dtype))
        )
        return dq, dk, dv, None, None
