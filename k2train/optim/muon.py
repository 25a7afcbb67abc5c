"""Muon's update, written to be read beside Algorithm 1 of the Kimi K2 report.

    M <- mu M + G                                     momentum
    O <- NewtonSchulz(M) * sqrt(max(n, m)) * 0.2      orthogonalised, its RMS matched to AdamW's
    W <- W - lr (O + lambda W)                        decoupled weight decay

Everything takes one matrix (n, m) or a batch of equal shapes (k, n, m), which is how a rank's experts share one batched
product. A batch gives what its matrices give one at a time: mostly the same bits, always within rounding (the matrix
library may choose another kernel for another batch size or alignment).

torch.optim.Muon keeps an average instead of a sum, M <- mu M + (1 - mu) G: the same direction times 1 - mu, which the
normalisation before Newton-Schulz removes (up to EPS, for matrices whose norm is below it). So both make the same update
within rounding, but the stored momenta differ by that factor.

Sources: K2 report, section 2.1; Moonlight (arXiv 2502.16982), section 2.2, for 0.2 and Nesterov; Keller Jordan, "Muon:
an optimizer for hidden layers in neural networks" (2024), for the coefficients.
"""

from __future__ import annotations

import dataclasses
import math

import torch

# The quintic a X + b (X X^T) X + c (X X^T)^2 X: steepest at zero, singular values end between about 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


@dataclasses.dataclass(frozen=True)
class MuonRule:
    """The constants of Algorithm 1: mu, lambda, 0.2, and how Newton-Schulz runs."""

    momentum: float = 0.95
    weight_decay: float = 0.1
    update_rms: float = 0.2
    nesterov: bool = True
    newton_schulz_steps: int = 5
    newton_schulz_dtype: torch.dtype = torch.bfloat16


def newton_schulz(
    G: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16, eps: float = EPS
) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to G, approximately: U S' V^T with S' near 1 where G = U S V^T.

    G: (n, m) or (k, n, m); the result has its shape and type `dtype`, in which the `steps` iterations run. A zero matrix
    gives zero. The norm is taken in G's own precision, before the cast, so that tiny gradients lose nothing.
    """
    a, b, c = COEFFICIENTS
    X = (G if G.ndim == 3 else G.unsqueeze(0)).to(torch.promote_types(G.dtype, dtype))
    X = (X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp(min=eps)).to(dtype)
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    if tall:
        X = X.mT
    return X if G.ndim == 3 else X.squeeze(0)


def muon_update(
    W: torch.Tensor, M: torch.Tensor, G: torch.Tensor, lr: float, rule: MuonRule = MuonRule()
) -> None:
    """One step of Algorithm 1 on master weights W and momentum M, both in place. Shapes (n, m) or (k, n, m)."""
    M.mul_(rule.momentum).add_(G)
    direction = G + rule.momentum * M if rule.nesterov else M
    O = newton_schulz(direction, rule.newton_schulz_steps, rule.newton_schulz_dtype)  # noqa: E741
    rms = rule.update_rms * math.sqrt(max(W.shape[-2:]))
    W.mul_(1 - lr * rule.weight_decay).add_(O, alpha=-lr * rms)
