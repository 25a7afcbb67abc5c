"""QK-Clip: after an update, shrink the query and key weights of every head whose logits grew past
tau.

With S_h the largest pre-softmax logit of head h over the step's batch and gamma_h = tau / S_h where
S_h > tau (else 1):

    W_qc, W_kc <- sqrt(gamma_h) W    the head's unrotated query and key rows
    W_qr       <- gamma_h W          its rotated query rows
    W_kr                             the rotated key, shared by all heads, stays as it is

so that both terms of q . k shrink by gamma_h and nothing but head h changes. Source: Kimi K2
report, section 2.1.

Which rows of which projection these are, the mixer says (`Mixer.clipped`): the unrotated ones take
the root of gamma, those whose other factor is shared by heads take the whole.

Suffixes: H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k2train.architecture.heads import ClipRows


def qk_clip_scale(max_logit_H: torch.Tensor, tau: float) -> torch.Tensor:
    """gamma_H: tau / max_logit where a head's largest logit exceeds tau, exactly 1 elsewhere.

    Zero, negative and -inf logits (a head that saw no token) give 1. So do +inf and NaN, which no
    scale repairs: they come with a non-finite loss or gradient, which stops the step before any
    weight changes.
    """
    over_H = (max_logit_H > tau) & torch.isfinite(max_logit_H)
    safe_H = torch.where(over_H, max_logit_H, torch.full_like(max_logit_H, tau))
    return torch.where(over_H, tau / safe_H, torch.ones_like(max_logit_H))


def clip_rows(weight: torch.Tensor, gamma_H: torch.Tensor, rows: Sequence[ClipRows]) -> None:
    """Scale the rows of every head by their share of its gamma, in place.

    weight: (H * rows of a head, input). A head whose gamma is 1 keeps its bits: multiplying by
    exactly 1 changes none.
    """
    heads = weight.view(len(gamma_H), sum(part.rows for part in rows), -1)
    gamma = gamma_H.to(weight.dtype).view(-1, 1, 1)
    factors = {"root": gamma.sqrt(), "whole": gamma}
    first = 0
    for part in rows:
        if part.share != "none":
            heads[:, first : first + part.rows].mul_(factors[part.share])
        first += part.rows
