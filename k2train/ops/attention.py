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

# A tile of 1 MiB in FP32 stays in a core's cache, and 64 rows waste little above the diagonal (measured: at 256 positions
# 16 heads x 64 rows beat both smaller and larger tiles). A GPU wants larger products.
CPU_TILE_ELEMENTS = 2**18
CUDA_TILE_ELEMENTS = 2**26
_MIN_ROWS = 32
_MAX_CPU_ROWS = 64


def causal_attention(
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSV: torch.Tensor,
    scale: float,
    tile_elements: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T, causal) v as (B, S, H, V), and the largest scaled logit of each head (H,), FP32 or FP64.

    tile_elements bounds the scores alive at once (32 rows of one head at least). The maximum has no gradient.
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


def _tiles(
    groups: int, length: int, tile_elements: int, device: torch.device
) -> Iterator[tuple[slice, int, int]]:
    """(heads, first row, row after the last) of every tile."""
    rows = _num_rows(length, tile_elements, _max_rows(device, length))
    heads = max(tile_elements // (rows * length), 1)
    for first in range(0, groups, heads):
        for start in range(0, length, rows):
            yield slice(first, min(first + heads, groups)), start, min(start + rows, length)


def _num_rows(length: int, tile_elements: int, max_rows: int) -> int:
    return max(min(tile_elements // length, max_rows, length), min(_MIN_ROWS, length))


def _max_rows(device: torch.device, length: int) -> int:
    return _MAX_CPU_ROWS if device.type == "cpu" else length


def _future_mask(length: int, wide: torch.dtype, like: torch.Tensor, tile_elements: int) -> torch.Tensor:
    """Minus infinity above the diagonal (R, R), for the largest tile. Added: a masked fill is several times slower."""
    rows = _num_rows(length, tile_elements, _max_rows(like.device, length))
    return torch.full((rows, rows), float("-inf"), dtype=wide, device=like.device).triu_(1)


def _scores(
    scaled_q_GRK: torch.Tensor, k_GSK: torch.Tensor, start: int, future_RR: torch.Tensor
) -> torch.Tensor:
    """Logits of a tile whose first row is `start`, minus infinity after each row's own position.

    The scale comes with the queries: a tile of them is smaller than its scores.
    """
    scores_GRS = torch.bmm(scaled_q_GRK, k_GSK.transpose(1, 2))
    rows = scaled_q_GRK.shape[1]
    scores_GRS[:, :, start:].add_(future_RR[:rows, :rows])
    return scores_GRS


class _CausalAttention(torch.autograd.Function):
    """Saves q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, tile_elements: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(q, k, v)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.tile_elements = scale, tile_elements
        batch, heads, length, _ = q.shape
        wide = accumulation_dtype(q.dtype)
        q_GSK, k_GSK, v_GSV = (t.flatten(0, 1) for t in (q, k, v))
        out_GSV = torch.empty_like(v_GSV)
        max_G = torch.full((batch * heads,), float("-inf"), dtype=wide, device=q.device)
        future_RR = _future_mask(length, wide, q, tile_elements)
        for group, start, end in _tiles(batch * heads, length, tile_elements, q.device):
            k_t, v_t = k_GSK[group, :end].to(wide), v_GSV[group, :end].to(wide)
            scores = _scores(q_GSK[group, start:end].to(wide) * scale, k_t, start, future_RR)
            torch.maximum(max_G[group], scores.flatten(1).amax(1), out=max_G[group])
            out_GSV[group, start:end] = torch.bmm(torch.softmax(scores, -1), v_t)
        max_H = max_G.view(batch, heads).amax(0)
        ctx.mark_non_differentiable(max_H)
        return out_GSV.unflatten(0, (batch, heads)).transpose(1, 2).contiguous(), max_H

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
        future_RR = _future_mask(length, wide, q, ctx.tile_elements)
        for group, start, end in _tiles(batch * heads, length, ctx.tile_elements, q.device):
            q_t = q_GSK[group, start:end].to(wide) * ctx.scale
            do_t = do_GSV[group, start:end].to(wide)
            k_t, v_t = k_GSK[group, :end].to(wide), v_GSV[group, :end].to(wide)
            scores = _scores(q_t, k_t, start, future_RR)
            p = torch.softmax(scores, -1)
            dv_GSV[group, :end].baddbmm_(p.transpose(1, 2), do_t)
            dp = torch.bmm(do_t, v_t.transpose(1, 2), out=scores)
            ds = torch._softmax_backward_data(dp, p, -1, wide)
            torch.mul(torch.bmm(ds, k_t), ctx.scale, out=dq_GSK[group, start:end])
            dk_GSK[group, :end].baddbmm_(ds.transpose(1, 2), q_t)
        dq, dk, dv = (
            t.unflatten(0, (batch, heads)) for t in (dq_GSK, dk_GSK.to(k.dtype), dv_GSV.to(v.dtype))
        )
        return dq, dk, dv, None, None
