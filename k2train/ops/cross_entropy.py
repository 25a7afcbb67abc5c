"""Linear layer and cross-entropy in one, a chunk of tokens at a time.

The logits of K2's microbatch (4096 tokens x 163840) take 2.7 GB in FP32 and are needed for an
instant. Here a chunk's logits become its loss and its gradients on the spot and are gone. Doing the
gradients in the forward saves the third product that recomputing logits would cost, about 0.8 MoE
layers' worth a microbatch on K2's last stage.

Letters: T tokens, C tokens of a chunk, 1 a kept dimension, D features, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from k2train.ops.dtypes import accumulation_dtype
from k2train.ops.softmax import consuming_softmax
from k2train.ops.weight_grad import add_product_into

IGNORED_TARGET = -100
"""The target that counts nothing (torch's default ignore_index). Nothing else defines it."""
AddWeightGrad = Callable[[torch.Tensor, torch.Tensor], None]
"""Adds dlogits^T hidden, of dlogits (C, V) and hidden (C, D), to the sums of the weight's
gradient."""


def default_chunk_elements(device: torch.device) -> int:
    """Logits alive at once where nobody says otherwise.

    Every chunk reads and writes the FP32 gradient sum of the whole weight (9.4 GB for K2). So a
    device with memory to spare takes 2**28, which is what the plan assumes. On a CPU the logits of
    2**25 are 128 MB, and weights are small.
    """
    return 2**28 if device.type == "cuda" else 2**25


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    scale: float = 1.0,
    add_weight_grad: AddWeightGrad | None = None,
    chunk_elements: int | None = None,
    token_weights_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """scale * sum over tokens of w * -log softmax(hidden W^T)[target], a scalar in FP32 (FP64 for
    float64).

    token_weights_T: w of every token, of any sign and size, in the type of the result. None takes
    1 for all of them. It gets no gradient.
    A target of IGNORED_TARGET counts nothing. Any other target that is no row of the weight raises
    IndexError on a CPU and ends the process on a GPU, as in torch's cross_entropy.
    add_weight_grad: takes the factors of the weight's gradient of the returned value during the
    forward, a chunk at a time. The weight must then want none from autograd, and the returned value
    must be the graph's root.
    chunk_elements: bounds the logits alive at once (one token's at least). By default
    `default_chunk_elements`.
    """
    chunk_elements = chunk_elements or default_chunk_elements(hidden_TD.device)
    if not torch.is_grad_enabled():
        # Inside the function a parameter still asks for its gradient, as large as the weight.
        hidden_TD, weight_VD = hidden_TD.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, targets_T, token_weights_T, scale, add_weight_grad, chunk_elements
    )


def _chunk_loss(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, targets_C1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log softmax at the targets (C, 1) and the softmax (C, V).

    The log-sum-exp comes from the largest probability, which is at least 1/V: no second pass of
    exponentials, and no logarithm of a probability that underflowed.
    """
    logits_CV = F.linear(hidden_CD, weight_VD)
    wide = accumulation_dtype(logits_CV.dtype)
    top_C1 = logits_CV.amax(1, keepdim=True).to(wide)
    at_target_C1 = logits_CV.gather(1, targets_C1).to(wide)
    probs_CV = consuming_softmax(logits_CV, wide)
    return top_C1 - at_target_C1 - probs_CV.amax(1, keepdim=True).log_(), probs_CV


def _add_chunk(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_C1: torch.Tensor,
    token_weights_C1: torch.Tensor | None,
    scale: float,
    dhidden_CD: torch.Tensor | None,
    add_weight_grad: AddWeightGrad | None,
) -> torch.Tensor:
    """One chunk's loss, not scaled yet; its scaled gradients are written and added on the spot.

    A function of its own, so that its logits are gone before the next chunk's are there.
    """
    ignored_C1 = targets_C1 == IGNORED_TARGET
    targets_C1 = targets_C1.masked_fill(ignored_C1, 0)
    losses_C1, probs_CV = _chunk_loss(hidden_CD, weight_VD, targets_C1)
    factor_C1 = (~ignored_C1).to(losses_C1.dtype)
    if token_weights_C1 is not None:
        factor_C1.mul_(token_weights_C1)
    loss = (losses_C1 * factor_C1).sum()
    if dhidden_CD is None and add_weight_grad is None:
        return loss
    factor_C1.mul_(scale)
    dlogits_CV = probs_CV.mul_(factor_C1).scatter_add_(1, targets_C1, -factor_C1).to(hidden_CD.dtype)
    if dhidden_CD is not None:
        torch.mm(dlogits_CV, weight_VD, out=dhidden_CD)
    if add_weight_grad is not None:
        add_weight_grad(dlogits_CV, hidden_CD)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves the gradient of hidden, and of the weight where nobody else takes it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_T: torch.Tensor,
        token_weights_T: torch.Tensor | None,
        scale: float,
        add_weight_grad: AddWeightGrad | None,
        chunk_elements: int,
    ) -> torch.Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dweight_VD = None
        if needs_weight and add_weight_grad is None:
            dweight_VD = torch.zeros_like(weight_VD, dtype=accumulation_dtype(weight_VD.dtype))
            add_weight_grad = functools.partial(add_product_into, dweight_VD)
        dhidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        loss = hidden_TD.new_zeros((), dtype=accumulation_dtype(hidden_TD.dtype))
        rows = max(chunk_elements // weight_VD.shape[0], 1)
        for start in range(0, hidden_TD.shape[0], rows):
            chunk = slice(start, start + rows)
            loss += _add_chunk(
                hidden_TD[chunk],
                weight_VD,
                targets_T[chunk].unsqueeze(1),
                None if token_weights_T is None else token_weights_T[chunk].unsqueeze(1),
                scale,
                None if dhidden_TD is None else dhidden_TD[chunk],
                add_weight_grad,
            )
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dhidden_TD, dweight_VD = ctx.saved_tensors
        (grad,) = grads
        dhidden = None if dhidden_TD is None else dhidden_TD * grad.to(dhidden_TD.dtype)
        dweight = None if dweight_VD is None else (dweight_VD * grad).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None, None
