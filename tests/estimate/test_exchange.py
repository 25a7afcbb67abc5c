"""Exchanges of tokens against exact enumeration of routings, and their times against bytes over
bandwidth."""

import dataclasses
import itertools

import pytest

from k2train.architecture.microbatch import workload
from k2train.architecture.routing_tables import hit_probability
from k2train.estimate.exchange import (
    ROUTE_OPERATIONS,
    combine_seconds,
    dispatch_hops,
    dispatch_seconds,
    route_seconds,
    token_bytes,
)


@pytest.mark.parametrize("copies", ["per_expert", "per_rank", "per_node"])
@pytest.mark.parametrize(("ep", "gpus"), [(2, 4), (4, 4), (4, 2), (6, 2)])
def test_expected_copies_equal_the_mean_over_all_choices(
    model, train, make_layout, cluster, copies: str, ep: int, gpus: int
) -> None:
    small = dataclasses.replace(model, n_routed_experts=12, num_experts_per_tok=3)
    cluster = dataclasses.replace(cluster, gpus_per_node=gpus)
    layout = make_layout(cluster, ep=ep, pp=1, dispatch=copies)
    w = workload(small, train, ep)
    near, far, choices = 0.0, 0.0, list(itertools.combinations(range(12), 3))
    for chosen in choices:
        ranks = [expert // (12 // ep) for expert in chosen]
        # Every rank of the first node in turn is the sender, so that the sender's own share
        # averages out.
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
    # What is picked is what is sent and what stays here.
    for hop in hops:
        assert hop.copies >= hop.intranode_bytes + hop.internode_bytes


def test_hit_probability_is_certain_for_all_ranks_and_nothing_for_none(model, train) -> None:
    w = workload(model, train, 4)
    assert hit_probability(w, 4) == 1.0
    assert hit_probability(w, 0) == 0.0


def test_all_to_all_inside_a_node_never_touches_the_network(model, train, make_layout, cluster) -> None:
    slow = dataclasses.replace(cluster, internode_bytes_per_second=1.0)
    w = workload(model, train, 4)
    for seconds in (dispatch_seconds, combine_seconds):
        unchanged = seconds(w, make_layout(ep=4), cluster, False)
        assert seconds(w, make_layout(slow, ep=4), slow, False) == unchanged > 0


def test_copying_per_node_sends_less_than_per_rank_and_that_less_than_per_expert(
    model, train, make_layout
) -> None:
    w = workload(model, train, 8)
    far = [
        sum(hop.internode_bytes for hop in dispatch_hops(w, make_layout(ep=8, dispatch=copies)))
        for copies in ("per_node", "per_rank", "per_expert")
    ]
    assert far == sorted(far)
    assert len(set(far)) == 3


def test_a_route_costs_what_ranks_tell_each_other_its_kernels_and_the_hosts_wait(
    model, train, make_layout, cluster
) -> None:
    """Rates without latency: choices of 4 bytes to each of 3 neighbours over NVLink, and two
    constants."""
    w = workload(model, train, 4)
    slow = dataclasses.replace(cluster, kernel_latency_seconds=1e-6, host_read_seconds=1e-3)
    waits = {
        dispatch: route_seconds(w, make_layout(slow, ep=4, dispatch=dispatch), slow)
        for dispatch in ("per_expert", "per_rank")
    }
    told = {"per_expert": 3 * 8 * model.n_routed_experts / 4 / 1e11, "per_rank": 3 * 4 * w.rows / 1e11}
    for dispatch, seconds in waits.items():
        assert seconds == pytest.approx(told[dispatch] + ROUTE_OPERATIONS[dispatch] * 1e-6 + 1e-3)


def test_one_rank_tells_nobody_but_its_host(model, train, make_layout, cluster) -> None:
    quick = dataclasses.replace(cluster, kernel_latency_seconds=0.0, host_read_seconds=1e-3)
    assert route_seconds(workload(model, train, 1), make_layout(quick), quick) == 1e-3


def test_without_expert_parallelism_an_exchange_copies_rows_and_adds_them_up(
    model, train, make_layout, cluster
) -> None:
    w = workload(model, train, 1)
    bandwidth = cluster.memory_bytes_per_second * cluster.memory_efficiency
    token, experts = token_bytes(w), model.num_experts_per_tok
    assert dispatch_seconds(w, make_layout(), cluster, True) == pytest.approx(2 * experts * token / bandwidth)
    # Rows and sums, and the residual stream read twice and written.
    assert combine_seconds(w, make_layout(), cluster, False) == pytest.approx(
        (experts + 4) * token / bandwidth
    )


def test_weights_add_a_packing_of_what_they_travel_with(model, train, make_layout, cluster) -> None:
    """per_rank in one node: tokens are packed on the way to the experts, a rank's copies on the way
    back."""
    w, layout = workload(model, train, 4), make_layout(ep=4, dispatch="per_rank")
    bandwidth = cluster.memory_bytes_per_second * cluster.memory_efficiency
    (hop,) = dispatch_hops(w, layout)
    for seconds, packed in ((dispatch_seconds, hop.rows), (combine_seconds, hop.copies)):
        more = seconds(w, layout, cluster, True) - seconds(w, layout, cluster, False)
        assert more == pytest.approx(2 * packed / bandwidth)
