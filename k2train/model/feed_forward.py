"""SwiGLU feed-forwards: dense or shared (one for all tokens), and the routed experts this rank
holds.

Gate and up are one parameter, so that they are one product and SwiGLU saves one tensor.
Letters: T tokens, M rows at local experts, L local experts, D hidden, F width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from k2train.architecture.mixture_of_experts import ExpertsChannel
from k2train.architecture.tensors import TensorSpec
from k2train.model.pieces import Allocator, Piece, swiglu_pieces
from k2train.model.saved import SavedActivations
from k2train.ops.grouped import GroupedProduct, grouped_linear
from k2train.ops.linear import linear
from k2train.ops.swiglu import swiglu, weighted_swiglu
from k2train.ops.weight_grad import WeightGradSlot


class FeedForward:
    """down(silu(gate(x)) * up(x)) for every token. `kind` begins the names of its activations."""

    def __init__(self, kind: str, tensors: Iterable[TensorSpec], allocator: Allocator) -> None:
        """tensors: gate, up and down projection (`architecture.feed_forward.Swiglu.tensors`)."""
        self.kind, (gate, up, down) = kind, tensors
        width, hidden = gate.shape
        self.gate_up = allocator.parameter(2 * width, hidden)
        self.down = allocator.parameter(hidden, width)
        self._pieces = swiglu_pieces((gate, up, down), self.gate_up, self.down)

    def pieces(self) -> list[Piece]:
        return self._pieces

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
        channel: ExpertsChannel,
        layer: int,
        expert_ids: Sequence[int],
        product: GroupedProduct,
        allocator: Allocator,
    ) -> None:
        self.channel, self.layer, self.expert_ids = channel, layer, tuple(expert_ids)
        self.product = product
        hidden, width = channel.expert.hidden, channel.expert.width
        self.gate_up = allocator.parameter(len(expert_ids), 2 * width, hidden)
        self.down = allocator.parameter(len(expert_ids), hidden, width)

    def pieces(self) -> list[Piece]:
        pieces = []
        for index, expert in enumerate(self.expert_ids):
            tensors = tuple(self.channel.expert_tensors(self.layer, expert))
            pieces += swiglu_pieces(tensors, self.gate_up, self.down, (index,))
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
        """Every row through its expert, times its routing weight (M, D). No backward needs the
        result.

        offsets_L, rows_of_experts: the route's (`dispatcher.Route`).
        """

        def up(rows_MD: torch.Tensor, offsets_L: torch.Tensor) -> torch.Tensor:
            return grouped_linear(rows_MD, self.gate_up, offsets_L, slot, rows_of_experts, self.product)

        gate_up_MF2 = saved.make("swiglu_input", up, rows_MD, offsets_L)
        hidden_MF = saved.make("swiglu_output", weighted_swiglu, gate_up_MF2, weights_M)
        return grouped_linear(hidden_MF, self.down, offsets_L, slot, rows_of_experts, self.product)
