"""Multi-head latent attention: queries and keys-values through narrow latents, one rotary key shared by all heads.

DeepSeek-V2 (arXiv 2405.04434, section 2.1); names and numerics of transformers' DeepseekV3Attention.
Letters: T tokens, D hidden, B sequences, S positions, H heads, K query and key features, V value features.
"""

from __future__ import annotations

import torch

from k2train.config.model import ModelConfig
from k2train.model.pieces import Allocator, Piece
from k2train.model.saved import SavedActivations, named_norm
from k2train.ops.attention import causal_attention
from k2train.ops.attention_tiles import AttentionScratch
from k2train.ops.backend import OpsBackend
from k2train.ops.linear import linear
from k2train.ops.rotary import RotaryTables, rotary_keys, rotary_queries, rotary_tables, softmax_scale
from k2train.ops.weight_grad import WeightGradSlot

# transformers builds the two latent norms without the model's rms_norm_eps.
LATENT_NORM_EPS = 1e-6


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


class LatentAttention:
    """The attention of one layer, between its norm and its residual."""

    def __init__(
        self,
        model: ModelConfig,
        prefix: str,
        rotary: Rotary,
        scratch: AttentionScratch,
        backend: OpsBackend,
        allocator: Allocator,
    ) -> None:
        self.model, self.prefix, self.rotary, self.scratch = model, prefix, rotary, scratch
        self.backend = backend
        self.scale = softmax_scale(model)
        hidden, heads = model.hidden_size, model.num_attention_heads
        self.weights: dict[str, torch.nn.Parameter] = {}
        if model.q_lora_rank is None:
            self.weights["q_proj"] = allocator.parameter(heads * model.qk_head_dim, hidden)
        else:
            self.weights["q_a_proj"] = allocator.parameter(model.q_lora_rank, hidden)
            self.weights["q_a_layernorm"] = allocator.parameter(model.q_lora_rank)
            self.weights["q_b_proj"] = allocator.parameter(heads * model.qk_head_dim, model.q_lora_rank)
        latent = model.kv_lora_rank
        self.weights["kv_a_proj_with_mqa"] = allocator.parameter(latent + model.qk_rope_head_dim, hidden)
        self.weights["kv_a_layernorm"] = allocator.parameter(latent)
        self.weights["kv_b_proj"] = allocator.parameter(
            heads * (model.qk_nope_head_dim + model.v_head_dim), latent
        )
        self.weights["o_proj"] = allocator.parameter(hidden, heads * model.v_head_dim)

    def pieces(self) -> list[Piece]:
        return [Piece(f"{self.prefix}.{name}.weight", weight) for name, weight in self.weights.items()]

    def __call__(
        self,
        normed_TD: torch.Tensor,
        num_sequences: int,
        slot: WeightGradSlot | None,
        saved: SavedActivations,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads' outputs, before the output projection (T, H * V), and the largest logit of each head (H,)."""
        query = self._queries(normed_TD, num_sequences, slot, saved)
        key, value = self._keys_values(normed_TD, num_sequences, slot, saved)
        tokens, backend = normed_TD.shape[0], self.backend

        def attend(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q_BHSK, k_BHSK, v_BHSV = (t.transpose(1, 2) if backend.heads_inside else t for t in inputs)
            attended = causal_attention(
                q_BHSK, k_BHSK, v_BHSV, self.scale, scratch=self.scratch, backend=backend
            )
            if attended.extras:
                saved.name("attention_output", extras=attended.extras)
            return attended.out.view(tokens, -1), attended.max_logits

        heads_TX, max_logit_H = saved.make("attention_output", attend, query, key, value)
        return heads_TX, max_logit_H

    def project(self, heads_TX: torch.Tensor, slot: WeightGradSlot | None) -> torch.Tensor:
        """The output projection (T, D)."""
        return linear(heads_TX, self.weights["o_proj"], slot)

    def _queries(
        self,
        normed_TD: torch.Tensor,
        num_sequences: int,
        slot: WeightGradSlot | None,
        saved: SavedActivations,
    ) -> torch.Tensor:
        weights, model = self.weights, self.model
        source_TX, up = normed_TD, "q_proj"
        if model.q_lora_rank is not None:
            latent_TR = saved.make(
                "q_latent", lambda x_TD: linear(x_TD, weights["q_a_proj"], slot), normed_TD
            )
            norm = weights["q_a_layernorm"]
            source_TX = named_norm(
                saved, ("q_latent", "q_latent_norm_output"), latent_TR, norm, LATENT_NORM_EPS, slot
            )
            up = "q_b_proj"
        tables = self.rotary.tables(normed_TD.shape[0] // num_sequences)

        def rotated(source_TX: torch.Tensor) -> torch.Tensor:
            q_TX = linear(source_TX, weights[up], slot)
            q_BSHK = q_TX.view(num_sequences, -1, model.num_attention_heads, model.qk_head_dim)
            return rotary_queries(q_BSHK, tables, self.backend.heads_inside)

        return saved.make("query", rotated, source_TX)

    def _keys_values(
        self,
        normed_TD: torch.Tensor,
        num_sequences: int,
        slot: WeightGradSlot | None,
        saved: SavedActivations,
    ) -> tuple[torch.Tensor, ...]:
        weights, model = self.weights, self.model
        compressed_TX = saved.make(
            "kv_latent", lambda x_TD: linear(x_TD, weights["kv_a_proj_with_mqa"], slot), normed_TD
        )
        latent_TR, rope_TR = compressed_TX.split([model.kv_lora_rank, model.qk_rope_head_dim], dim=1)
        norm = weights["kv_a_layernorm"]
        latent_TR = named_norm(
            saved, ("kv_latent", "kv_latent_norm_output"), latent_TR, norm, LATENT_NORM_EPS, slot
        )
        tables = self.rotary.tables(normed_TD.shape[0] // num_sequences)

        def rotated(latent_TR: torch.Tensor, rope_TR: torch.Tensor) -> tuple[torch.Tensor, ...]:
            kv_TX = linear(latent_TR, weights["kv_b_proj"], slot)
            width = model.qk_nope_head_dim + model.v_head_dim
            kv_BSHC = kv_TX.view(num_sequences, -1, model.num_attention_heads, width)
            rope_BSR = rope_TR.unflatten(0, (num_sequences, -1))
            return rotary_keys(kv_BSHC, rope_BSR, tables, self.backend.heads_inside)

        return saved.make("key_value", rotated, latent_TR, rope_TR)
