"""How much the embedding, each layer and the head weigh in a pipeline: forward FLOPs for a token.

Only the ratio counts, so this leaves out what is alike or small: elementwise work, communication,
recomputation. The estimate of seconds, which has all of it, lies above this room. K2's head weighs
about 2.2 of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable

from k2train.architecture.head import head_flops
from k2train.architecture.layer import LayerKind, layer_kind, layer_kinds, layer_of
from k2train.architecture.tensors import TensorSpec
from k2train.config.model import ModelConfig


def layer_flops(model: ModelConfig, kind: LayerKind, seq_len: int) -> float:
    """Forward FLOPs of one layer for a token."""
    share = model.num_experts_per_tok / model.n_routed_experts
    layer = layer_of(model, kind)
    return _matrix_flops(layer.tensors(0), share) + layer.mixer.heads.score_flops(seq_len)


def piece_weights(model: ModelConfig, seq_len: int) -> tuple[float, tuple[float, ...], float]:
    """(embedding, every layer, head). The embedding is a look-up and weighs nothing."""
    flops = {kind: layer_flops(model, kind, seq_len) for kind in layer_kinds(model)}
    layers = tuple(flops[layer_kind(model, layer)] for layer in range(model.num_hidden_layers))
    return 0.0, layers, head_flops(model)


def _matrix_flops(tensors: Iterable[TensorSpec], expert_share: float) -> float:
    """Two FLOPs a weight; a routed expert's count by the share of experts a token activates."""
    return sum(
        2.0 * spec.num_elements * (1.0 if spec.expert is None else expert_share)
        for spec in tensors
        if spec.role == "matrix"
    )
