"""Causal attention that also returns every head's largest logit.

QK-Clip needs max(q.k * scale) per head before the softmax (K2 report, section 2.1). Stock attention keeps it to itself
or hands out all scores, S x S a head. Here it comes from tiles of scores (`attention_tiles`, everywhere), or, for 16-bit
inputs on a GPU, from Triton kernels that put no score into memory at all (`attention_triton`).

Letters: B sequences, H heads, S positions, K query and key features, V value features.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from k2train.ops.attention_tiles import AttentionScratch, tiled_attention
from k2train.ops.kernels import gpu_kernels

_MAX_KERNEL_WIDTH = 256


class Attended(NamedTuple):
    """out (B, S, H, V) in v's type; max_logits (H,), the largest scaled logit of each head, FP32 or FP64.

    log_sums: each row's log2-sum-exp2 (B, H, S), FP32, where a backward by the kernels saves it beside q, k, v and out.
    """

    out: torch.Tensor
    max_logits: torch.Tensor
    log_sums: torch.Tensor | None


def causal_attention(
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSV: torch.Tensor,
    scale: float,
    tile_elements: int | None = None,
    scratch: AttentionScratch | None = None,
) -> Attended:
    """softmax(scale q k^T, causal) v and what goes with it; only the output has a gradient.

    tile_elements: tiles, with so many scores alive at once (32 rows of one head at least); None takes the kernels where they
    can run, else tiles of the device's size. scratch: where tiles' scores are, forward and backward; None: memory of this
    call's own.
    """
    if tile_elements is None:
        kernels = _kernels(q_BHSK, v_BHSV)
        if kernels is not None:
            out_BSHV, max_H, sums_BHS = kernels.fused_attention(q_BHSK, k_BHSK, v_BHSV, scale)
            return Attended(out_BSHV, max_H, sums_BHS if torch.is_grad_enabled() else None)
    return Attended(*tiled_attention(q_BHSK, k_BHSK, v_BHSV, scale, tile_elements, scratch), None)


def _kernels(q_BHSK: torch.Tensor, v_BHSV: torch.Tensor) -> ModuleType | None:
    """The Triton kernels where they take this: types that tensor cores multiply, heads that shared memory holds."""
    widest = max(q_BHSK.shape[-1], v_BHSV.shape[-1])
    if (
        q_BHSK.dtype not in (torch.bfloat16, torch.float16)
        or widest > _MAX_KERNEL_WIDTH
        or not q_BHSK.numel()
    ):
        return None
    return gpu_kernels("attention_triton", q_BHSK.device)


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
