"""Multi-head latent attention: queries and keys-values through narrow latents, one rotary key
shared by all heads.

DeepSeek-V2 (arXiv 2405.04434, section 2.1); numerics of transformers' DeepseekV3Attention. Tensors
and widths: `architecture.latent_attention`.

Letters: T tokens, D hidden, R latent features or features of the shared rotary key, B sequences,
S positions, H heads, K query and key features, C unrotated key and value features of a head,
X features of several kinds side by side.
"""

from __future__ import annotations

import torch

from k2train.architecture.latent_attention import LatentMixer
from k2train.model.attention import Attention, LayerTools
from k2train.model.saved import SavedActivations, named_norm
from k2train.ops.linear import linear
from k2train.ops.rotary import rotary_keys, rotary_queries
from k2train.ops.weight_grad import WeightGradSlot

# transformers builds the two latent norms without the model's rms_norm_eps.
LATENT_NORM_EPS = 1e-6


class LatentAttention(Attention):
    """The latent attention of one layer."""

    def __init__(self, mixer: LatentMixer, layer: int, tools: LayerTools) -> None:
        super().__init__(mixer, layer, tools)
        self.mixer = mixer

    def queries(
        self,
        normed_TD: torch.Tensor,
        num_sequences: int,
        slot: WeightGradSlot | None,
        saved: SavedActivations,
    ) -> torch.Tensor:
        weights, heads = self.weights, self.heads
        source_TX, up = normed_TD, "q_proj"
        if self.mixer.query_latent is not None:
            latent_TR = saved.make(
                "q_latent", lambda x_TD: linear(x_TD, weights["q_a_proj"], slot), normed_TD
            )
            norm = weights["q_a_layernorm"]
            source_TX = named_norm(
                saved, ("q_latent", "q_latent_norm_output"), latent_TR, norm, LATENT_NORM_EPS, slot
            )
            up = "q_b_proj"
        tables = self.tables(normed_TD, num_sequences)

        def rotated(source_TX: torch.Tensor) -> torch.Tensor:
            q_TX = linear(source_TX, weights[up], slot)
            q_BSHK = q_TX.view(num_sequences, -1, heads.num, heads.query)
            return rotary_queries(q_BSHK, tables, self.tools.backend.heads_inside)

        return saved.make("query", rotated, source_TX)

    def keys_values(
        self,
        normed_TD: torch.Tensor,
        num_sequences: int,
        slot: WeightGradSlot | None,
        saved: SavedActivations,
    ) -> tuple[torch.Tensor, ...]:
        weights, heads = self.weights, self.heads
        compressed_TX = saved.make(
            "kv_latent", lambda x_TD: linear(x_TD, weights["kv_a_proj_with_mqa"], slot), normed_TD
        )
        latent_TR, rope_TR = compressed_TX.split([self.mixer.latent, heads.rotated], dim=1)
        norm = weights["kv_a_layernorm"]
        latent_TR = named_norm(
            saved, ("kv_latent", "kv_latent_norm_output"), latent_TR, norm, LATENT_NORM_EPS, slot
        )
        tables = self.tables(normed_TD, num_sequences)

        def rotated(latent_TR: torch.Tensor, rope_TR: torch.Tensor) -> tuple[torch.Tensor, ...]:
            kv_TX = linear(latent_TR, weights["kv_b_proj"], slot)
            kv_BSHC = kv_TX.view(num_sequences, -1, heads.num, heads.unrotated + heads.value)
            rope_BSR = rope_TR.unflatten(0, (num_sequences, -1))
            return rotary_keys(kv_BSHC, rope_BSR, tables, self.tools.backend.heads_inside)

        return saved.make("key_value", rotated, latent_TR, rope_TR)
