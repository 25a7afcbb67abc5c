"""Causal attention that also returns every head's largest logit.

QK-Clip needs max(q.k * scale) per head before the softmax (K2 report, section 2.1). Stock attention
keeps it to itself or hands out all scores, S x S a head. Which of four ways is taken says the run's
`OpsBackend`:

    tiles    a tile of scores at a time, from stock operations (`attention_tiles`); everywhere, and
             the reference's equal
    triton   kernels that put no score into memory (`attention_triton`); portable, the same bits in
             every run
    cudnn    torch's cuDNN attention, with a kernel of ours beside it for the largest logits
             (`attention_cudnn`)
    te       Transformer Engine's (`te_attention`)

Letters: B sequences, H heads, S positions, K query and key features, V value features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from k2train.config.ops import AttentionKernel
from k2train.ops.attention_cudnn import attention_by_cudnn
from k2train.ops.attention_tiles import AttentionScratch, tiled_attention
from k2train.ops.backend import OpsBackend
from k2train.ops.kernels import gpu_kernels

_STOCK = OpsBackend()


class Attended(NamedTuple):
    """out (B, S, H, V) in v's type; max_logits (H,), each head's largest scaled logit, FP32 or
    FP64.

    max_logits are exact, except that with the cuDNN backend a head whose logits are all at most
    `exact_above` may have an upper bound that is at most `exact_above` too. extras: what a backward
    saves beside q, k, v and out (small: a number a row, FP32).
    """

    out: torch.Tensor
    max_logits: torch.Tensor
    extras: tuple[torch.Tensor, ...]


def causal_attention(
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSV: torch.Tensor,
    scale: float,
    tile_elements: int | None = None,
    scratch: AttentionScratch | None = None,
    backend: OpsBackend = _STOCK,
) -> Attended:
    """softmax(scale q k^T, causal) v and what goes with it; only the output has a gradient.

    With `backend.heads_inside`, positions lie before heads in memory. tile_elements: so many scores
    alive at once (32 rows of one head at least), None for the device's size; scratch: where tiles'
    scores are, forward and backward, None for memory of this call's own. Both are for tiles alone.
    """
    kernel = _taken(backend.attention, q_BHSK)
    if kernel == "tiles":
        out_BSHV, max_H = tiled_attention(q_BHSK, k_BHSK, v_BHSV, scale, tile_elements, scratch)
        return Attended(out_BSHV, max_H, ())
    if kernel == "te":
        assert backend.te is not None
        return Attended(*backend.te(q_BHSK, k_BHSK, v_BHSV))
    if kernel == "cudnn":
        out_BSHV, max_H, sums = attention_by_cudnn(
            q_BHSK, k_BHSK, v_BHSV, scale, backend.exact_above, backend.triton
        )
    else:
        kernels = gpu_kernels("attention_triton", q_BHSK.device)
        assert kernels is not None, "the backend's Triton kernels cannot run here"
        out_BSHV, max_H, sums = kernels.fused_attention(q_BHSK, k_BHSK, v_BHSV, scale)
    return Attended(out_BSHV, max_H, (sums,) if torch.is_grad_enabled() else ())


def _taken(kernel: AttentionKernel, q_BHSK: torch.Tensor) -> AttentionKernel:
    """The backend's kernel, but tiles for the few calls it refuses: no queries at all, and for
    cuDNN one position."""
    if q_BHSK.shape[2] < (2 if kernel == "cudnn" else 1) or not q_BHSK.numel():
        return "tiles"
    return kernel


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
