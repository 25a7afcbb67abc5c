"""What the head computes of a microbatch: the loss. A protocol of its one consumer,
`ends.HeadPhase`.

A loss is made for one microbatch and holds all that the head does not know: targets, weights, the
normaliser. It is called once, with whole sequences, and both hands back its value and sees to the
gradients. So an objective need not be a sum over tokens. One that is a function J of the
log-probabilities of whole responses takes two passes over the head: the log-probabilities without
gradients, then a `linear_cross_entropy` with the token weights -dJ/dlog p, whose gradient is J's. A
mixture adds the token weights of its parts before that second pass.

Letters: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from k2train.ops.cross_entropy import AddWeightGrad, linear_cross_entropy


class Loss(Protocol):
    """One microbatch's part of the objective, as the head phase calls it."""

    def __call__(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        add_weight_grad: AddWeightGrad | None = None,
    ) -> torch.Tensor:
        """The part, a scalar in FP32 (FP64 for float64), divided by the global batch's normaliser.

        hidden_TD: the normed outputs of the last layer, sequence after sequence. weight_VD: the
        head. Autograd must find hidden_TD's gradient from the result. The weight's gradient goes to
        add_weight_grad during this call; None leaves it, too, to autograd, which may be switched
        off.
        """
        ...


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Implements Loss: scale * the sum over tokens of weight * -log p(target).

    targets: ids, int64, of any shape with T entries. ops.cross_entropy.IGNORED_TARGET counts 0.
    weights: in the shape of the targets, of any sign and size, in FP32 (FP64 for float64); None is
        1 for every token and costs nothing.
    """

    targets: torch.Tensor
    scale: float = 1.0
    weights: torch.Tensor | None = None

    def __call__(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        add_weight_grad: AddWeightGrad | None = None,
    ) -> torch.Tensor:
        weights_T = None if self.weights is None else self.weights.reshape(-1)
        targets_T = self.targets.reshape(-1)
        return linear_cross_entropy(
            hidden_TD, weight_VD, targets_T, self.scale, add_weight_grad, token_weights_T=weights_T
        )
