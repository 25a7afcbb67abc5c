"""The first and the last phase: token embedding, and final norm with head and loss.

Letters: B sequences, S tokens of one, T tokens of all, 1 a kept dimension, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F

from k2train.architecture.embedding import embedding_tensors
from k2train.architecture.head import head_tensors
from k2train.config.model import ModelConfig
from k2train.model.context import MicrobatchContext
from k2train.model.phase import ComputePhase, ComputeRecord, Grads, Tensors
from k2train.model.pieces import Allocator, Piece
from k2train.ops.dtypes import accumulation_dtype
from k2train.ops.embedding import EmbeddingWeightGrad
from k2train.ops.norm import inverse_rms, rms_norm
from k2train.ops.weight_grad import WeightGradSlot, add_product


class EmbeddingPhase:
    """Tokens (T,) or (B, S) -> x_TD. A look-up: its backward is written out, and is all weight
    gradient."""

    name = "embedding"
    stream: Literal["compute"] = "compute"

    def __init__(self, model: ModelConfig, allocator: Allocator) -> None:
        (self._piece,) = (allocator.whole(spec) for spec in embedding_tensors(model))
        self.weight = self._piece.parameter

    def pieces(self) -> list[Piece]:
        return [self._piece]

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        return (F.embedding(inputs[0].reshape(-1), self.weight),)

    def forward(self, inputs: Tensors, context: MicrobatchContext) -> tuple[Tensors, torch.Tensor]:
        with torch.no_grad():
            return self.compute(inputs, context, None), inputs[0].reshape(-1)

    def backward(self, record: torch.Tensor, grad_outputs: Grads, context: MicrobatchContext) -> Grads:
        (dx_TD,) = grad_outputs
        assert dx_TD is not None
        context.slot().put(EmbeddingWeightGrad(self.weight, record, dx_TD))
        return (None,)


class HeadPhase(ComputePhase):
    """Final norm, then the context's loss with the head's weight: x_TD -> the microbatch's part of
    the objective, in FP32.

    The loss is the root, so `backward` takes its gradient as 1 whatever it is given. The head's own
    weight gradient goes to the sink during the forward (see ops.cross_entropy).
    """

    def __init__(self, model: ModelConfig, allocator: Allocator) -> None:
        # The loss saves the gradient of the normed input, which nobody else sees.
        super().__init__("head", otherwise="head_gradient")
        self.eps = model.rms_norm_eps
        self._pieces = [allocator.whole(spec) for spec in head_tensors(model)]
        self.norm, self.weight = (piece.parameter for piece in self._pieces)

    def pieces(self) -> list[Piece]:
        return self._pieces

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        assert context.loss is not None, "the head needs the context's loss"
        (x_TD,) = inputs
        rstd_T1 = inverse_rms(x_TD, self.eps)
        context.saved.name("head_input", x_TD, extras=(rstd_T1,))
        hidden_TD = rms_norm(x_TD, rstd_T1, self.norm, slot)
        if slot is None:
            loss = context.loss(hidden_TD, self.weight)
        else:
            assert context.gradients is not None, "the head's weight gradient needs a sink in the forward"
            add = functools.partial(add_product, context.gradients, self.weight)
            loss = context.loss(hidden_TD, self.weight.detach(), add)
        context.statistics.add_loss(loss.detach())
        return (loss,)

    def backward(self, record: ComputeRecord, grad_outputs: Grads, context: MicrobatchContext) -> Grads:
        wide = accumulation_dtype(self.weight.dtype)
        return super().backward(record, (torch.ones((), dtype=wide, device=self.weight.device),), context)

    def logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The logits (T, V), all at once: for generation and tests."""
        return F.linear(rms_norm(x_TD, inverse_rms(x_TD, self.eps), self.norm), self.weight)
