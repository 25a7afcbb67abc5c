"""Parameter counts from the catalogue of tensors: of the model, of a token's path through it, and of a rank.

K2: 1026.4 billion in all, 32.9 billion activated with both embeddings (docs/k2.md). A router's correction bias is a
buffer, not a parameter, and is left out; it would add 23 040 numbers to K2.
"""

from __future__ import annotations

from dataclasses import dataclass

from k2train.config.model import ModelConfig
from k2train.layout.layout import VirtualStage
from k2train.layout.tensors import layer_tensors


@dataclass(frozen=True)
class LayerParameters:
    """One transformer layer: what every rank of a stage holds, and one routed expert."""

    dense: int
    per_expert: int
    num_experts: int

    @property
    def total(self) -> int:
        return self.dense + self.per_expert * self.num_experts

    def activated(self, num_experts_per_tok: int) -> int:
        """Parameters a token meets."""
        return self.dense + self.per_expert * min(num_experts_per_tok, self.num_experts)


@dataclass(frozen=True)
class ModelParameters:
    """The whole model. embedding and head are equal in size and both counted in `total` and `activated`."""

    embedding: int
    layers: tuple[LayerParameters, ...]
    final_norm: int
    head: int
    num_experts_per_tok: int

    @property
    def total(self) -> int:
        return self.embedding + self.final_norm + self.head + sum(layer.total for layer in self.layers)

    @property
    def activated(self) -> int:
        """Parameters a token meets, both embeddings among them."""
        layers = sum(layer.activated(self.num_experts_per_tok) for layer in self.layers)
        return self.embedding + self.final_norm + self.head + layers

    def of(self, piece: VirtualStage, ep: int) -> int:
        """Parameters of a virtual stage on one rank, experts spread over `ep` ranks."""
        outside = piece.embedding * self.embedding + piece.head * (self.head + self.final_norm)
        layers = (self.layers[index] for index in piece.layers)
        return outside + sum(layer.dense + layer.per_expert * layer.num_experts // ep for layer in layers)


def model_parameters(model: ModelConfig) -> ModelParameters:
    """Count a model."""
    dense_layers, moe_layers = model.first_k_dense_replace, model.num_moe_layers
    layers: list[LayerParameters] = []
    if dense_layers:
        layers += [layer_parameters(model, 0)] * dense_layers
    if moe_layers:
        layers += [layer_parameters(model, dense_layers)] * moe_layers
    table = model.vocab_size * model.hidden_size
    return ModelParameters(table, tuple(layers), model.hidden_size, table, model.num_experts_per_tok)


def layer_parameters(model: ModelConfig, layer: int) -> LayerParameters:
    """Count one layer."""
    tensors = [spec for spec in layer_tensors(model, layer) if spec.trained]
    dense = sum(spec.num_elements for spec in tensors if spec.expert is None)
    first = sum(spec.num_elements for spec in tensors if spec.expert == 0)
    return LayerParameters(dense, first, model.n_routed_experts if model.is_moe(layer) else 0)
