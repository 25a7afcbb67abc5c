"""How much the embedding, each layer and the head weigh in a pipeline: forward FLOPs for a token.

Only the ratio counts, so this leaves out what is alike or small: elementwise work, communication, recomputation. The
estimate of seconds, which has all of it, lies above this room. K2's head weighs about 2.2 of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable

from k2train.config.model import ModelConfig
from k2train.layout.tensors import TensorSpec, layer_tensors


def attention_flops(model: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs of the scores and of their product with the values, for a token of a causal sequence.

    A token sees (seq_len + 1) / 2 positions on average, its own among them.
    """
    width = model.qk_head_dim + model.v_head_dim
    return (seq_len + 1) * model.num_attention_heads * width


def layer_flops(model: ModelConfig, layer: int, seq_len: int) -> float:
    """Forward FLOPs of one layer for a token."""
    share = model.num_experts_per_tok / model.n_routed_experts
    return _matrix_flops(layer_tensors(model, layer), share) + attention_flops(model, seq_len)


def head_flops(model: ModelConfig) -> float:
    """Forward FLOPs of the output projection for a token."""
    return 2.0 * model.hidden_size * model.vocab_size


def piece_weights(model: ModelConfig, seq_len: int) -> tuple[float, tuple[float, ...], float]:
    """(embedding, every layer, head). The embedding is a look-up and weighs nothing."""
    dense, moe = model.first_k_dense_replace, model.num_moe_layers
    layers: list[float] = []
    if dense:
        layers += [layer_flops(model, 0, seq_len)] * dense
    if moe:
        layers += [layer_flops(model, dense, seq_len)] * moe
    return 0.0, tuple(layers), head_flops(model)


def _matrix_flops(tensors: Iterable[TensorSpec], expert_share: float) -> float:
    """Two FLOPs a weight; a routed expert's count by the share of experts a token activates."""
    return sum(
        2.0 * spec.num_elements * (1.0 if spec.expert is None else expert_share)
        for spec in tensors
        if spec.role == "matrix"
    )
