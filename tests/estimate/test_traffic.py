"""Traffic against exact enumeration of routings, and times against bytes over bandwidth."""

import dataclasses
import itertools

import pytest

from k2train.estimate.layer_ops import hit_probability, workload
from k2train.estimate.traffic import (
    ROUTE_OPERATIONS,
    Network,
    all_to_all_seconds,
    dispatch_hops,
    local_peers,
    message_seconds,
    route_seconds,
)


@pytest.mark.parametrize(("size", "stride", "gpus", "expected"), [
    (16, 1, 8, 8),  # K2: one expert group on two nodes
    (8, 1, 8, 8),
    (4, 1, 8, 4),
    (4, 16, 8, 1),  # replicas of an expert, each on nodes of its own
    (2, 4, 8, 2),
    (4, 4, 8, 2),
    (3, 1, 8, 1),  # groups 0-2, 3-5, 6-8: the third straddles
    (1, 1, 8, 1),
])  # fmt: skip
def test_local_peers_counts_the_worst_rank(size, stride, gpus, expected):
    assert local_peers(size, stride, gpus) == expected


@pytest.mark.parametrize("copies", ["per_expert", "per_rank", "per_node"])
@pytest.mark.parametrize(("ep", "gpus"), [(2, 4), (4, 4), (4, 2), (6, 2)])
def test_expected_copies_equal_the_mean_over_all_choices(
    model, train, make_layout, cluster, copies, ep, gpus
):
    small = dataclasses.replace(model, n_routed_experts=12, num_experts_per_tok=3)
    cluster = dataclasses.replace(cluster, gpus_per_node=gpus)
    layout = make_layout(cluster, ep=ep, pp=1, dispatch=copies)
    w = workload(small, train, ep)
    near, far, choices = 0.0, 0.0, list(itertools.combinations(range(12), 3))
    for chosen in choices:
        ranks = [expert // (12 // ep) for expert in chosen]
        # Every rank of the first node in turn is the sender, so that the sender's own share averages out.
        local = min(ep, gpus)
        for sender in range(local):
            if copies != "per_expert":
                ranks = sorted(set(ranks))
            inside = [rank for rank in ranks if rank // gpus == 0 and rank != sender]
            outside = [rank for rank in ranks if rank // gpus != 0]
            near += len(inside) / local
            if copies == "per_node":
                far += len({rank // gpus for rank in outside}) / local
                near += len(outside) * (local - 1) / local / local
            else:
                far += len(outside) / local
    token = w.tokens * model.hidden_size * 2
    hops = dispatch_hops(w, layout)
    assert sum(hop.intranode_bytes for hop in hops) == pytest.approx(token * near / len(choices))
    assert sum(hop.internode_bytes for hop in hops) == pytest.approx(token * far / len(choices))
    assert len(hops) == (2 if copies == "per_node" and ep > gpus else 1)


def test_hit_probability_is_certain_for_all_ranks_and_nothing_for_none(model, train):
    w = workload(model, train, 4)
    assert hit_probability(w, 4) == 1.0
    assert hit_probability(w, 0) == 0.0


def test_the_slower_share_decides_an_exchange(cluster):
    network = Network(cluster)
    assert network.exchange(1e11, 1e9) == 1.0
    assert network.exchange(1e9, 2.5e10) == 1.0
    assert network.exchange(0.0, 0.0) == 0.0


def test_all_to_all_inside_a_node_never_touches_the_network(model, train, make_layout, cluster):
    slow = dataclasses.replace(cluster, internode_bytes_per_second=1.0)
    w = workload(model, train, 4)
    assert (
        all_to_all_seconds(w, make_layout(slow, ep=4), slow)
        == all_to_all_seconds(w, make_layout(ep=4), cluster)
        > 0
    )
    assert all_to_all_seconds(workload(model, train, 1), make_layout(), cluster) == 0.0


def test_copying_per_node_sends_less_than_per_rank_and_that_less_than_per_expert(model, train, make_layout):
    w = workload(model, train, 8)
    far = [
        sum(hop.internode_bytes for hop in dispatch_hops(w, make_layout(ep=8, dispatch=copies)))
        for copies in ("per_node", "per_rank", "per_expert")
    ]
    assert far == sorted(far)
    assert len(set(far)) == 3


def test_a_pipeline_message_crosses_nodes_as_soon_as_the_world_does(model, train, make_layout, cluster):
    w = workload(model, train, 2)
    num_bytes = 1024 * 256 * 2
    assert message_seconds(w, make_layout(pp=2, ep=2), cluster) == num_bytes / 1e11
    assert message_seconds(w, make_layout(pp=4, ep=2), cluster) == num_bytes / 2.5e10
    assert message_seconds(w, make_layout(pp=1, ep=2), cluster) == 0.0


@pytest.mark.parametrize(("size", "near", "rate"), [(4, 4, 1e11), (8, 4, 1e11), (8, 2, 5e10), (8, 1, 2.5e10)])
def test_ring_moves_all_but_one_share_at_the_rate_of_its_narrowest_link(cluster, size, near, rate):
    assert Network(cluster).ring(8e9, size, near) == pytest.approx(8e9 * (size - 1) / size / rate)
    assert Network(cluster).ring(8e9, 1, 1) == 0.0


def test_a_route_costs_what_ranks_tell_each_other_its_kernels_and_the_hosts_wait(
    model, train, make_layout, cluster
):
    """Rates without latency: choices of 4 bytes to each of 3 neighbours over NVLink, and two constants."""
    w = workload(model, train, 4)
    slow = dataclasses.replace(cluster, kernel_latency_seconds=1e-6, host_read_seconds=1e-3)
    waits = {
        dispatch: route_seconds(w, make_layout(slow, ep=4, dispatch=dispatch), slow)
        for dispatch in ("per_expert", "per_rank")
    }
    told = {"per_expert": 3 * 8 * model.n_routed_experts / 4 / 1e11, "per_rank": 3 * 4 * w.rows / 1e11}
    for dispatch, seconds in waits.items():
        assert seconds == pytest.approx(told[dispatch] + ROUTE_OPERATIONS[dispatch] * 1e-6 + 1e-3)


def test_one_rank_tells_nobody_but_its_host(model, train, make_layout, cluster):
    quick = dataclasses.replace(cluster, kernel_latency_seconds=0.0, host_read_seconds=1e-3)
    assert route_seconds(workload(model, train, 1), make_layout(quick), quick) == 1e-3
