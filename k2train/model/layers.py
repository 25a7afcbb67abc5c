"""Transformer layers as phases.

A dense layer is attention and mlp. A MoE layer is attention (with norm and router), route,
dispatch, experts and combine; what travels between its phases:

    attention -> residual_TD normed_TD weights_TK experts_TK counts_E
    route     -> residual_TD normed_TD weights_TK
    dispatch  -> residual_TD normed_TD rows_MD weights_M offsets_L
    experts   -> partial_TD (residual + shared expert) rows_MD
    combine   -> x_TD

Letters: T tokens, K experts per token, M rows at local experts, E experts, L local experts, D
hidden, H heads, X all heads' value features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from k2train.architecture.feed_forward import DenseChannel
from k2train.architecture.layer import Layer
from k2train.architecture.mixture_of_experts import ExpertsChannel
from k2train.model.attention import LayerTools
from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import Dispatcher, Results
from k2train.model.feed_forward import FeedForward, RoutedExperts
from k2train.model.mixers import build_attention
from k2train.model.phase import CommunicationPhase, ComputePhase, Started, Tensors
from k2train.model.pieces import Piece
from k2train.model.routing import Router
from k2train.model.saved import named_norm
from k2train.ops.weight_grad import WeightGradSlot


class AttentionPhase(ComputePhase):
    """Norm, attention and residual: x_TD -> x_TD."""

    layer: int

    def __init__(self, block: Layer, layer: int, tools: LayerTools) -> None:
        super().__init__(f"layer{layer}.attention", layer)
        self.eps = tools.model.rms_norm_eps
        self.norm = tools.allocator.whole(block.input_norm(layer))
        self.attention = build_attention(block.mixer, layer, tools)

    def pieces(self) -> list[Piece]:
        return [self.norm, *self.attention.pieces()]

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        (x_TD,) = inputs
        saved, attention = context.saved, self.attention
        saved.name("layer_input", x_TD)
        names = ("layer_input", "input_norm_output")
        normed_TD = named_norm(saved, names, x_TD, self.norm.parameter, self.eps, slot)
        heads_TX, max_logit_H = attention(normed_TD, context.num_sequences, slot, saved)
        context.statistics.add_max_logits(self.layer, max_logit_H)

        def residual(heads_TX: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
            return attention.project(heads_TX, slot).add_(x_TD)

        return (saved.make("attention_residual", residual, heads_TX, x_TD),)


class RoutedAttentionPhase(AttentionPhase):
    """A MoE layer's attention, followed by its second norm and the router."""

    def __init__(self, block: Layer, channel: ExpertsChannel, layer: int, tools: LayerTools) -> None:
        super().__init__(block, layer, tools)
        self.post_norm = tools.allocator.whole(block.post_norm(layer))
        self.router = Router(tools.model, channel, layer, tools.allocator)

    def pieces(self) -> list[Piece]:
        return [*super().pieces(), self.post_norm, *self.router.pieces()]

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        (residual_TD,) = super().compute(inputs, context, slot)
        names = ("attention_residual", "post_norm_output")
        weight_D = self.post_norm.parameter
        normed_TD = named_norm(context.saved, names, residual_TD, weight_D, self.eps, slot)
        experts_TK, weights_TK, counts_E = self.router(normed_TD, context, slot)
        return residual_TD, normed_TD, weights_TK, experts_TK, counts_E


class RoutePhase(CommunicationPhase):
    """Who sends what, agreed on by all ranks; the host learns the numbers of rows, which become
    splits.

    Between its start and its finish a pair's other half is given its next phase, so that the device
    has work while the host waits. The backward has nothing to do here; its step keeps the halves of
    a pair in time.
    """

    def __init__(self, layer: int, dispatcher: Dispatcher) -> None:
        super().__init__(f"layer{layer}.route")
        self.layer, self.dispatcher = layer, dispatcher

    def pieces(self) -> list[Piece]:
        return []

    def start_forward(self, inputs: Results, context: MicrobatchContext) -> Started:
        *kept, experts_TK, counts_E = inputs.tensors
        assert experts_TK is not None
        assert counts_E is not None
        routing = self.dispatcher.start_route(experts_TK, counts_E, context.saved, inputs.ready)
        return Started(routing, (Results(tuple(kept), inputs.ready),))

    def finish_forward(self, started: Started, context: MicrobatchContext) -> tuple[Results, None]:
        context.routes[self.layer] = started.pending.wait()
        return started.rest[0], None

    def start_backward(self, record: None, grad_outputs: Results, context: MicrobatchContext) -> Started:
        return Started(grad_outputs)

    def finish_backward(self, started: Started, context: MicrobatchContext) -> Results:
        grads: Results = started.pending
        return Results((*grads.tensors, None, None), grads.ready)


