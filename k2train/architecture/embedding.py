"""The token embedding as data: a look-up, whose gradient is a sum of the rows of equal tokens."""

from __future__ import annotations

from collections.abc import Iterator

from k2train.architecture.tensors import TensorSpec
from k2train.architecture.work import Op, Workload, accumulation_bytes, elementwise
from k2train.config.model import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_COLUMNS = 1024
"""Columns of the embedding's gradient that are summed at a time."""


def embedding_tensors(model: ModelConfig) -> Iterator[TensorSpec]:
    """What comes before the first layer."""
    yield TensorSpec(EMBEDDING, (model.vocab_size, model.hidden_size), "embedding")


def embedding_ops(w: Workload) -> list[Op]:
    """The look-up."""
    return [elementwise(w, "embedding", 2 * w.tokens * w.model.hidden_size)]


def embedding_grad_bytes(w: Workload) -> float:
    """The gradient into the sums of its rows, in bytes moved.

    A cast (read, written in the type of the sums), the sums of equal tokens (read, written), their
    addition (read; the weight's sums read and written).
    """
    return w.tokens * w.model.hidden_size * (w.element_bytes + 6.0 * accumulation_bytes(w.dtype))


def embedding_grad_kernels(w: Workload) -> int:
    """A cast, a sum and an addition for some columns at a time; a sort, two searches and a choice
    before them."""
    return 3 * -(-w.model.hidden_size // EMBEDDING_COLUMNS) + 4
