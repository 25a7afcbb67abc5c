"""Transformer layers as phases.

A dense layer is attention and mlp. A MoE layer is attention (with norm and router), dispatch, experts and combine; what
travels between its phases:

    attention -> residual_TD normed_TD weights_TK experts_TK counts_E
    dispatch  -> residual_TD normed_TD rows_MD weights_M offsets_L
    experts   -> partial_TD (residual + shared expert) rows_MD
    combine   -> x_TD

Letters: T tokens, K experts per token, M rows at local experts, E experts, L local experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k2train.config.model import ModelConfig
from k2train.model.attention import LatentAttention, Rotary
from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import Dispatcher
from k2train.model.feed_forward import FeedForward, RoutedExperts
from k2train.model.phase import CommunicationPhase, ComputePhase, Grads, Started, Tensors
from k2train.model.pieces import Allocator, Piece
from k2train.model.routing import Router
from k2train.model.saved import named_norm
from k2train.ops.attention_tiles import AttentionScratch
from k2train.ops.backend import OpsBackend
from k2train.ops.weight_grad import WeightGradSlot


class AttentionPhase(ComputePhase):
    """Norm, attention and residual: x_TD -> x_TD."""

    layer: int

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        rotary: Rotary,
        scratch: AttentionScratch,
        backend: OpsBackend,
        allocator: Allocator,
    ) -> None:
        super().__init__(f"layer{layer}.attention", layer)
        self.model = model
        self.prefix = f"model.layers.{layer}"
        self.norm = allocator.parameter(model.hidden_size)
        self.attention = LatentAttention(
            model, f"{self.prefix}.self_attn", rotary, scratch, backend, allocator
        )

    def pieces(self) -> list[Piece]:
        return [Piece(f"{self.prefix}.input_layernorm.weight", self.norm), *self.attention.pieces()]

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        (x_TD,) = inputs
        saved, attention = context.saved, self.attention
        saved.name("layer_input", x_TD)
        names = ("layer_input", "input_norm_output")
        normed_TD = named_norm(saved, names, x_TD, self.norm, self.model.rms_norm_eps)
        heads_TX, max_logit_H = attention(normed_TD, context.num_sequences, slot, saved)
        context.statistics.add_max_logits(self.layer, max_logit_H)

        def residual(heads_TX: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
            return attention.project(heads_TX, slot).add_(x_TD)

        return (saved.make("attention_residual", residual, heads_TX, x_TD),)


class RoutedAttentionPhase(AttentionPhase):
    """A MoE layer's attention, followed by its second norm and the router."""

    def __init__(
        self,
        model: ModelConfig,
        layer: int,
        rotary: Rotary,
        scratch: AttentionScratch,
        backend: OpsBackend,
        allocator: Allocator,
    ) -> None:
        super().__init__(model, layer, rotary, scratch, backend, allocator)
        self.post_norm = allocator.parameter(model.hidden_size)
        self.router = Router(model, layer, allocator)

    def pieces(self) -> list[Piece]:
        post_norm = Piece(f"{self.prefix}.post_attention_layernorm.weight", self.post_norm)
        return [*super().pieces(), post_norm, *self.router.pieces()]

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        (residual_TD,) = super().compute(inputs, context, slot)
        names = ("attention_residual", "post_norm_output")
        normed_TD = named_norm(context.saved, names, residual_TD, self.post_norm, self.model.rms_norm_eps)
        experts_TK, weights_TK, counts_E = self.router(normed_TD, context, slot)
        return residual_TD, normed_TD, weights_TK, experts_TK, counts_E


class DispatchPhase(CommunicationPhase):
    """Tokens and their weights to their experts' rows; backward brings the gradients of both back."""

    def __init__(self, layer: int, dispatcher: Dispatcher) -> None:
        super().__init__(f"layer{layer}.dispatch")
        self.layer, self.dispatcher = layer, dispatcher

    def pieces(self) -> list[Piece]:
        return []

    def start_forward(self, inputs: Tensors, context: MicrobatchContext) -> Started:
        residual_TD, normed_TD, weights_TK, experts_TK, counts_E = inputs
        route = context.routes[self.layer] = self.dispatcher.route(experts_TK, counts_E, context.saved)
        pending = self.dispatcher.dispatch(normed_TD, route, weights_TK)
        return Started(pending, (residual_TD, normed_TD))

    def finish_forward(self, started: Started, context: MicrobatchContext) -> tuple[Tensors, None]:
        rows_MD, weights_M = started.pending.wait()
        return (*started.rest, rows_MD, weights_M, context.routes[self.layer].offsets), None

    def start_backward(self, record: None, grad_outputs: Grads, context: MicrobatchContext) -> Started:
        dresidual_TD, dnormed_TD, drows_MD, dweights_M, _ = grad_outputs
        assert drows_MD is not None
        pending = self.dispatcher.combine(drows_MD, context.routes.pop(self.layer), dweights_M)
        return Started(pending, (dresidual_TD, dnormed_TD))

    def finish_backward(self, started: Started, context: MicrobatchContext) -> Grads:
        dresidual_TD, dshared_TD = started.rest
        dnormed_TD, dweights_TK = started.pending.wait()
        if dshared_TD is not None:
            dnormed_TD.add_(dshared_TD)
        return dresidual_TD, dnormed_TD, dweights_TK, None, None


