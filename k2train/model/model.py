"""A virtual stage's part of the model: its phases in order, its named pieces, and the simple
one-rank path through it.

Letters: B sequences, S positions, T = B x S tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from k2train.architecture.layer import layer_kind, layer_of
from k2train.architecture.mixture_of_experts import ExpertsChannel
from k2train.config.model import ModelConfig
from k2train.device.build import build_device
from k2train.model.attention import LayerTools, Rotary
from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import Dispatcher, LocalDispatcher
from k2train.model.ends import EmbeddingPhase, HeadPhase
from k2train.model.init import initialise
from k2train.model.layers import (
    AttentionPhase,
    CombinePhase,
    DispatchPhase,
    ExpertsPhase,
    MlpPhase,
    RoutedAttentionPhase,
    RoutePhase,
)
from k2train.model.phase import Grads, Tensors
from k2train.model.pieces import Allocator, ModelPart, Piece
from k2train.model.routing import Router, update_correction_bias
from k2train.ops.attention_tiles import AttentionScratch
from k2train.ops.backend import OpsBackend

AnyPhase = (
    AttentionPhase
    | RoutePhase
    | DispatchPhase
    | ExpertsPhase
    | CombinePhase
    | MlpPhase
    | EmbeddingPhase
    | HeadPhase
)


class Model:
    """The phases of one ModelPart. Inputs of the first are tokens, or the x_TD another virtual
    stage sent."""

    def __init__(self, config: ModelConfig, part: ModelPart, phases: list[AnyPhase]) -> None:
        self.config, self.part, self.phases = config, part, phases

    def pieces(self) -> Iterator[Piece]:
        """Every named tensor held here, once."""
        for phase in self.phases:
            yield from phase.pieces()

    def routers(self) -> dict[int, Router]:
        """The routers of the MoE layers held here, by layer."""
        return {p.layer: p.router for p in self.phases if isinstance(p, RoutedAttentionPhase)}

    def initialise(self, seed: int) -> None:
        """Set the initial weights: a function of the seed and each tensor's name alone."""
        initialise(self.pieces(), seed, self.config.initializer_range)

    def update_correction_biases(self, loads: Mapping[int, torch.Tensor], rate: float) -> None:
        """Apply update_correction_bias to every layer held here; `loads` are a step's counts over
        all ranks."""
        for layer, router in self.routers().items():
            update_correction_bias(router.bias, loads[layer], rate)


def build_model(
    config: ModelConfig,
    part: ModelPart,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    dispatcher: Dispatcher | None = None,
    backend: OpsBackend | None = None,
) -> Model:
    """The phases of `part` with empty parameters; `Model.initialise` or a checkpoint fills them.

    backend: whose kernels compute; None for stock operations.
    """
    backend = backend or OpsBackend()
    allocator = Allocator(dtype, torch.device(device))
    tools = LayerTools(config, Rotary(config, allocator), AttentionScratch(), backend, allocator)
    exchange: Dispatcher = dispatcher or LocalDispatcher(build_device(torch.device(device)))
    phases: list[AnyPhase] = [EmbeddingPhase(config, allocator)] if part.embedding else []
    for layer in part.layers:
        block = layer_of(config, layer_kind(config, layer))
        if isinstance(block.channel, ExpertsChannel):
            phases += [
                RoutedAttentionPhase(block, block.channel, layer, tools),
                RoutePhase(layer, exchange),
                DispatchPhase(layer, exchange),
                ExpertsPhase(block.channel, layer, part.local_experts, tools),
                CombinePhase(layer, exchange),
            ]
        else:
            phases += [
                AttentionPhase(block, layer, tools),
                MlpPhase(block, block.channel, layer, tools),
            ]
    if part.head:
        phases.append(HeadPhase(config, allocator))
    return Model(config, part, phases)


def forward(model: Model, inputs: Tensors, context: MicrobatchContext) -> tuple[Tensors, list[Any]]:
    """All phases of the model forward; the outputs of the last and every phase's record."""
    records = []
    for phase in model.phases:
        inputs, record = phase.forward(inputs, context)
        records.append(record)
    context.saved.forward_done()
    return inputs, records


def backward(model: Model, records: list[Any], grads: Grads, context: MicrobatchContext) -> Grads:
    """All phases backward, last first; consumes the records and returns the gradients of the first
    phase's inputs."""
    for phase in reversed(model.phases):
        grads = phase.backward(records.pop(), grads, context)
    return grads


def forward_loss(model: Model, tokens_BS: torch.Tensor, context: MicrobatchContext) -> torch.Tensor:
    """The loss of one microbatch without gradients: context.loss_scale times the summed token
    losses."""
    (loss,), _ = forward(model, (tokens_BS,), context)
    return loss


def forward_backward(model: Model, tokens_BS: torch.Tensor, context: MicrobatchContext) -> torch.Tensor:
    """One microbatch forward and backward on one rank; gradients go to the context's sink (or
    queue); the loss."""
    (loss,), records = forward(model, (tokens_BS,), context)
    backward(model, records, (None,), context)
    return loss


def logits(model: Model, tokens_BS: torch.Tensor) -> torch.Tensor:
    """The whole model's logits (B, S, V) without gradients."""
    context = MicrobatchContext(num_sequences=tokens_BS.shape[0])
    inputs: Tensors = (tokens_BS,)
    *body, head = model.phases
    assert isinstance(head, HeadPhase)
    with torch.no_grad():
        for phase in body:
            inputs, _ = phase.forward(inputs, context)
        return head.logits(inputs[0]).unflatten(0, tokens_BS.shape)