class DispatchPhase(CommunicationPhase):
    """Tokens and their weights to their experts' rows; backward brings the gradients of both
    back."""

    def __init__(self, layer: int, dispatcher: Dispatcher) -> None:
        super().__init__(f"layer{layer}.dispatch")
        self.layer, self.dispatcher = layer, dispatcher

    def pieces(self) -> list[Piece]:
        return []

    def start_forward(self, inputs: Results, context: MicrobatchContext) -> Started:
        residual_TD, normed_TD, weights_TK = inputs.tensors
        assert normed_TD is not None
        arriving = self.dispatcher.dispatch(normed_TD, context.routes[self.layer], weights_TK, inputs.ready)
        return Started(arriving, (residual_TD, normed_TD))

    def finish_forward(self, started: Started, context: MicrobatchContext) -> tuple[Results, None]:
        rows_MD, weights_M = started.pending.tensors
        tensors = *started.rest, rows_MD, weights_M, context.routes[self.layer].offsets
        return Results(tensors, started.pending.ready), None

    def start_backward(self, record: None, grad_outputs: Results, context: MicrobatchContext) -> Started:
        dresidual_TD, dshared_TD, drows_MD, dweights_M, _ = grad_outputs.tensors
        assert drows_MD is not None
        route = context.routes.pop(self.layer)
        arriving = self.dispatcher.combine(drows_MD, route, dweights_M, dshared_TD, grad_outputs.ready)
        return Started(arriving, (dresidual_TD,))

    def finish_backward(self, started: Started, context: MicrobatchContext) -> Results:
        dnormed_TD, dweights_TK = started.pending.tensors
        return Results((*started.rest, dnormed_TD, dweights_TK), started.pending.ready)


class ExpertsPhase(ComputePhase):
    """The routed experts on the rows that came here, and the shared experts on this rank's own
    tokens."""

    layer: int

    def __init__(
        self, channel: ExpertsChannel, layer: int, local_experts: Sequence[int], tools: LayerTools
    ) -> None:
        super().__init__(f"layer{layer}.experts", layer)
        self.routed = RoutedExperts(channel, layer, local_experts, tools.backend.grouped, tools.allocator)
        self.shared = None
        if channel.shared is not None:
            tensors = channel.shared_tensors(layer)
            self.shared = FeedForward(channel.shared.kind, tensors, tools.allocator)

    def pieces(self) -> list[Piece]:
        return self.routed.pieces() + (self.shared.pieces() if self.shared else [])

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        residual_TD, normed_TD, rows_MD, weights_M, offsets_L = inputs
        saved = context.saved
        saved.name("expert_input", rows_MD)
        saved.name("routing", extras=(weights_M, offsets_L))
        rows_of_experts = context.routes[self.layer].rows_of_experts
        out_MD = self.routed(rows_MD, weights_M, offsets_L, rows_of_experts, slot, saved)
        partial_TD = self.shared(normed_TD, slot, saved).add_(residual_TD) if self.shared else residual_TD
        return partial_TD, out_MD


class CombinePhase(CommunicationPhase):
    """Rows back to their tokens and added up; backward copies every token's gradient to its
    rows."""

    def __init__(self, layer: int, dispatcher: Dispatcher) -> None:
        super().__init__(f"layer{layer}.combine")
        self.layer, self.dispatcher = layer, dispatcher

    def pieces(self) -> list[Piece]:
        return []

    def start_forward(self, inputs: Results, context: MicrobatchContext) -> Started:
        partial_TD, rows_MD = inputs.tensors
        assert rows_MD is not None
        route = context.routes[self.layer]
        return Started(self.dispatcher.combine(rows_MD, route, None, partial_TD, inputs.ready))

    def finish_forward(self, started: Started, context: MicrobatchContext) -> tuple[Results, None]:
        context.routes[self.layer].settle(context.saved)
        return started.pending, None

    def start_backward(self, record: None, grad_outputs: Results, context: MicrobatchContext) -> Started:
        (dx_TD,) = grad_outputs.tensors
        assert dx_TD is not None
        route = context.routes[self.layer]
        return Started(self.dispatcher.dispatch(dx_TD, route, None, grad_outputs.ready), (dx_TD,))

    def finish_backward(self, started: Started, context: MicrobatchContext) -> Results:
        (drows_MD,) = started.pending.tensors
        return Results((*started.rest, drows_MD), started.pending.ready)


class MlpPhase(ComputePhase):
    """A dense layer's norm, feed-forward and residual."""

    def __init__(self, block: Layer, channel: DenseChannel, layer: int, tools: LayerTools) -> None:
        super().__init__(f"layer{layer}.mlp", layer)
        self.eps = tools.model.rms_norm_eps
        self.norm = tools.allocator.whole(block.post_norm(layer))
        self.mlp = FeedForward(channel.mlp.kind, channel.tensors(layer), tools.allocator)

    def pieces(self) -> list[Piece]:
        return [self.norm, *self.mlp.pieces()]

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        (x_TD,) = inputs
        names = ("attention_residual", "post_norm_output")
        normed_TD = named_norm(context.saved, names, x_TD, self.norm.parameter, self.eps, slot)
        return (self.mlp(normed_TD, slot, context.saved).add_(x_TD),)