class ExpertsPhase(ComputePhase):
    """The routed experts on the rows that came here, and the shared experts on this rank's own tokens."""

    def __init__(
        self, model: ModelConfig, layer: int, local_experts: Sequence[int], allocator: Allocator
    ) -> None:
        super().__init__(f"layer{layer}.experts", layer)
        prefix, width = f"model.layers.{layer}.mlp", model.moe_intermediate_size
        self.routed = RoutedExperts(f"{prefix}.experts", local_experts, model.hidden_size, width, allocator)
        self.shared = None
        if model.n_shared_experts:
            width *= model.n_shared_experts
            self.shared = FeedForward(
                f"{prefix}.shared_experts", "shared", model.hidden_size, width, allocator
            )

    def pieces(self) -> list[Piece]:
        return self.routed.pieces() + (self.shared.pieces() if self.shared else [])

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        residual_TD, normed_TD, rows_MD, weights_M, offsets_L = inputs
        saved = context.saved
        saved.name("expert_input", rows_MD)
        saved.name("routing", extras=(weights_M, offsets_L))
        out_MD = self.routed(rows_MD, weights_M, offsets_L, slot, saved)
        partial_TD = self.shared(normed_TD, slot, saved).add_(residual_TD) if self.shared else residual_TD
        return partial_TD, out_MD


class CombinePhase(CommunicationPhase):
    """Rows back to their tokens and added up; backward copies every token's gradient to its rows."""

    def __init__(self, layer: int, dispatcher: Dispatcher) -> None:
        super().__init__(f"layer{layer}.combine")
        self.layer, self.dispatcher = layer, dispatcher

    def pieces(self) -> list[Piece]:
        return []

    def start_forward(self, inputs: Tensors, context: MicrobatchContext) -> Started:
        partial_TD, rows_MD = inputs
        return Started(self.dispatcher.combine(rows_MD, context.routes[self.layer]), (partial_TD,))

    def finish_forward(self, started: Started, context: MicrobatchContext) -> tuple[Tensors, None]:
        (partial_TD,) = started.rest
        (sum_TD,) = started.pending.wait()
        context.routes[self.layer].settle(context.saved)
        return (sum_TD.add_(partial_TD),), None

    def start_backward(self, record: None, grad_outputs: Grads, context: MicrobatchContext) -> Started:
        (dx_TD,) = grad_outputs
        assert dx_TD is not None
        return Started(self.dispatcher.dispatch(dx_TD, context.routes[self.layer]), (dx_TD,))

    def finish_backward(self, started: Started, context: MicrobatchContext) -> Grads:
        (dx_TD,) = started.rest
        (drows_MD,) = started.pending.wait()
        return dx_TD, drows_MD


class MlpPhase(ComputePhase):
    """A dense layer's norm, feed-forward and residual."""

    def __init__(self, model: ModelConfig, layer: int, allocator: Allocator) -> None:
        super().__init__(f"layer{layer}.mlp", layer)
        self.eps, self.prefix = model.rms_norm_eps, f"model.layers.{layer}"
        self.norm = allocator.parameter(model.hidden_size)
        self.mlp = FeedForward(
            f"{self.prefix}.mlp", "mlp", model.hidden_size, model.intermediate_size, allocator
        )

    def pieces(self) -> list[Piece]:
        return [Piece(f"{self.prefix}.post_attention_layernorm.weight", self.norm), *self.mlp.pieces()]

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        (x_TD,) = inputs
        names = ("attention_residual", "post_norm_output")
        normed_TD = named_norm(context.saved, names, x_TD, self.norm, self.eps)
        return (self.mlp(normed_TD, slot, context.saved).add_(x_TD),)
