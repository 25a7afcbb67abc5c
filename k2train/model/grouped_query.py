"""Grouped-query attention: a key and a value head serve a group of neighbouring query heads.

Ainslie and others (arXiv 2305.13245); numerics of transformers' Glm4MoeAttention. Tensors and
widths: `architecture.grouped_query`. Keys and values are copied for every query head, which is what
all of this program's attention kernels take.

Letters: T tokens, D hidden, B sequences, S positions, H query heads, G key and value heads,
K features of a head, X features of all heads of a projection.
"""

from __future__ import annotations

import torch

from k2train.architecture.grouped_query import GroupedQueryMixer
from k2train.model.attention import Attention, LayerTools
from k2train.model.saved import SavedActivations
from k2train.ops.linear import linear
from k2train.ops.rotary_halves import copied_heads, rotary_halves
from k2train.ops.weight_grad import WeightGradSlot


class GroupedQueryAttention(Attention):
    """The grouped-query attention of one layer."""

    def __init__(self, mixer: GroupedQueryMixer, layer: int, tools: LayerTools) -> None:
        super().__init__(mixer, layer, tools)
        self.mixer = mixer

    def queries(
        self,
        normed_TD: torch.Tensor,
        num_sequences: int,
        slot: WeightGradSlot | None,
        saved: SavedActivations,
    ) -> torch.Tensor:
        tables, inside = self.tables(normed_TD, num_sequences), self.tools.backend.heads_inside

        def rotated(x_TD: torch.Tensor) -> torch.Tensor:
            q_BSHK = self._heads("q_proj", x_TD, num_sequences, slot)
            return rotary_halves(q_BSHK, tables, heads_inside=inside)

        return saved.make("query", rotated, normed_TD)

    def keys_values(
        self,
        normed_TD: torch.Tensor,
        num_sequences: int,
        slot: WeightGradSlot | None,
        saved: SavedActivations,
    ) -> tuple[torch.Tensor, ...]:
        tables, inside = self.tables(normed_TD, num_sequences), self.tools.backend.heads_inside
        copies = self.mixer.copies

        def rotated(x_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
            k_BSGK = self._heads("k_proj", x_TD, num_sequences, slot)
            v_BSGK = self._heads("v_proj", x_TD, num_sequences, slot)
            return rotary_halves(k_BSGK, tables, copies, inside), copied_heads(v_BSGK, copies, inside)

        return saved.make("key_value", rotated, normed_TD)

    def _heads(
        self, name: str, x_TD: torch.Tensor, num_sequences: int, slot: WeightGradSlot | None
    ) -> torch.Tensor:
        """A projection's heads (B, S, G or H, K)."""
        projected_TX = linear(x_TD, self.weights[name], slot)
        return projected_TX.view(num_sequences, x_TD.shape[0] // num_sequences, -1, self.heads.query)
