"""Seconds of an exchange of tokens: from their ranks to their experts' and back, on the wires and
in memory.

A token's copies are picked from its rows before a hop and added up after the way back; at the
experts, rows are put in order of expert. All of it runs on the exchange's own stream, beside the
main one, and is charged there; without expert parallelism it runs on the main stream. The four
moves of a layer differ by what travels with the rows: weights go to the experts in the forward,
their gradients come back in the backward.

t: bytes of this rank's tokens. r: bytes of the rows at its experts. Routing is taken as even.
"""

from __future__ import annotations

from dataclasses import dataclass

from k2train.architecture.routing_tables import DEEPEP_NODE, hit_probability
from k2train.architecture.work import Workload
from k2train.config.sections import ClusterConfig
from k2train.estimate.traffic import Network, local_peers
from k2train.layout.layout import Layout


@dataclass(frozen=True)
class Hop:
    """One all-to-all. Bytes one rank sends under even routing; rows: what copies are picked from;
    copies: all that it picks, its own among them."""

    intranode_bytes: float
    internode_bytes: float
    rows: float
    copies: float


def token_bytes(w: Workload) -> float:
    """t."""
    return float(w.tokens * w.model.hidden_size * w.element_bytes)


def dispatch_hops(w: Workload, layout: Layout) -> tuple[Hop, ...]:
    """What a dispatch sends, one all-to-all after the other, by `layout.dispatch`; a combine sends
    as much, the other way.

    per_expert: a row for every chosen expert, wherever it is. per_rank: one for every rank that
    holds a chosen expert. per_node and deepep: one to every other node that holds one, where it is
    passed on to those ranks over NVLink. The routing weights that travel with the rows (4 bytes a
    slot) are left out.
    """
    ep, local, token = w.ep, local_peers(w.ep, 1, layout.gpus_per_node), token_bytes(w)
    each = token * (
        w.model.num_experts_per_tok / ep if layout.dispatch == "per_expert" else hit_probability(w, 1)
    )
    nodes = -(-ep // local)
    if layout.dispatch in ("per_expert", "per_rank") or nodes == 1:
        return (Hop(each * (local - 1), each * (ep - local), token, each * ep),)
    crossing = token * hit_probability(w, local)
    return (
        Hop(0.0, crossing * (nodes - 1), token, crossing * nodes),
        Hop(each * (local - 1) * nodes, 0.0, crossing * nodes, each * ep),
    )


def dispatch_seconds(w: Workload, layout: Layout, cluster: ClusterConfig, weights: bool) -> float:
    """Tokens to their experts' rows. weights: with the routing weights, so that rows are packed."""
    token, rows = token_bytes(w), w.model.num_experts_per_tok * token_bytes(w)
    if w.ep == 1:
        return _memory(2 * rows, cluster)
    packed = 2 * (rows if layout.dispatch == "per_expert" else token) if weights else 0.0
    if layout.dispatch == "deepep":
        return _deepep_seconds(w, cluster) + _memory(2 * rows, cluster)
    wires = _hops_seconds(w, layout, cluster, [2 * hop.copies for hop in dispatch_hops(w, layout)])
    return wires + _memory(packed + 2 * rows, cluster)


def combine_seconds(w: Workload, layout: Layout, cluster: ClusterConfig, weights: bool) -> float:
    """Rows back to the sums of each token's, added to the residual stream. weights: with their
    gradients."""
    token, rows = token_bytes(w), w.model.num_experts_per_tok * token_bytes(w)
    added = 3 * token
    if w.ep == 1:
        return _memory(rows + token + added, cluster)
    if layout.dispatch == "deepep":
        return _deepep_seconds(w, cluster) + _memory(2 * rows + added, cluster)
    hops = dispatch_hops(w, layout)
    packed = 2 * sum(hop.copies for hop in hops) if weights else 0.0
    joined = 2 * token if layout.relay_parts > 1 else 0.0
    wires = _hops_seconds(w, layout, cluster, [hop.copies + hop.rows for hop in hops])
    return wires + _memory(rows + hops[-1].copies + packed + joined + added, cluster)


def _hops_seconds(w: Workload, layout: Layout, cluster: ClusterConfig, memory_bytes: list[float]) -> float:
    """The hops of an exchange with what each moves in memory. Those of a part follow each other;
    those of different parts go over different wires."""
    network, parts = Network(cluster), layout.relay_parts
    seconds = [
        network.exchange(hop.intranode_bytes / parts, hop.internode_bytes / parts)
        + _memory(moved / parts, cluster)
        for hop, moved in zip(dispatch_hops(w, layout), memory_bytes, strict=True)
    ]
    return sum(seconds) + (parts - 1) * max(seconds)


def _memory(num_bytes: float, cluster: ClusterConfig) -> float:
    return num_bytes / (cluster.memory_bytes_per_second * cluster.memory_efficiency)


DEEPEP_BYTES_PER_SECOND = {16: 43.0e9, 32: 57.0e9, 64: 50.0e9}
"""What DeepEP's kernels reach between nodes by the size of the group, counting a token once for
every node it goes to, its own among them: measured by its authors on H800 with a 400 Gb/s card for
each GPU, 4096 tokens of 7168 numbers, 8 experts a token (the legacy page of
github.com/deepseek-ai/DeepEP; the slower of dispatch and combine). Version 2 reports 81 to 90 for
16 ranks."""
DEEPEP_NODE_BYTES_PER_SECOND = 153.0e9
"""The same inside a node of 8, over H800's NVLink."""


def _deepep_seconds(w: Workload, cluster: ClusterConfig) -> float:
    """Both wires at once: the slower of the two shares, at the published rates, which a slower
    cluster cannot reach."""
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


ROUTE_OPERATIONS = {"local": 10, "per_expert": 29, "per_rank": 59, "per_node": 96, "deepep": 12}
"""Operations that a route issues, each a small kernel or a few, from the choices to the tables.
tests/parallel/ test_route_costs.py counts them, but DeepEP's kernel."""


def route_seconds(w: Workload, layout: Layout, cluster: ClusterConfig) -> float:
    """From the router's choices until the first all-to-all of rows can start: what the ranks tell
    each other, the operations that count and build tables, and the host's wait for the counts
    between them.

    A forward alone stands still for all of it. In a pair the other half computes meanwhile, as it
    was issued before the host waited.
    """
    kind = layout.dispatch if w.ep > 1 else "local"
    operations = ROUTE_OPERATIONS[kind] * cluster.kernel_latency_seconds
    return _told(w, layout, cluster) + operations + cluster.host_read_seconds


def _told(w: Workload, layout: Layout, cluster: ClusterConfig) -> float:
    """What every rank sends to every other before the rows: its counts for their experts (8 bytes
    each), or, where tokens are passed on, all its choices (4 bytes each)."""
    local = local_peers(w.ep, 1, layout.gpus_per_node)
    if layout.dispatch == "deepep":  # inside the kernel
        return 0.0
    to_each = 8.0 * w.model.n_routed_experts / w.ep if layout.dispatch == "per_expert" else 4.0 * w.rows
    return Network(cluster).exchange(to_each * (local - 1), to_each * (w.ep - local))
