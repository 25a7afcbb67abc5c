"""The model's head as data: final norm, logits and the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from k2train.architecture.tensors import TensorSpec
from k2train.architecture.work import Op, Workload, accumulation_bytes, norm, product
from k2train.config.model import ModelConfig

FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def head_tensors(model: ModelConfig) -> Iterator[TensorSpec]:
    """What comes after the last layer."""
    yield TensorSpec(FINAL_NORM, (model.hidden_size,), "norm")
    yield TensorSpec(HEAD, (model.vocab_size, model.hidden_size), "head")


def head_ops(w: Workload, num_chunks: int = 1, num_owners: int = 1) -> tuple[Op, Op, Op]:
    """Final norm, logits, and the loss: largest logit, softmax in the type of sums, its largest,
    scaled, and cast back.

    num_chunks: times the head's weight is read, and its gradient sum updated. num_owners: ranks
    that the weight's rows are cut among; the gradient of each one's rows is a product of its own.
    """
    tokens, hidden, vocab = w.tokens, w.model.hidden_size, w.model.vocab_size
    logits = product(w, "lm_head", tokens, hidden, vocab, "head_input")
    again = (num_chunks - 1) * w.element_bytes * logits.weight_elements
    logits = dataclasses.replace(
        logits,
        bytes=logits.bytes + again,
        weight_elements=num_chunks * logits.weight_elements,
        weight_kernels=num_chunks * num_owners,
    )
    bytes_of_logit = 3.0 * w.element_bytes + 5.0 * accumulation_bytes(w.dtype)
    loss = Op("loss", "elementwise", bytes_of_logit * tokens * vocab)
    return norm(w, "final_norm", hidden), logits, loss


def head_flops(model: ModelConfig) -> float:
    """Forward FLOPs of the output projection for a token."""
    return 2.0 * model.hidden_size * model.vocab_size
