"""SwiGLU feed-forwards: dense or shared (one for all tokens), and the routed experts this rank holds.

Gate and up are one parameter, so that they are one product and SwiGLU saves one tensor.
Letters: T tokens, M rows at local experts, L local experts, D hidden, F width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k2train.model.pieces import Allocator, Piece, gate_up_pieces
from k2train.model.saved import SavedActivations
from k2train.ops.grouped import GroupedProduct, grouped_linear
from k2train.ops.linear import linear
from k2train.ops.swiglu import swiglu, weighted_swiglu
from k2train.ops.weight_grad import WeightGradSlot


class FeedForward:
    """down(silu(gate(x)) * up(x)) for every token. `kind` begins the names of its activations: mlp or shared."""

    def __init__(self, prefix: str, kind: str, hidden: int, width: int, allocator: Allocator) -> None:
        self.prefix, self.kind = prefix, kind
        self.gate_up = allocator.parameter(2 * width, hidden)
        self.down = allocator.parameter(hidden, width)

    def pieces(self) -> list[Piece]:
        return [
            *gate_up_pieces(self.prefix, self.gate_up),
            Piece(f"{self.prefix}.down_proj.weight", self.down),
        ]

    def __call__(
        self, x_TD: torch.Tensor, slot: WeightGradSlot | None, saved: SavedActivations
    ) -> torch.Tensor:
        gate_up_TF2 = saved.make(
            f"{self.kind}_swiglu_input", lambda x_TD: linear(x_TD, self.gate_up, slot), x_TD
        )
        hidden_TF = saved.make(f"{self.kind}_swiglu_output", swiglu, gate_up_TF2)
        return linear(hidden_TF, self.down, slot)


class RoutedExperts:
    """The local experts of one layer, as grouped products over rows sorted by expert."""

    def __init__(
        self,
        prefix: str,
        expert_ids: Sequence[int],
        hidden: int,
        width: int,
        product: GroupedProduct,
        allocator: Allocator,
    ) -> None:
        self.prefix, self.expert_ids, self.product = prefix, tuple(expert_ids), product
        self.gate_up = allocator.parameter(len(expert_ids), 2 * width, hidden)
        self.down = allocator.parameter(len(expert_ids), hidden, width)

    def pieces(self) -> list[Piece]:
        pieces = []
        for index, expert in enumerate(self.expert_ids):
            prefix = f"{self.prefix}.{expert}"
            pieces += gate_up_pieces(prefix, self.gate_up, (index,))
            pieces.append(Piece(f"{prefix}.down_proj.weight", self.down, (index,)))
        return pieces

    def __call__(
        self,
        rows_MD: torch.Tensor,
        weights_M: torch.Tensor,
        offsets_L: torch.Tensor,
        rows_of_experts: tuple[int, ...],
        slot: WeightGradSlot | None,
        saved: SavedActivations,
    ) -> torch.Tensor:
        """Every row through its expert, times its routing weight (M, D). No backward needs the result.

        offsets_L, rows_of_experts: the route's (`dispatcher.Route`).
        """

        def up(rows_MD: torch.Tensor, offsets_L: torch.Tensor) -> torch.Tensor:
            return grouped_linear(rows_MD, self.gate_up, offsets_L, slot, rows_of_experts, self.product)

        gate_up_MF2 = saved.make("swiglu_input", up, rows_MD, offsets_L)
        hidden_MF = saved.make("swiglu_output", weighted_swiglu, gate_up_MF2, weights_M)
        return grouped_linear(hidden_MF, self.down, offsets_L, slot, rows_of_experts, self.product)
