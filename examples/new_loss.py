"""A loss of one's own, as the head phase of the model calls it.

    python examples/new_loss.py

The focal loss, sum over tokens of -(1 - p)^2 log p, is a function of the log-probabilities of the
targets. Such a loss J takes two passes over the head: the log-probabilities without gradients, then
the fused cross-entropy with the token weights -dJ/dlog p, which makes the logits' gradients a chunk
at a time.

Letters: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch

from k2train.model.loss import Loss
from k2train.ops.cross_entropy import AddWeightGrad, linear_cross_entropy


def focal(log_p_T: torch.Tensor) -> torch.Tensor:
    """Sum of -(1 - p)^2 log p, a scalar."""
    return -((1 - log_p_T.exp()) ** 2 * log_p_T).sum()


@dataclasses.dataclass(frozen=True)
class FocalLoss:
    """Implements Loss. targets: ids (T,), int64. scale: one over the batch's normaliser."""

    targets: torch.Tensor
    scale: float = 1.0

    def __call__(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        add_weight_grad: AddWeightGrad | None = None,
    ) -> torch.Tensor:
        with torch.no_grad():  # A chunk at a time in earnest; all logits at once in this example.
            log_probs_TV = (hidden_TD @ weight_VD.T).log_softmax(-1)
            log_p_T = log_probs_TV.gather(1, self.targets[:, None]).squeeze(1)
        leaf_T = log_p_T.detach().requires_grad_()
        value = focal(leaf_T)
        (slope_T,) = torch.autograd.grad(value, leaf_T)
        surrogate = linear_cross_entropy(
            hidden_TD, weight_VD, self.targets, self.scale, add_weight_grad, token_weights_T=-slope_T
        )
        # The surrogate has J's gradient; its value is replaced by J's.
        return surrogate + (self.scale * value - surrogate).detach()


def main() -> None:
    """Hold the gradients against autograd's, in float64."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(6, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    weight_VD = torch.randn(11, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    targets_T = torch.randint(0, 11, (6,), generator=generator)
    loss: Loss = FocalLoss(targets_T, scale=0.5)
    value = loss(hidden_TD, weight_VD)
    plain = 0.5 * focal((hidden_TD @ weight_VD.T).log_softmax(-1)[torch.arange(6), targets_T])
    ours = torch.autograd.grad(value, (hidden_TD, weight_VD))
    theirs = torch.autograd.grad(plain, (hidden_TD, weight_VD))
    # Some thirty sums and products of numbers around 1, each rounded to 2^-53.
    for mine, reference in zip((value, *ours), (plain, *theirs), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-13)
    print(f"focal loss {value.item():.6f}: value and gradients are autograd's")


if __name__ == "__main__":
    main()
