"""Seconds on the wires: all-to-all, pipeline messages, data-parallel collectives, copies to and from the host.

Inside a node a device sends at the NVLink rate, between nodes through a network card of its own; traffic over the two
overlaps, so an exchange takes as long as the slower share. Latencies are counted once an exchange: its messages
start together. Congestion between different kinds of traffic is not modelled; the numbers on docs/plan.md say where
that matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from k2train.config.sections import ClusterConfig
from k2train.estimate.layer_ops import Workload, hit_probability
from k2train.layout.build import DEEPEP_NODE
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

        A ring moves (n - 1) / n of the buffer through every device. Rings through the same node leave it by different
        network cards, so with r ranks of the group on a node the network carries r times one card's rate.
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

    The group's ranks are `stride` apart. Groups that straddle a node boundary are judged by their worst rank.
    """
    if stride >= gpus_per_node:
        return 1
    span = stride * group_size
    worst = group_size
    for first in range(0, math.lcm(span, gpus_per_node), span):
        nodes = [(first + stride * index) // gpus_per_node for index in range(group_size)]
        worst = min(worst, *(nodes.count(node) for node in nodes))
    return worst


@dataclass(frozen=True)
class Hop:
    """Bytes one rank sends in one all-to-all under even routing; passed_on_bytes: read and written in memory before it, where
    what came by an earlier hop is copied for the ranks it goes to next."""

    intranode_bytes: float
    internode_bytes: float
    passed_on_bytes: float = 0.0


def dispatch_hops(w: Workload, layout: Layout) -> tuple[Hop, ...]:
    """What a dispatch sends, one all-to-all after the other, by `layout.dispatch`; a combine sends as much, the other way.

    per_expert: a row for every chosen expert, wherever it is. per_rank: one for every rank that holds a chosen expert.
    per_node and deepep: one to every other node that holds one, where it is passed on to those ranks over NVLink. The routing
    weights that travel with the rows (4 bytes a slot) are left out.
    """
    ep, local = w.ep, local_peers(w.ep, 1, layout.gpus_per_node)
    token = float(w.tokens * w.model.hidden_size * w.element_bytes)
    if layout.dispatch == "per_expert":
        copies = token * w.model.num_experts_per_tok / ep
        return (Hop(copies * (local - 1), copies * (ep - local)),)
    copies = token * hit_probability(w, 1)
    nodes = -(-ep // local)
    if layout.dispatch == "per_rank" or nodes == 1:
        return (Hop(copies * (local - 1), copies * (ep - local)),)
    between = Hop(0.0, token * hit_probability(w, local) * (nodes - 1))
    return between, Hop(copies * (local - 1) * nodes, 0.0, 2 * copies * local * nodes)


def all_to_all_seconds(w: Workload, layout: Layout, cluster: ClusterConfig) -> float:
    """One dispatch or one combine."""
    if w.ep == 1:
        return 0.0
    if layout.dispatch == "deepep":
        return _deepep_seconds(w, cluster)
    network = Network(cluster)
    memory = cluster.memory_bytes_per_second * cluster.memory_efficiency
    parts = layout.relay_parts
    seconds = [
        network.exchange(hop.intranode_bytes / parts, hop.internode_bytes / parts)
        + hop.passed_on_bytes / parts / memory
        for hop in dispatch_hops(w, layout)
    ]
    # The hops of a part follow each other; those of different parts go over different wires.
    return sum(seconds) + (parts - 1) * max(seconds)


DEEPEP_BYTES_PER_SECOND = {16: 43.0e9, 32: 57.0e9, 64: 50.0e9}
"""What DeepEP's kernels reach between nodes by the size of the group, counting a token once for every node it goes to, its
own among them: measured by its authors on H800 with a 400 Gb/s card for each GPU, 4096 tokens of 7168 numbers, 8 experts
a token (docs/legacy.md of github.com/deepseek-ai/DeepEP; the slower of dispatch and combine). Version 2 reports 81 to 90
for 16 ranks."""
DEEPEP_NODE_BYTES_PER_SECOND = 153.0e9
"""The same inside a node of 8, over H800's NVLink."""


def _deepep_seconds(w: Workload, cluster: ClusterConfig) -> float:
    """Both wires at once: the slower of the two shares, at the published rates, which a slower cluster cannot reach."""
    token = float(w.tokens * w.model.hidden_size * w.element_bytes)
    rows = token * w.ep * hit_probability(w, 1)
    network = Network(cluster)
    inside = rows / min(DEEPEP_NODE_BYTES_PER_SECOND, network.intranode)
    if w.ep <= DEEPEP_NODE:
        return inside + cluster.intranode_latency_seconds
    # The nearest size measured that is not smaller, or the largest.
    size = next(
        (size for size in sorted(DEEPEP_BYTES_PER_SECOND) if size >= w.ep), max(DEEPEP_BYTES_PER_SECOND)
    )
    nodes = w.ep // DEEPEP_NODE
    crossing = token * nodes * hit_probability(w, DEEPEP_NODE)
    # The published rate counts the sender's own node, which the card does not see.
    rate = min(DEEPEP_BYTES_PER_SECOND[size], network.internode * nodes / (nodes - 1))
    return max(inside, crossing / rate) + cluster.internode_latency_seconds


ROUTE_OPERATIONS = {"local": 10, "per_expert": 29, "per_rank": 60, "per_node": 97, "deepep": 12}
"""Operations that a route issues, each a small kernel or a few, from the choices to the tables. tests/parallel/
test_route_costs.py counts them, but DeepEP's kernel."""


def route_seconds(w: Workload, layout: Layout, cluster: ClusterConfig) -> float:
    """From the router's choices until the first all-to-all of rows can start: what the ranks tell each other, the
    operations that count and build tables, and the host's wait for the counts between them.

    A forward alone stands still for all of it. In a pair the other half computes meanwhile, as it was issued before
    the host waited.
    """
    kind = layout.dispatch if w.ep > 1 else "local"
    operations = ROUTE_OPERATIONS[kind] * cluster.kernel_latency_seconds
    return _told(w, layout, cluster) + operations + cluster.host_read_seconds


def _told(w: Workload, layout: Layout, cluster: ClusterConfig) -> float:
    """What every rank sends to every other before the rows: its counts for their experts (8 bytes each), or, where
    tokens are passed on, all its choices (4 bytes each)."""
    local = local_peers(w.ep, 1, layout.gpus_per_node)
    if layout.dispatch == "deepep":  # inside the kernel
        return 0.0
    to_each = 8.0 * w.model.n_routed_experts / w.ep if layout.dispatch == "per_expert" else 4.0 * w.rows
    return Network(cluster).exchange(to_each * (local - 1), to_each * (w.ep - local))


def message_seconds(w: Workload, layout: Layout, cluster: ClusterConfig) -> float:
    """A microbatch's activations, or their gradient, from a stage to its neighbour, the slowest rank's."""
    num_bytes = float(w.tokens * w.model.hidden_size * w.element_bytes)
    if layout.pp == 1:
        return 0.0
    inside = layout.world <= layout.gpus_per_node
    return Network(cluster).exchange(num_bytes if inside else 0.0, 0.0 if inside else num_bytes)
