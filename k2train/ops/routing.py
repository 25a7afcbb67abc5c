"""Differentiable parts of routing with closed backward passes, and a loss that rides along a
tensor.

Letters: T tokens, K experts per token, E experts, B sequences, S tokens of one, 1 a kept dimension.
"""

from __future__ import annotations

from typing import Any

import torch

_TINY = 1e-20  # transformers' guard of the normalisation


def chosen_weights(
    scores_TE: torch.Tensor, experts_TK: torch.Tensor, normalise: bool, factor: float
) -> torch.Tensor:
    """The chosen experts' scores (T, K), normalised to sum 1 if asked, times `factor`.

    Saves all scores, which the sigmoid saves too.
    """
    return _ChosenWeights.apply(scores_TE, experts_TK, normalise, factor)


class _ChosenWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores_TE: torch.Tensor, experts_TK: torch.Tensor, normalise: bool, factor: float
    ) -> torch.Tensor:
        chosen_TK = scores_TE.gather(1, experts_TK)
        ctx.save_for_backward(scores_TE, experts_TK)
        ctx.normalise, ctx.factor = normalise, factor
        if not normalise:
            return chosen_TK * factor
        return chosen_TK / (chosen_TK.sum(1, keepdim=True) + _TINY) * factor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        scores_TE, experts_TK = ctx.saved_tensors
        chosen_TK = scores_TE.gather(1, experts_TK)
        dchosen_TK = grads[0] * ctx.factor
        if ctx.normalise:
            total_T1 = chosen_TK.sum(1, keepdim=True) + _TINY
            mean_T1 = (dchosen_TK * chosen_TK).sum(1, keepdim=True) / total_T1
            dchosen_TK = (dchosen_TK - mean_T1) / total_T1
        return torch.zeros_like(scores_TE).scatter_(1, experts_TK, dchosen_TK), None, None, None


def sequence_balance_loss(scores_TE: torch.Tensor, counts_BE: torch.Tensor, top_k: int) -> torch.Tensor:
    """DeepSeek-V3's sequence-wise balance loss without its factor alpha, averaged over the
    sequences: a scalar.

    Sum over experts of f_i P_i, where f_i = E / (K S) * (tokens of the sequence that have i among
    the K largest of their scores) and P_i is the mean over the sequence of the scores normalised to
    sum 1 (arXiv 2412.19437, equations 17 to 20). 1 is perfect balance.
    counts_BE: those tokens, of every sequence and expert, int64; it has no gradient.
    """
    return _SequenceBalanceLoss.apply(scores_TE, counts_BE, top_k)


def _fractions(counts_BE: torch.Tensor, top_k: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """f_i of every sequence, divided by what the two means divide by: the factor of each normalised
    score (B, E)."""
    sequences, experts = counts_BE.shape
    length = tokens // sequences
    return counts_BE.to(dtype) * (experts / (top_k * length) / (length * sequences))


class _SequenceBalanceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_TE: torch.Tensor, counts_BE: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(scores_TE, counts_BE)
        ctx.top_k = top_k
        share_TE = scores_TE / (scores_TE.sum(1, keepdim=True) + _TINY)
        share_BE = share_TE.unflatten(0, (counts_BE.shape[0], -1)).sum(1)
        factor_BE = _fractions(counts_BE, top_k, scores_TE.shape[0], scores_TE.dtype)
        return (share_BE * factor_BE).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        scores_TE, counts_BE = ctx.saved_tensors
        tokens, experts = scores_TE.shape
        factor_BE = _fractions(counts_BE, ctx.top_k, tokens, scores_TE.dtype) * grads[0]
        factor_B1E = factor_BE.unsqueeze(1)
        scores_BSE = scores_TE.unflatten(0, (counts_BE.shape[0], -1))
        total_BS1 = scores_BSE.sum(-1, keepdim=True) + _TINY
        mean_BS1 = (scores_BSE * factor_B1E).sum(-1, keepdim=True) / total_BS1
        return ((factor_B1E - mean_BS1) / total_BS1).view(tokens, experts), None, None


def attach_loss(x: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
    """x unchanged; its backward also sends the gradient `scale` into `loss`, which need not reach
    the graph's root."""
    return _AttachLoss.apply(x, loss, scale)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale, ctx.like = scale, (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dtype, device = ctx.like
        return grads[0], torch.full((), ctx.scale, dtype=dtype, device=device), None
