"""QK-Clip: after an update, shrink the query and key weights of every head whose logits grew past tau.

With S_h the largest pre-softmax logit of head h over the step's batch and gamma_h = tau / S_h where S_h > tau (else 1):

    W_qc, W_kc <- sqrt(gamma_h) W    the head's unrotated query and key rows
    W_qr       <- gamma_h W          its rotated query rows
    W_kr                             the rotated key, shared by all heads, stays as it is

so that both terms of q . k shrink by gamma_h and nothing but head h changes. Source: Kimi K2 report, section 2.1.

Rows of the two projections, head after head (as in transformers' DeepseekV3): q_b_proj, or q_proj without a query
latent, [nope | rope]; kv_b_proj [nope | value]. W_kr is the tail of kv_a_proj_with_mqa, which nothing here touches.

Suffixes: H heads.
"""

from __future__ import annotations

import dataclasses

import torch

from k2train.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class HeadRows:
    """How many rows a head has in the query and in the key-value up-projection."""

    num_heads: int
    nope: int
    rope: int
    value: int


def head_rows(model: ModelConfig) -> HeadRows:
    """The row layout of a model's attention."""
    return HeadRows(
        model.num_attention_heads, model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    )


def qk_clip_scale(max_logit_H: torch.Tensor, tau: float) -> torch.Tensor:
    """gamma_H: tau / max_logit where a head's largest logit exceeds tau, exactly 1 elsewhere.

    Zero, negative and -inf logits (a head that saw no token) give 1. So do +inf and NaN, which no scale repairs: they
    come with a non-finite loss or gradient, which stops the step before any weight changes.
    """
    over_H = (max_logit_H > tau) & torch.isfinite(max_logit_H)
    safe_H = torch.where(over_H, max_logit_H, torch.full_like(max_logit_H, tau))
    return torch.where(over_H, tau / safe_H, torch.ones_like(max_logit_H))


def clip_query_rows(weight: torch.Tensor, gamma_H: torch.Tensor, rows: HeadRows) -> None:
    """Scale W_qc by sqrt(gamma) and W_qr by gamma, in place. weight: (H * (nope + rope), input).

    A head whose gamma is 1 keeps its bits: multiplying by exactly 1 changes none.
    """
    heads = weight.view(rows.num_heads, rows.nope + rows.rope, -1)
    gamma = gamma_H.to(weight.dtype).view(-1, 1, 1)
    heads[:, : rows.nope].mul_(gamma.sqrt())
    heads[:, rows.nope :].mul_(gamma)


def clip_key_rows(weight: torch.Tensor, gamma_H: torch.Tensor, rows: HeadRows) -> None:
    """Scale W_kc by sqrt(gamma) and leave the value rows, in place. weight: (H * (nope + value), kv_lora_rank)."""
    heads = weight.view(rows.num_heads, rows.nope + rows.value, -1)
    heads[:, : rows.nope].mul_(gamma_H.to(weight.dtype).sqrt().view(-1, 1, 1))
