"""Parameter counts from the catalogue of tensors: of the model, of a token's path through it, and
of a rank.

K2: 1026.4 billion in all, 32.9 billion activated with both embeddings (docs/k2.md). A router's
correction bias is a buffer, not a parameter, and is left out; it would add 23 040 numbers to K2.
"""

from __future__ import annotations

from dataclasses import dataclass

from k2train.architecture.embedding import embedding_tensors
from k2train.architecture.head import head_tensors
from k2train.architecture.layer import Layer, layer_kind, layer_kinds, layer_of
from k2train.config.model import ModelConfig
from k2train.layout.layout import VirtualStage


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
    """The whole model. embedding and head are equal in size and both counted in `total` and
    `activated`."""

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
    counts = {kind: layer_parameters(layer_of(model, kind)) for kind in layer_kinds(model)}
    layers = tuple(counts[layer_kind(model, layer)] for layer in range(model.num_hidden_layers))
    (table,) = (spec.num_elements for spec in embedding_tensors(model))
    norm, head = (spec.num_elements for spec in head_tensors(model))
    return ModelParameters(table, layers, norm, head, model.num_experts_per_tok)


def layer_parameters(layer: Layer) -> LayerParameters:
    """Count one layer."""
    tensors = [spec for spec in layer.tensors(0) if spec.trained]
    dense = sum(spec.num_elements for spec in tensors if spec.expert is None)
    first = sum(spec.num_elements for spec in tensors if spec.expert == 0)
    return LayerParameters(dense, first, layer.channel.num_experts)
