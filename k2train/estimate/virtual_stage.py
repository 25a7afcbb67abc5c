"""Seconds and bytes of a virtual stage: its layers one after another, and what it sends and copies.

The result speaks of phases, seconds and bytes only; whoever has a schedule turns it into that room's costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from k2train.config.model import ModelConfig
from k2train.config.ops import DEFAULT_OPS, OpsConfig
from k2train.config.sections import ActivationsConfig, ClusterConfig, TrainConfig
from k2train.estimate.activations import SavedTensor, check_policies
from k2train.estimate.exchange import combine_seconds, dispatch_seconds, route_seconds
from k2train.estimate.layer_costs import (
    Exchange,
    LayerCosts,
    TimedPhase,
    embedding,
    head,
    put_off_transient,
    transformer_layer,
)
from k2train.estimate.layer_ops import Workload, workload
from k2train.estimate.traffic import Network, message_seconds
from k2train.estimate.work import Machine
from k2train.layout.layout import Layout, VirtualStage


@dataclass(frozen=True)
class VirtualStageEstimate:
    """One microbatch on one virtual stage, on one rank."""

    forward: tuple[TimedPhase, ...]
    backward_input: tuple[TimedPhase, ...]
    weight_grad_seconds: float
    message_seconds: float
    """Its output on the way to the next stage; the gradient on the way back takes as long."""
    offload_bytes: int
    offload_seconds: float
    device_bytes: int
    """Activations that stay on the device between forward and backward."""
    saved: tuple[SavedTensor, ...]
    """Of all its layers."""
    forward_transient_bytes: int
    backward_transient_bytes: int
    put_off_transient_bytes: int
    """The same where weight gradients are put off: what waits of layers that are done is there as well."""
    weight_queue_bytes: int
    forward_flops: float
    recompute_flops: float


@dataclass(frozen=True)
class Estimator:
    """What layers cost in one setting; `virtual_stage` adds them up. Built by `build_estimator`."""

    workload: Workload
    network: Network
    message_seconds: float
    embedding: LayerCosts
    dense: LayerCosts
    moe: LayerCosts
    head: LayerCosts

    def virtual_stage(self, piece: VirtualStage) -> VirtualStageEstimate:
        """The estimate of one piece of the model."""
        parts = self._parts(piece)
        saved = tuple(tensor for part in parts for tensor in part.saved)
        offload_bytes = sum(tensor.host_bytes for tensor in saved)
        return VirtualStageEstimate(
            forward=tuple(phase for part in parts for phase in part.forward),
            backward_input=tuple(phase for part in reversed(parts) for phase in part.backward_input),
            weight_grad_seconds=sum(part.weight_grad_seconds for part in parts),
            message_seconds=self.message_seconds,
            offload_bytes=offload_bytes,
            offload_seconds=self.network.host_copy(offload_bytes),
            device_bytes=sum(tensor.device_bytes for tensor in saved),
            saved=saved,
            forward_transient_bytes=max((part.forward_transient_bytes for part in parts), default=0),
            backward_transient_bytes=max((part.backward_transient_bytes for part in parts), default=0),
            put_off_transient_bytes=put_off_transient(
                (part.put_off_transient_bytes, part.left_bytes) for part in parts
            ),
            weight_queue_bytes=sum(part.weight_queue_bytes for part in parts),
            forward_flops=sum(part.forward_flops for part in parts),
            recompute_flops=sum(part.recompute_flops for part in parts),
        )

    def layer(self, layer: int) -> LayerCosts:
        """The costs of one transformer layer."""
        return self.moe if self.workload.model.is_moe(layer) else self.dense

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
    """Cost the layers of a model. Raises ConfigError for activation policies that cannot be carried out."""
    check_policies(policies)
    w = workload(model, train, layout.ep, layout.relay_ranks, ops, layout.dispatch == "deepep")
    machine = Machine(cluster, train.dtype)
    exchange = Exchange(
        route=route_seconds(w, layout, cluster),
        dispatch=dispatch_seconds(w, layout, cluster, weights=True),
        combine=combine_seconds(w, layout, cluster, weights=False),
        dispatch_back=combine_seconds(w, layout, cluster, weights=True),
        combine_back=dispatch_seconds(w, layout, cluster, weights=False),
        stream="ep" if layout.ep > 1 else "compute",
    )
    dense, moe = (transformer_layer(w, policies, machine, exchange, moe) for moe in (False, True))
    return Estimator(
        w,
        Network(cluster),
        message_seconds(w, layout, cluster),
        embedding(w, machine),
        dense,
        moe,
        head(w, machine, layout.dp),
    )
