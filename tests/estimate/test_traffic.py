"""Times of messages and collectives against bytes over bandwidth."""

import pytest

from k2train.architecture.microbatch import workload
from k2train.estimate.traffic import Network, local_peers, message_seconds


@pytest.mark.parametrize(
    ("size", "stride", "gpus", "expected"),
    [
        (16, 1, 8, 8),  # K2: one expert group on two nodes
        (8, 1, 8, 8),
        (4, 1, 8, 4),
        (4, 16, 8, 1),  # replicas of an expert, each on nodes of its own
        (2, 4, 8, 2),
        (4, 4, 8, 2),
        (3, 1, 8, 1),  # groups 0-2, 3-5, 6-8: the third straddles
        (1, 1, 8, 1),
    ],
)
def test_local_peers_counts_the_worst_rank(size: int, stride: int, gpus: int, expected: int) -> None:
    assert local_peers(size, stride, gpus) == expected


def test_the_slower_share_decides_an_exchange(cluster) -> None:
    network = Network(cluster)
    assert network.exchange(1e11, 1e9) == 1.0
    assert network.exchange(1e9, 2.5e10) == 1.0
    assert network.exchange(0.0, 0.0) == 0.0


def test_a_pipeline_message_crosses_nodes_as_soon_as_the_world_does(
    model, train, make_layout, cluster
) -> None:
    w = workload(model, train, 2)
    num_bytes = 1024 * 256 * 2
    assert message_seconds(w, make_layout(pp=2, ep=2), cluster) == num_bytes / 1e11
    assert message_seconds(w, make_layout(pp=4, ep=2), cluster) == num_bytes / 2.5e10
    assert message_seconds(w, make_layout(pp=1, ep=2), cluster) == 0.0


@pytest.mark.parametrize(("size", "near", "rate"), [(4, 4, 1e11), (8, 4, 1e11), (8, 2, 5e10), (8, 1, 2.5e10)])
def test_ring_moves_all_but_one_share_at_the_rate_of_its_narrowest_link(
    cluster, size: int, near: int, rate: float
) -> None:
    assert Network(cluster).ring(8e9, size, near) == pytest.approx(8e9 * (size - 1) / size / rate)
    assert Network(cluster).ring(8e9, 1, 1) == 0.0
