"""What every mixer computes alike: its weights, causal attention of all heads, the output
projection.

A mixer's own file makes queries, keys and values (`latent_attention`).

Letters: T tokens, D hidden, B sequences, S positions, H heads, K query and key features, V value
features, X features of all heads.
"""

from __future__ import annotations

import abc
import dataclasses

import torch

from k2train.architecture.layer import Mixer
from k2train.config.model import ModelConfig
from k2train.model.pieces import Allocator, Piece
from k2train.model.saved import SavedActivations
from k2train.ops.attention import causal_attention
from k2train.ops.attention_tiles import AttentionScratch
from k2train.ops.backend import OpsBackend
from k2train.ops.linear import linear
from k2train.ops.rotary import RotaryTables, rotary_tables, softmax_scale
from k2train.ops.weight_grad import WeightGradSlot


class Rotary:
    """The rotary tables in the model's type, grown to the longest sequence seen."""

    def __init__(self, model: ModelConfig, allocator: Allocator) -> None:
        self._model, self._allocator = model, allocator
        self._tables: RotaryTables | None = None

    def tables(self, length: int) -> RotaryTables:
        """The tables of the first `length` positions."""
        if self._tables is None or self._tables.length < length:
            self._tables = rotary_tables(self._model, length, self._allocator.dtype, self._allocator.device)
        return self._tables.first(length)


@dataclasses.dataclass(frozen=True)
class LayerTools:
    """What all layers of a virtual stage are built with. scratch: room for tiles of scores."""

    model: ModelConfig
    rotary: Rotary
    scratch: AttentionScratch
    backend: OpsBackend
    allocator: Allocator


class Attention(abc.ABC):
    """The attention of one layer, between its norm and its residual. weights: by the tensor's name
    in the mixer."""

    def __init__(self, mixer: Mixer, layer: int, tools: LayerTools) -> None:
        self.tools, self.heads = tools, mixer.heads
        self.scale = softmax_scale(tools.model)
        self._pieces = [tools.allocator.whole(spec) for spec in mixer.tensors(layer)]
        self.weights = {piece.name.split(".")[-2]: piece.parameter for piece in self._pieces}

    def pieces(self) -> list[Piece]:
        return self._pieces

    @abc.abstractmethod
    def queries(
        self,
        normed_TD: torch.Tensor,
        num_sequences: int,
        slot: WeightGradSlot | None,
        saved: SavedActivations,
    ) -> torch.Tensor:
        """Rotated queries, named "query": (B, H, S, K), or (B, S, H, K) with
        backend.heads_inside."""

    @abc.abstractmethod
    def keys_values(
        self,
        normed_TD: torch.Tensor,
        num_sequences: int,
        slot: WeightGradSlot | None,
        saved: SavedActivations,
    ) -> tuple[torch.Tensor, ...]:
        """Rotated keys and values of every head, named "key_value", laid out as the queries."""

    def __call__(
        self,
        normed_TD: torch.Tensor,
        num_sequences: int,
        slot: WeightGradSlot | None,
        saved: SavedActivations,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads' outputs, before the output projection (T, H * V), and the largest logit of
        each head (H,)."""
        query = self.queries(normed_TD, num_sequences, slot, saved)
        key, value = self.keys_values(normed_TD, num_sequences, slot, saved)
        tokens, backend = normed_TD.shape[0], self.tools.backend

        def attend(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q_BHSK, k_BHSK, v_BHSV = (t.transpose(1, 2) if backend.heads_inside else t for t in inputs)
            attended = causal_attention(
                q_BHSK, k_BHSK, v_BHSV, self.scale, scratch=self.tools.scratch, backend=backend
            )
            if attended.extras:
                saved.name("attention_output", extras=attended.extras)
            return attended.out.view(tokens, -1), attended.max_logits

        heads_TX, max_logit_H = saved.make("attention_output", attend, query, key, value)
        return heads_TX, max_logit_H

    def project(self, heads_TX: torch.Tensor, slot: WeightGradSlot | None) -> torch.Tensor:
        """The output projection (T, D)."""
        return linear(heads_TX, self.weights["o_proj"], slot)

    def tables(self, normed_TD: torch.Tensor, num_sequences: int) -> RotaryTables:
        """The rotary tables of the positions of a microbatch's sequences."""
        return self.tools.rotary.tables(normed_TD.shape[0] // num_sequences)
