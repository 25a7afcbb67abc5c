"""Costs of a virtual stage: its layers one after another, and what it sends and copies.

The result is what the simulator takes (`schedule.costs`), seconds and bytes of one microbatch on
one rank. A piece without layers passes its input on in no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k2train.architecture.layer import LayerKind, layer_kind, layer_kinds
from k2train.architecture.microbatch import workload
from k2train.architecture.work import Workload
from k2train.config.model import ModelConfig
from k2train.config.ops import DEFAULT_OPS, OpsConfig
from k2train.config.sections import ActivationsConfig, ClusterConfig, TrainConfig
from k2train.estimate.activations import check_policies
from k2train.estimate.exchange import combine_seconds, dispatch_seconds, route_seconds
from k2train.estimate.layer_costs import (
    Exchange,
    LayerCosts,
    embedding,
    head,
    put_off_transient,
    transformer_layer,
)
from k2train.estimate.traffic import Network, message_seconds
from k2train.estimate.work import Machine
from k2train.layout.layout import Layout, VirtualStage
from k2train.schedule.costs import Phase, Stream, VirtualStageCosts

PASS_ON = (Phase("pass on", Stream.COMPUTE, 0.0),)
"""The phases of a piece that has none."""


@dataclass(frozen=True)
class Estimator:
    """What layers cost in one setting; `virtual_stage` adds them up. Built by `build_estimator`."""

    workload: Workload
    network: Network
    message_seconds: float
    embedding: LayerCosts
    layers: Mapping[LayerKind, LayerCosts]
    """Of every kind of layer that the model has, MoE first."""
    head: LayerCosts

    def virtual_stage(self, piece: VirtualStage, put_off: bool = False) -> VirtualStageCosts:
        """The costs of one piece of the model. put_off: whether weight gradients are."""
        parts = self._parts(piece)
        saved = [tensor for part in parts for tensor in part.saved]
        offload_bytes = sum(tensor.host_bytes for tensor in saved)
        copy_seconds = self.network.host_copy(offload_bytes)
        return VirtualStageCosts(
            forward=tuple(phase for part in parts for phase in part.forward) or PASS_ON,
            backward_input=tuple(phase for part in reversed(parts) for phase in part.backward_input)
            or PASS_ON,
            weight_grad_seconds=sum(part.weight_grad_seconds for part in parts),
            send_forward_seconds=self.message_seconds,
            send_backward_seconds=self.message_seconds,
            offload_seconds=copy_seconds,
            reload_seconds=copy_seconds,
            offload_bytes=offload_bytes,
            activation_bytes=sum(tensor.device_bytes for tensor in saved),
            forward_transient_bytes=max((part.forward_transient_bytes for part in parts), default=0),
            backward_transient_bytes=put_off_transient(
                (part.put_off_transient_bytes, part.left_bytes) for part in parts
            )
            if put_off
            else max((part.backward_transient_bytes for part in parts), default=0),
            weight_queue_bytes=sum(part.weight_queue_bytes for part in parts),
        )

    def forward_flops(self, piece: VirtualStage) -> float:
        """FLOPs of one microbatch forward, without recomputation."""
        return sum(part.forward_flops for part in self._parts(piece))

    def recompute_flops(self, piece: VirtualStage) -> float:
        """FLOPs that one microbatch's backward spends on what was not kept."""
        return sum(part.recompute_flops for part in self._parts(piece))

    def layer(self, layer: int) -> LayerCosts:
        """The costs of one transformer layer."""
        return self.layers[layer_kind(self.workload.model, layer)]

    def _parts(self, piece: VirtualStage) -> Sequence[LayerCosts]:
        parts = [self.embedding] if piece.embedding else []
        parts += [self.layer(layer) for layer in piece.layers]
        return [*parts, self.head] if piece.head else parts


def build_estimator(
    model: ModelConfig,
    train: TrainConfig,
    policies: ActivationsConfig,
    layout: Layout,
    cluster: ClusterConfig,
    ops: OpsConfig = DEFAULT_OPS,
) -> Estimator:
    """Cost the layers of a model. Raises ConfigError for activation policies that cannot be carried
    out."""
    check_policies(policies)
    w = workload(model, train, layout.ep, layout.relay_ranks, ops, layout.dispatch == "deepep")
    machine = Machine(cluster, train.dtype)
    exchange = Exchange(
        route=route_seconds(w, layout, cluster),
        dispatch=dispatch_seconds(w, layout, cluster, weights=True),
        combine=combine_seconds(w, layout, cluster, weights=False),
        dispatch_back=combine_seconds(w, layout, cluster, weights=True),
        combine_back=dispatch_seconds(w, layout, cluster, weights=False),
        stream=Stream.EP if layout.ep > 1 else Stream.COMPUTE,
    )
    layers = {
        kind: transformer_layer(w, policies, machine, exchange, kind) for kind in reversed(layer_kinds(model))
    }
    return Estimator(
        w,
        Network(cluster),
        message_seconds(w, layout, cluster),
        embedding(w, machine),
        layers,
        head(w, machine, layout.dp),
    )
