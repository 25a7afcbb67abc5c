"""Seconds on the wires: pipeline messages, data-parallel collectives, copies to and from the host;
`exchange` has the all-to-all.

Inside a node a device sends at the NVLink rate, between nodes through a network card of its own;
traffic over the two overlaps, so an exchange takes as long as the slower share. Latencies are
counted once an exchange: its messages start together. Congestion between different kinds of traffic
is not modelled; the numbers on docs/plan.md say where that matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from k2train.architecture.work import Workload
from k2train.config.sections import ClusterConfig
from k2train.layout.layout import Layout


@dataclass(frozen=True)
class Network:
    """Achieved rates of one device, in bytes a second and one direction."""

    cluster: ClusterConfig

    @property
    def intranode(self) -> float:
        return self.cluster.intranode_bytes_per_second * self.cluster.intranode_efficiency

    @property
    def internode(self) -> float:
        return self.cluster.internode_bytes_per_second * self.cluster.internode_efficiency

    def exchange(self, intranode_bytes: float, internode_bytes: float) -> float:
        """Seconds until a device has sent so much to its own node and so much to others."""
        if not intranode_bytes and not internode_bytes:
            return 0.0
        latency = (
            self.cluster.internode_latency_seconds
            if internode_bytes
            else self.cluster.intranode_latency_seconds
        )
        return max(intranode_bytes / self.intranode, internode_bytes / self.internode) + latency

    def host_copy(self, num_bytes: float) -> float:
        """Seconds to copy to or from pinned host memory."""
        rate = self.cluster.host_link_bytes_per_second * self.cluster.host_link_efficiency
        return num_bytes / rate + self.cluster.kernel_latency_seconds if num_bytes else 0.0

    def ring(self, num_bytes: float, group_size: int, ranks_per_node: int) -> float:
        """Seconds of a reduce-scatter or an all-gather of a buffer of `num_bytes` over a group.

        A ring moves (n - 1) / n of the buffer through every device. Rings through the same node
        leave it by different network cards, so with r ranks of the group on a node the network
        carries r times one card's rate.
        """
        if group_size == 1 or not num_bytes:
            return 0.0
        moved = num_bytes * (group_size - 1) / group_size
        if ranks_per_node >= group_size:
            rate, latency = self.intranode, self.cluster.intranode_latency_seconds
        else:
            rate, latency = ranks_per_node * self.internode, self.cluster.internode_latency_seconds
            rate = min(rate, self.intranode) if ranks_per_node > 1 else rate
        # Latency grows with the logarithm: NCCL uses trees where latency would dominate a ring.
        return moved / rate + latency * math.ceil(math.log2(group_size))


def local_peers(group_size: int, stride: int, gpus_per_node: int) -> int:
    """How many ranks of a group stand on one node, the rank itself among them, at the least.

    The group's ranks are `stride` apart. Groups that straddle a node boundary are judged by their
    worst rank.
    """
    if stride >= gpus_per_node:
        return 1
    span = stride * group_size
    worst = group_size
    for first in range(0, math.lcm(span, gpus_per_node), span):
        nodes = [(first + stride * index) // gpus_per_node for index in range(group_size)]
        worst = min(worst, *(nodes.count(node) for node in nodes))
    return worst


def message_seconds(w: Workload, layout: Layout, cluster: ClusterConfig) -> float:
    """A microbatch's activations, or their gradient, from a stage to its neighbour, the slowest
    rank's."""
    num_bytes = float(w.tokens * w.model.hidden_size * w.element_bytes)
    if layout.pp == 1:
        return 0.0
    inside = layout.world <= layout.gpus_per_node
    return Network(cluster).exchange(num_bytes if inside else 0.0, 0.0 if inside else num_bytes)
