"""A virtual stage is the sum of its layers; phases come in the order the design names."""

import pytest

from k2train.config.errors import ConfigError
from k2train.estimate.virtual_stage import PASS_ON
from k2train.layout.layout import VirtualStage


def test_phases_of_a_moe_layer_forward_and_backward(make_estimator) -> None:
    estimate = make_estimator(ep=2).virtual_stage(VirtualStage(1, 2))
    assert [(p.name, p.stream) for p in estimate.forward] == [
        ("attention", "compute"),
        ("route", "ep"),
        ("dispatch", "ep"),
        ("experts", "compute"),
        ("combine", "ep"),
    ]
    assert [(p.name, p.stream) for p in estimate.backward_input] == [
        ("combine", "ep"),
        ("experts", "compute"),
        ("dispatch", "ep"),
        ("route", "ep"),
        ("attention", "compute"),
    ]


def test_a_dense_layer_has_no_all_to_all_and_one_rank_none_but_the_hosts_wait(make_estimator) -> None:
    dense = make_estimator(ep=4).virtual_stage(VirtualStage(0, 1))
    assert {phase.stream for phase in dense.forward + dense.backward_input} == {"compute"}
    alone = make_estimator(ep=1).virtual_stage(VirtualStage(1, 2))
    for phases, waits in ((alone.forward, ["route"]), (alone.backward_input, [])):
        assert [phase.name for phase in phases if phase.stream == "ep" and phase.seconds] == waits


def test_a_piece_is_the_sum_of_its_parts(make_estimator, policies) -> None:
    estimator = make_estimator(policies(layer_input="offload", query="fp8"), ep=2, pp=2)
    piece = VirtualStage(0, 3, embedding=True, head=True)
    pieces = [
        VirtualStage(0, 0, embedding=True),
        *(VirtualStage(layer, layer + 1) for layer in range(3)),
        VirtualStage(3, 3, head=True),
    ]
    whole, parts = estimator.virtual_stage(piece), [estimator.virtual_stage(part) for part in pieces]
    for flops in (estimator.forward_flops, estimator.recompute_flops):
        assert flops(piece) == pytest.approx(sum(map(flops, pieces)))
    for name in (
        "weight_grad_seconds",
        "offload_bytes",
        "activation_bytes",
        "weight_queue_bytes",
    ):
        assert getattr(whole, name) == pytest.approx(sum(getattr(part, name) for part in parts))
    assert whole.forward == tuple(phase for part in parts for phase in part.forward)
    backward = tuple(phase for part in reversed(parts) for phase in part.backward_input)
    assert (*whole.backward_input, *PASS_ON) == backward, "the embedding alone only passes on"
    assert whole.forward_transient_bytes == max(part.forward_transient_bytes for part in parts)


def test_an_empty_piece_costs_nothing_but_its_message(make_estimator) -> None:
    estimate = make_estimator(pp=2).virtual_stage(VirtualStage(2, 2))
    assert estimate.forward == estimate.backward_input == PASS_ON
    assert sum(phase.seconds for phase in PASS_ON) == 0
    assert estimate.offload_bytes == estimate.activation_bytes == estimate.weight_queue_bytes == 0
    assert estimate.send_forward_seconds == estimate.send_backward_seconds > 0


def test_offloaded_bytes_take_bus_time(make_estimator, policies, train) -> None:
    estimate = make_estimator(policies(layer_input="offload")).virtual_stage(VirtualStage(0, 2))
    # Two layers, 1024 tokens, 256 numbers of 2 bytes and an FP32 of the norm.
    assert estimate.offload_bytes == 2 * 1024 * (256 * 2 + 4)
    assert estimate.offload_seconds == estimate.reload_seconds == estimate.offload_bytes / 2e10


def test_impossible_policies_are_refused(make_estimator, policies) -> None:
    with pytest.raises(ConfigError):
        make_estimator(policies(expert_input="recompute"))


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_put_off_weight_gradients_pile_up_layer_after_layer(make_estimator, layers: int) -> None:
    """A layer that is done has left its queue and let go of what it saved; the one at work has its
    buffers beside that."""
    estimator = make_estimator()
    moe, piece = estimator.layers["moe"], VirtualStage(1, 1 + layers)
    grows = moe.weight_queue_bytes - sum(tensor.stored_bytes for tensor in moe.saved)
    want = moe.backward_transient_bytes + (layers - 1) * max(grows, 0)
    assert estimator.virtual_stage(piece, put_off=True).backward_transient_bytes == want
    assert estimator.virtual_stage(piece).backward_transient_bytes == moe.backward_transient_bytes
