"""Causal attention that also returns every head's largest logit, one tile of scores at a time.

QK-Clip needs max(q.k * scale) per head before the softmax (K2 report, section 2.1). Stock attention keeps it to itself
or hands out all scores, S x S a head. Here a tile is some heads' rows against all keys up to the last row's; its
softmax is complete, so nothing is rescaled between tiles, keys after the tile are never touched, and backward rebuilds
each tile from q and k: only q, k and v are saved. Transformer Engine's fused attention is the fast path on a GPU.

All tiles of a call share their scratch: on a CPU a fresh mebibyte costs more page faults than its arithmetic (measured:
fresh scores for every tile make backward 1.7 times slower). Rows run from the last to the first, so that the first tile
sees every key and starts the sums over rows that the others add to.

Letters: B sequences, H heads, G = B x H, S positions, K query and key features, V value features, R rows of a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from k2train.ops.softmax import consuming_softmax
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


@dataclasses.dataclass(frozen=True)
class _Group:
    """Some heads of some sequences, whose tiles are its rows cut. G is how many (sequence, head)s there are."""

    sequences: slice
    heads: slice

    def of(self, t_BHSF: torch.Tensor) -> torch.Tensor:
        """The group's part (sequences, heads, S, F)."""
        return t_BHSF[self.sequences, self.heads]

    def wide(self, t_BHSF: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The group's part (G, S, F) in the type of the arithmetic; a view where that is the tensor's own."""
        return self.of(t_BHSF).flatten(0, 1).to(dtype)


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How (B, H, S, S) scores are cut: at most so many sequences, heads of each, and rows a tile."""

    batch: int
    num_heads: int
    length: int
    sequences: int
    heads: int
    rows: int

    @property
    def elements(self) -> int:
        """Scores of the largest tile."""
        return self.sequences * self.heads * self.rows * self.length

    def groups(self) -> Iterator[_Group]:
        for sequence in range(0, self.batch, self.sequences):
            sequences = slice(sequence, min(sequence + self.sequences, self.batch))
            for head in range(0, self.num_heads, self.heads):
                yield _Group(sequences, slice(head, min(head + self.heads, self.num_heads)))

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """(first row, rows) of a group's tiles, the last ones first."""
        for start in reversed(range(0, self.length, self.rows)):
            yield start, min(self.rows, self.length - start)


def _tiling(q_BHSK: torch.Tensor, tile_elements: int) -> _Tiling:
    """Whole sequences a tile where their heads fit, else some heads of one."""
    batch, num_heads, length, _ = q_BHSK.shape
    max_rows = _MAX_CPU_ROWS if q_BHSK.device.type == "cpu" else length
    rows = max(min(tile_elements // length, max_rows, length), min(_MIN_ROWS, length))
    heads = max(tile_elements // (rows * length), 1)
    sequences = max(min(heads // num_heads, batch), 1)
    return _Tiling(batch, num_heads, length, sequences, min(heads, num_heads), rows)


def _future_mask(rows: int, wide: torch.dtype, device: torch.device) -> torch.Tensor:
    """Minus infinity above the diagonal (R, R). Added: a masked fill is several times slower."""
    return torch.full((rows, rows), float("-inf"), dtype=wide, device=device).triu_(1)


def _room(scratch: torch.Tensor, groups: int, rows: int, end: int) -> torch.Tensor:
    """(G, R, end) of scratch for a tile's scores."""
    return scratch[: groups * rows * end].view(groups, rows, end)


def _scores(
    q_GRK: torch.Tensor,
    k_GKE: torch.Tensor,
    scale: float,
    future_RR: torch.Tensor,
    scratch: torch.Tensor,
) -> torch.Tensor:
    """Scaled logits of a tile (G, R, E) in `scratch`, minus infinity after each row's own position.

    The keys E end with the tile's last row.
    """
    groups, rows, _ = q_GRK.shape
    end = k_GKE.shape[2]
    scores_GRE = _room(scratch, groups, rows, end).baddbmm_(q_GRK, k_GKE, beta=0, alpha=scale)
    scores_GRE.narrow(2, end - rows, rows).add_(future_RR[:rows, :rows])
    return scores_GRE


def _softmax_gradient(dp_GRE: torch.Tensor, p_GRE: torch.Tensor) -> torch.Tensor:
    """p (dp - sum of p dp) of each row, on a CPU over dp."""
    if dp_GRE.device.type == "cpu":
        return torch._softmax_backward_data(dp_GRE, p_GRE, -1, p_GRE.dtype, grad_input=dp_GRE)
    return torch._softmax_backward_data(dp_GRE, p_GRE, -1, p_GRE.dtype)


def _add_product(total_GSF: torch.Tensor, a_GER: torch.Tensor, b_GRF: torch.Tensor, factor: float) -> None:
    """total[:, :E] (+)= factor a b. The tile that sees every key comes first and sets what the others add to.

    Those see fewer keys, so their part of total has gaps, over which a CPU's product would go matrix by matrix.
    """
    end = a_GER.shape[1]
    if end == total_GSF.shape[1]:
        total_GSF.baddbmm_(a_GER, b_GRF, beta=0, alpha=factor)
    else:
        total_GSF.narrow(1, 0, end).add_(torch.bmm(a_GER, b_GRF), alpha=factor)


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
        out_BSHV = v.new_empty(batch, length, heads, v.shape[-1])
        max_BH = torch.empty(batch, heads, dtype=wide, device=q.device)
        tiling = _tiling(q, tile_elements)
        future_RR = _future_mask(tiling.rows, wide, q.device)
        scratch = q.new_empty(tiling.elements, dtype=wide)
        for group in tiling.groups():
            q_g, k_g, v_g = (group.wide(t, wide) for t in (q, k, v))
            k_g, out_g = k_g.transpose(1, 2), group.of(out_BSHV.transpose(1, 2))
            max_g: list[torch.Tensor] = []
            for start, rows in tiling.row_ranges():
                k_t = k_g.narrow(2, 0, start + rows)
                scores = _scores(q_g.narrow(1, start, rows), k_t, scale, future_RR, scratch)
                max_g.append(scores.flatten(1).amax(1))
                out_t = torch.bmm(consuming_softmax(scores, wide), v_g.narrow(1, 0, start + rows))
                out_g.narrow(2, start, rows).copy_(out_t.view(*out_g.shape[:2], rows, -1))
            group.of(max_BH).copy_(torch.stack(max_g).amax(0).view(out_g.shape[:2]))
        max_H = max_BH.amax(0)
        ctx.mark_non_differentiable(max_H)
        return out_BSHV, max_H

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None, None, None
        q, k, v = ctx.saved_tensors
        wide = accumulation_dtype(q.dtype)
        do_BHSV = grads[0].transpose(1, 2)
        dq, dk, dv = (torch.empty(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
        tiling = _tiling(q, ctx.tile_elements)
        future_RR = _future_mask(tiling.rows, wide, q.device)
        scratch_p, scratch_ds = (q.new_empty(tiling.elements, dtype=wide) for _ in range(2))
        for group in tiling.groups():
            q_g, k_g, v_g, do_g, dq_g, dk_g, dv_g = (
                group.wide(t, wide) for t in (q, k, v, do_BHSV, dq, dk, dv)
            )
            for start, rows in tiling.row_ranges():
                q_t, do_t = q_g.narrow(1, start, rows), do_g.narrow(1, start, rows)
                k_t, v_t = k_g.narrow(1, 0, start + rows), v_g.narrow(1, 0, start + rows)
                scores = _scores(q_t, k_t.transpose(1, 2), ctx.scale, future_RR, scratch_p)
                p = consuming_softmax(scores, wide)
                _add_product(dv_g, p.transpose(1, 2), do_t, 1.0)
                room = _room(scratch_ds, *p.shape)
                ds = _softmax_gradient(torch.bmm(do_t, v_t.transpose(1, 2), out=room), p)
                torch.mul(torch.bmm(ds, k_t), ctx.scale, out=dq_g.narrow(1, start, rows))
                _add_product(dk_g, ds.transpose(1, 2), q_t, ctx.scale)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None
