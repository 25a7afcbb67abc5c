"""A layer: input norm, mixer, residual, post norm, channel, residual; and which layers are which.

This file alone says whether a layer is dense or a mixture of experts, and which mixer a config has.

    MoE layer     attention, with router (compute) | dispatch | experts (compute) | combine
    dense layer   attention (compute) | mlp (compute)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from k2train.architecture.feed_forward import DenseChannel
from k2train.architecture.grouped_query import GroupedQueryMixer
from k2train.architecture.heads import ClipRows, Heads
from k2train.architecture.latent_attention import LatentMixer
from k2train.architecture.mixture_of_experts import NOT_REBUILDABLE as EXPERTS_NOT_REBUILDABLE
from k2train.architecture.mixture_of_experts import ExpertsChannel
from k2train.architecture.tensors import TensorSpec, layer_prefix
from k2train.architecture.work import Op, Saved, Workload, elementwise, norm
from k2train.config.model import ModelConfig

LayerKind = Literal["dense", "moe"]
KIND_WORDS: Mapping[LayerKind, str] = {"dense": "dense layer", "moe": "MoE layer"}
"""The kinds of layer, for people."""
NOT_REBUILDABLE = {
    "layer_input": "it comes from the previous layer or stage",
    **EXPERTS_NOT_REBUILDABLE,
}
"""Activations that are not recomputed, and why."""


class Mixer(Protocol):
    """Mixes positions: from the normed input to what is added to the residual stream."""

    @property
    def heads(self) -> Heads: ...

    def tensors(self, layer: int) -> Iterator[TensorSpec]:
        """Of one layer, named `model.layers.N.self_attn.NAME.weight`."""
        ...

    def ops(self, w: Workload) -> list[Op]:
        """Forward, in order, in the layer's attention phase."""
        ...

    def saved(self, w: Workload) -> dict[str, Saved]:
        """What is kept until the backward, by the names of `ActivationsConfig`."""
        ...

    @property
    def clipped(self) -> Mapping[str, tuple[ClipRows, ...]]:
        """By NAME, the rows of one head in every projection that QK-Clip touches."""
        ...

    def narrowed(self, model: ModelConfig, divisor: int) -> ModelConfig:
        """The config with latents and number of heads divided, at least 1 each."""
        ...


@dataclass(frozen=True)
class Layer:
    """One layer of a kind."""

    kind: LayerKind
    hidden: int
    mixer: Mixer
    channel: DenseChannel | ExpertsChannel

    def input_norm(self, layer: int) -> TensorSpec:
        """The norm before the mixer."""
        return TensorSpec(f"{layer_prefix(layer)}.input_layernorm.weight", (self.hidden,), "norm", layer)

    def post_norm(self, layer: int) -> TensorSpec:
        """The norm before the channel."""
        name = f"{layer_prefix(layer)}.post_attention_layernorm.weight"
        return TensorSpec(name, (self.hidden,), "norm", layer)

    def tensors(self, layer: int, experts: Iterable[int] | None = None) -> Iterator[TensorSpec]:
        """Of layer `layer`, counted from 0; of its routed experts only `experts`, None for all."""
        yield self.input_norm(layer)
        yield from self.mixer.tensors(layer)
        yield self.post_norm(layer)
        yield from self.channel.tensors(layer, experts)

    def phases(self, w: Workload) -> list[tuple[str, list[Op]]]:
        """The compute phases forward, each with its operations."""
        return [("attention", self.attention_ops(w)), (self.channel.phase, self.channel.ops(w))]

    def attention_ops(self, w: Workload) -> list[Op]:
        """Norm, mixer, residual, norm; in a MoE layer also the router."""
        return [
            norm(w, "input_norm", self.hidden, "input_norm_output"),
            *self.mixer.ops(w),
            elementwise(w, "residual", 3 * w.tokens * self.hidden, "attention_residual"),
            norm(w, "post_norm", self.hidden, "post_norm_output"),
            *self.channel.attention_ops(w),
        ]

    def saved(self, w: Workload) -> dict[str, Saved]:
        """What is kept until the backward; a norm's inverse RMS goes with its input."""
        stream = ((w.tokens, self.hidden),)
        return {
            "layer_input": Saved(stream, w.norm_statistics),
            "input_norm_output": Saved(stream),
            **self.mixer.saved(w),
            "attention_residual": Saved(stream, w.norm_statistics),
            "post_norm_output": Saved(stream),
            **self.channel.saved(w),
        }

    def saved_in(self, w: Workload, phase: str) -> frozenset[str]:
        """The names of what a phase's backward reads; the channel's input is of both phases."""
        channel = frozenset(self.channel.saved(w))
        if phase == self.channel.phase:
            return channel | {"post_norm_output"}
        return frozenset(self.saved(w)) - channel

    def gradient_numbers(self, w: Workload, phase: str) -> int:
        """Numbers of gradients alive at once in a phase's backward."""
        if phase == self.channel.phase:
            return self.channel.gradient_numbers(w)
        return w.tokens * (2 * self.hidden + self.mixer.heads.gradient_numbers)


def mixer_of(model: ModelConfig) -> Mixer:
    """The mixer, alike in all layers."""
    return GroupedQueryMixer.of(model) if model.mixer == "grouped_query" else LatentMixer.of(model)


def layer_of(model: ModelConfig, kind: LayerKind) -> Layer:
    """A layer of one kind."""
    channel = ExpertsChannel.of(model) if kind == "moe" else DenseChannel.of(model)
    return Layer(kind, model.hidden_size, mixer_of(model), channel)


def layer_kind(model: ModelConfig, layer: int) -> LayerKind:
    """Whether layer `layer`, counted from 0, is dense or routes to experts."""
    return "moe" if layer >= model.first_k_dense_replace else "dense"


def layer_kinds(model: ModelConfig) -> tuple[LayerKind, ...]:
    """The kinds of layer that a model has, dense first."""
    return tuple(dict.fromkeys(layer_kind(model, layer) for layer in range(model.num_hidden_layers)))


def moe_layers(model: ModelConfig) -> tuple[int, ...]:
    """The layers that route to experts."""
    return tuple(n for n in range(model.num_hidden_layers) if layer_kind(model, n) == "moe")
