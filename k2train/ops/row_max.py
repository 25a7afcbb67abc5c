"""The largest logit of each head, beside an attention whose own kernel returns the rows'
log-sum-exp alone (cuDNN's).

With Triton the log-sum-exp says which blocks need no product (`row_max_triton`). With stock
operations nothing on the device can decide to leave a product out, so every logit is computed, some
rows at a time.

Letters: B sequences, H heads, G = B x H, S positions, R rows, K query and key features, E keys up
to the last of the rows.
"""

from __future__ import annotations

import torch

from k2train.ops.dtypes import accumulation_dtype, cast

# 512 MiB of FP32 scores at once.
_TILE_ELEMENTS = 2**27


def stock_largest_logits(q_BHSK: torch.Tensor, k_BHSK: torch.Tensor, scale: float) -> torch.Tensor:
    """Each head's largest scaled causal logit over the batch (H,), exact, FP32 (FP64 for
    float64)."""
    batch, heads, length, _ = q_BHSK.shape
    q_GSK, k_GKS = q_BHSK.flatten(0, 1), k_BHSK.flatten(0, 1).transpose(1, 2)
    rows = max(_TILE_ELEMENTS // (batch * heads * length), 1)
    maxima_G = [_largest(q_GSK, k_GKS, start, min(start + rows, length)) for start in range(0, length, rows)]
    return torch.stack(maxima_G).amax(0).view(batch, heads).amax(0) * scale


def _largest(q_GSK: torch.Tensor, k_GKS: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """The largest unscaled logit of rows `start` to `end` of each head (G,)."""
    scores_GRE = _wide_product(q_GSK[:, start:end], k_GKS[:, :, :end])
    future_RR = torch.ones(end - start, end - start, dtype=torch.bool, device=q_GSK.device).triu_(1)
    scores_GRE[:, :, start:].masked_fill_(future_RR, float("-inf"))
    return scores_GRE.amax((1, 2))


def _wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in the accumulation type. On a GPU 16-bit inputs stay as they are: their product with
    FP32 sums is the same."""
    wide = accumulation_dtype(a.dtype)
    if a.is_cuda and a.dtype != wide:
        return torch.bmm(a, b, out_dtype=wide)
    return torch.bmm(cast(a, wide), cast(b, wide))
