"""Muon's update, written to be read beside Algorithm 1 of the Kimi K2 report.

    M <- mu M + G                                     momentum
    O <- NewtonSchulz(M) * sqrt(max(n, m)) * 0.2      orthogonalised, its RMS matched to AdamW's
    W <- W - lr (O + lambda W)                        decoupled weight decay

Everything takes one matrix (n, m) or a batch of equal shapes (k, n, m), which is how a rank's
experts share one batched product. A batch gives what its matrices give one at a time: mostly the
same bits, always within rounding (the matrix library may choose another kernel for another batch
size or alignment).

torch.optim.Muon keeps an average instead of a sum, M <- mu M + (1 - mu) G: the same direction times
1 - mu, which the normalisation before Newton-Schulz removes (up to EPS, for matrices whose norm is
below it). So both make the same update within rounding, but the stored momenta differ by that
factor.

Sources: K2 report, section 2.1; Moonlight (arXiv 2502.16982), section 2.2, for 0.2 and Nesterov;
Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024), for the
coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from k2train.config.errors import ConfigError
from k2train.config.optim import NewtonSchulzDtype, OptimConfig
from k2train.update_rules.rule import NamedRules, Rules
from k2train.update_rules.rules.adamw import adamw

if TYPE_CHECKING:
    import torch

# The quintic a X + b (X X^T) X + c (X X^T)^2 X: steepest at zero, singular values end between about
# 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


@dataclass(frozen=True)
class Muon:
    """The constants of Algorithm 1: mu, lambda, 0.2, and how Newton-Schulz runs."""

    name: ClassVar[str] = "muon"
    label: ClassVar[str] = "Muon"
    states: ClassVar[tuple[str, ...]] = ("momentum",)
    whole_matrices: ClassVar[bool] = True

    momentum: float = 0.95
    weight_decay: float = 0.1
    update_rms: float = 0.2
    nesterov: bool = True
    newton_schulz_steps: int = 5
    newton_schulz_dtype: NewtonSchulzDtype = "bfloat16"

    def matmul_flops(self, shape: Sequence[int]) -> float:
        return newton_schulz_cost(shape, self.newton_schulz_steps)

    def update(
        self,
        W: torch.Tensor,
        states: Sequence[torch.Tensor],
        G: torch.Tensor,
        lr: float,
        decayed: bool,
        num_updates: int,
    ) -> None:
        """One step of Algorithm 1, in place. Shapes (n, m) or (k, n, m)."""
        (M,) = states
        M.mul_(self.momentum).add_(G)
        direction = G + self.momentum * M if self.nesterov else M
        O = newton_schulz(  # noqa: E741
            direction, self.newton_schulz_steps, self.newton_schulz_dtype
        )
        rms = self.update_rms * math.sqrt(max(W.shape[-2:]))
        decay = self.weight_decay if decayed else 0.0
        W.mul_(1 - lr * decay).add_(O, alpha=-lr * rms)


def newton_schulz(
    G: torch.Tensor, steps: int = 5, dtype: NewtonSchulzDtype = "bfloat16", eps: float = EPS
) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to G, approximately.

    That is U S' V^T with S' near 1 where G = U S V^T. G: (n, m) or (k, n, m); the result has its
    shape and type `dtype`, in which the `steps` iterations run. A zero matrix gives zero. The norm
    is taken in G's own precision, before the cast, so that tiny gradients lose nothing.
    """
    import torch

    a, b, c = COEFFICIENTS
    compute: torch.dtype = getattr(torch, dtype)
    X = (G if G.ndim == 3 else G.unsqueeze(0)).to(torch.promote_types(G.dtype, compute))
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    X = (X / norm.clamp(min=eps)).to(compute)
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


def newton_schulz_cost(shape: Sequence[int], steps: int) -> int:
    """FLOPs of `steps` iterations of X <- a X + (b XXᵀ + c (XXᵀ)²) X on a matrix.

    The matrix is turned so that it is wide. With n rows and m >= n columns an iteration is XXᵀ (2 n
    n m), its square (2 n n n) and the product with X (2 n n m). Raises ConfigError for anything but
    a matrix.
    """
    if len(shape) != 2:
        raise ConfigError("shape", tuple(shape), "Newton-Schulz needs a matrix")
    short, long = sorted(shape)
    return steps * (4 * short * short * long + 2 * short**3)


def rules(optim: OptimConfig) -> Rules:
    """MuonClip without its clip: Muon for matrices, AdamW for the rest.

    The clip is QK-Clip, in optim/qk_clip.py.
    """
    muon = Muon(
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        update_rms=optim.update_rms,
        nesterov=optim.nesterov,
        newton_schulz_steps=optim.newton_schulz_steps,
        newton_schulz_dtype=optim.newton_schulz_dtype,
    )
    return Rules(matrices=muon, others=adamw(optim))


OPTIMIZER = NamedRules("muonclip", rules)
