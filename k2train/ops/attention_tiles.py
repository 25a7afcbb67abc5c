"""Causal attention from stock operations, one tile of scores at a time.

A tile is some heads' rows against all keys up to the last row's; its softmax is complete, so
nothing is rescaled between tiles, keys after the tile are never touched, and backward rebuilds each
tile from q and k: only q, k and v are saved.

All tiles of a call share their scratch, and on a CPU all calls of a model do: a fresh mebibyte
costs more page faults than its arithmetic (measured: fresh scores for every tile make backward 1.7
times slower). Rows run from the last to the first, so that the first tile sees every key and starts
the sums over rows that the others add to.

Letters: B sequences, H heads, G = B x H, S positions, K query and key features, V value features, R
rows of a tile, E keys up to the end of a tile, F features of any kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from k2train.ops.dtypes import accumulation_dtype, cast
from k2train.ops.softmax import consuming_softmax

# 2 MiB in FP32 stay in two cores' caches, and 64 rows waste little above the diagonal (measured in
# the model on two cores, at 128 to 1024 positions: 96 rows with 1.5 MiB are 0 to 4 % slower, 64
# rows with that as well). A GPU wants larger products.
CPU_TILE_ELEMENTS = 2**19
CUDA_TILE_ELEMENTS = 2**26
_MIN_ROWS = 32
_MAX_CPU_ROWS = 64


def tiled_attention(
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSV: torch.Tensor,
    scale: float,
    tile_elements: int | None,
    scratch: AttentionScratch | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, S, H, V) and largest logits (H,), as `attention.causal_attention` says; the output
    alone has a gradient."""
    if tile_elements is None:
        tile_elements = CUDA_TILE_ELEMENTS if q_BHSK.is_cuda else CPU_TILE_ELEMENTS
    return _TiledAttention.apply(q_BHSK, k_BHSK, v_BHSV, scale, tile_elements, scratch or AttentionScratch())


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How (B, H, S, S) scores are cut: into groups of heads, and the rows of each group into tiles.

    heads: how many of the B x H a group has at most; a multiple of H or a divisor of it. rows: of a
    tile, at most.
    """

    num_heads: int
    length: int
    heads: int
    rows: int

    @property
    def elements(self) -> int:
        """Scores of the largest tile."""
        return self.heads * self.rows * self.length

    def groups(self, t_BHSF: torch.Tensor) -> Sequence[torch.Tensor]:
        """Each group's part of a tensor (sequences, heads, S, F), as views."""
        if self.heads >= self.num_heads:
            return t_BHSF.split(self.heads // self.num_heads)
        return [group for sequence in t_BHSF.split(1) for group in sequence.split(self.heads, 1)]

    def row_ranges(self) -> list[tuple[int, int]]:
        """(first row, row after the last) of a group's tiles, the last ones first."""
        starts = reversed(range(0, self.length, self.rows))
        return [(start, min(start + self.rows, self.length)) for start in starts]


def _tiling(q_BHSK: torch.Tensor, tile_elements: int) -> _Tiling:
    """Whole sequences a group where their heads fit, else some heads of one."""
    batch, num_heads, length, _ = q_BHSK.shape
    max_rows = _MAX_CPU_ROWS if q_BHSK.device.type == "cpu" else length
    rows = max(min(tile_elements // length, max_rows, length), min(_MIN_ROWS, length))
    heads = max(tile_elements // (rows * length), 1)
    if heads < num_heads:
        heads = next(divisor for divisor in range(heads, 0, -1) if num_heads % divisor == 0)
    else:
        heads = min(heads // num_heads, batch) * num_heads
    return _Tiling(num_heads, length, heads, rows)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Rows `start` to `end` of a group against the keys up to `end`, and its views of the scratch
    all tiles share.

    scores, gradients: (G, R, E), the second in backward alone. diagonal: the scores of the last R
    keys, where the future begins. future: (R, R), minus infinity above the diagonal, to be added: a
    masked fill is several times slower.
    """

    start: int
    end: int
    scores: torch.Tensor
    gradients: torch.Tensor | None
    diagonal: torch.Tensor
    future: torch.Tensor

    def rows_of(self, t: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The tile's rows of a group's tensor whose positions are `dim`."""
        return t.narrow(dim, self.start, self.end - self.start)


class _Room:
    """The memory of a tiling's tiles. Their views are made once for all groups: one costs as much
    as a small product."""

    def __init__(self, tiling: _Tiling, like: torch.Tensor, dtype: torch.dtype, gradients: bool) -> None:
        self._tiling = tiling
        self._memory = [like.new_empty(tiling.elements, dtype=dtype) for _ in range(1 + gradients)]
        size = (tiling.rows, tiling.rows)
        self._future_RR = torch.full(size, float("-inf"), dtype=dtype, device=like.device).triu_(1)
        self._tiles: dict[int, list[_Tile]] = {}

    def serves(self, tiling: _Tiling, dtype: torch.dtype) -> bool:
        return self._tiling == tiling and self._future_RR.dtype == dtype

    def tiles(self, heads: int) -> list[_Tile]:
        """The tiles of a group of so many heads; all groups but the last have as many."""
        if heads not in self._tiles:
            ranges = self._tiling.row_ranges()
            self._tiles[heads] = [self._tile(heads, start, end) for start, end in ranges]
        return self._tiles[heads]

    def _tile(self, heads: int, start: int, end: int) -> _Tile:
        rows = end - start
        rooms = [memory[: heads * rows * end].view(heads, rows, end) for memory in self._memory]
        diagonal_GRR = rooms[0].narrow(2, start, rows)
        gradients = rooms[1] if len(rooms) > 1 else None
        return _Tile(start, end, rooms[0], gradients, diagonal_GRR, self._future_RR[:rows, :rows])


class AttentionScratch:
    """The memory of the tiles of calls that come one after the other: kept on a CPU, until a call
    needs another size (4 MiB at the default size of a tile); fresh for each call on a GPU, whose
    allocator keeps it and has use for it meanwhile."""

    def __init__(self) -> None:
        self._kept: _Room | None = None

    def room(self, tiling: _Tiling, like: torch.Tensor, dtype: torch.dtype, backward: bool) -> _Room:
        """The tiles' memory for a call on tensors like `like`."""
        if like.device.type != "cpu":
            return _Room(tiling, like, dtype, gradients=backward)
        if self._kept is None or not self._kept.serves(tiling, dtype):
            self._kept = _Room(tiling, like, dtype, gradients=True)
        return self._kept


def _wide(group_BHSF: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A group's part as (G, S, F) in the type of the arithmetic; a view where that is the tensor's
    own."""
    return cast(group_BHSF.flatten(0, 1), dtype)


def _scores(tile: _Tile, q_GRK: torch.Tensor, k_GKS: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled logits of a tile (G, R, E) in its scratch, minus infinity after each row's own
    position."""
    scores_GRE = tile.scores.baddbmm_(q_GRK, k_GKS.narrow(2, 0, tile.end), beta=0, alpha=scale)
    tile.diagonal.add_(tile.future)
    return scores_GRE


def _softmax_gradient(dp_GRE: torch.Tensor, p_GRE: torch.Tensor) -> torch.Tensor:
    """p (dp - sum of p dp) of each row, on a CPU over dp."""
    if dp_GRE.device.type == "cpu":
        return torch._softmax_backward_data(dp_GRE, p_GRE, -1, p_GRE.dtype, grad_input=dp_GRE)
    return torch._softmax_backward_data(dp_GRE, p_GRE, -1, p_GRE.dtype)


def _add_product(total_GSF: torch.Tensor, a_GER: torch.Tensor, b_GRF: torch.Tensor, factor: float) -> None:
    """total[:, :E] (+)= factor a b. The tile that sees every key comes first and sets what the
    others add to.

    Those see fewer keys, so their part of total has gaps, over which a CPU's product would go
    matrix by matrix.
    """
    end = a_GER.shape[1]
    if end == total_GSF.shape[1]:
        total_GSF.baddbmm_(a_GER, b_GRF, beta=0, alpha=factor)
    else:
        total_GSF.narrow(1, 0, end).add_(torch.bmm(a_GER, b_GRF), alpha=factor)


class _TiledAttention(torch.autograd.Function):
    """Saves q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        tile_elements: int,
        scratch: AttentionScratch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(q, k, v)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.tile_elements, ctx.scratch = scale, tile_elements, scratch
        batch, heads, length, _ = q.shape
        wide = accumulation_dtype(q.dtype)
        out_BSHV = v.new_empty(batch, length, heads, v.shape[-1])
        tiling = _tiling(q, tile_elements)
        room = scratch.room(tiling, q, wide, backward=False)
        maxima: list[torch.Tensor] = []
        for *inputs, out_g in zip(*map(tiling.groups, (q, k, v, out_BSHV.transpose(1, 2))), strict=True):
            q_g, k_g, v_g = (_wide(t, wide) for t in inputs)
            maxima.append(_attend(scale, room, q_g, k_g, v_g, out_g))
        max_H = torch.cat(maxima).view(batch, heads).amax(0)
        ctx.mark_non_differentiable(max_H)
        return out_BSHV, max_H

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None, None, None, None
        q, k, v = ctx.saved_tensors
        wide = accumulation_dtype(q.dtype)
        dq, dk, dv = (torch.empty(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
        tiling = _tiling(q, ctx.tile_elements)
        room = ctx.scratch.room(tiling, q, wide, backward=True)
        for group in zip(*map(tiling.groups, (q, k, v, grads[0].transpose(1, 2), dq, dk, dv)), strict=True):
            _attend_backward(ctx.scale, room, *(_wide(t, wide) for t in group))
        return cast(dq, q.dtype), cast(dk, k.dtype), cast(dv, v.dtype), None, None, None


def _attend(
    scale: float,
    room: _Room,
    q_GSK: torch.Tensor,
    k_GSK: torch.Tensor,
    v_GSV: torch.Tensor,
    out_BHSV: torch.Tensor,
) -> torch.Tensor:
    """Write a group's output and return its heads' largest logits (G,)."""
    k_GKS = k_GSK.transpose(1, 2)
    maxima = []
    for tile in room.tiles(q_GSK.shape[0]):
        scores_GRE = _scores(tile, tile.rows_of(q_GSK), k_GKS, scale)
        maxima.append(scores_GRE.amax((1, 2)))
        out_GRV = torch.bmm(consuming_softmax(scores_GRE), v_GSV.narrow(1, 0, tile.end))
        out_BHRV = tile.rows_of(out_BHSV, 2)
        out_BHRV.copy_(out_GRV.view(out_BHRV.shape))
    return torch.stack(maxima).amax(0)


def _attend_backward(
    scale: float,
    room: _Room,
    q_GSK: torch.Tensor,
    k_GSK: torch.Tensor,
    v_GSV: torch.Tensor,
    do_GSV: torch.Tensor,
    dq_GSK: torch.Tensor,
    dk_GSK: torch.Tensor,
    dv_GSV: torch.Tensor,
) -> None:
    """Write the gradients of a group's inputs."""
    k_GKS, v_GVS = k_GSK.transpose(1, 2), v_GSV.transpose(1, 2)
    for tile in room.tiles(q_GSK.shape[0]):
        q_GRK, do_GRV = tile.rows_of(q_GSK), tile.rows_of(do_GSV)
        p_GRE = consuming_softmax(_scores(tile, q_GRK, k_GKS, scale))
        _add_product(dv_GSV, p_GRE.transpose(1, 2), do_GRV, 1.0)
        assert tile.gradients is not None
        dp_GRE = torch.bmm(do_GRV, v_GVS.narrow(2, 0, tile.end), out=tile.gradients)
        ds_GRE = _softmax_gradient(dp_GRE, p_GRE)
        torch.mul(torch.bmm(ds_GRE, k_GSK.narrow(1, 0, tile.end)), scale, out=tile.rows_of(dq_GSK))
        _add_product(dk_GSK, ds_GRE.transpose(1, 2), q_GRK, scale)
