"""What plans say: the account of a step adds up, memory kinds add up, and K2's published figures
come out."""

import dataclasses
import json

import pytest

from k2train.config.compose import load_config
from k2train.layout.build import build_layout
from k2train.planner.advice import advise, all_to_all_note, problems, steady_ep_share
from k2train.planner.export import plan_document
from k2train.planner.memory import fullest_node, level_at, sampled
from k2train.planner.plan import Plan, build_plan

K2_SHORT = [
    "experiment=k2",
    "train.global_batch_tokens=6291456",
]  # 96 microbatches: the peaks of the full step
PER_EXPERT = "layout.dispatch=per_expert"


@pytest.fixture(scope="module")
def k2() -> Plan:
    return build_plan(load_config(K2_SHORT))


@pytest.fixture(scope="module")
def k2_per_expert() -> Plan:
    return build_plan(load_config([*K2_SHORT, PER_EXPERT]), check=False)


def test_busy_time_and_waits_add_up_to_the_pipeline_on_every_stage(k2: Plan) -> None:
    for stage in k2.simulation.stages:
        assert stage.busy_seconds + stage.waits.total == pytest.approx(k2.simulation.makespan_seconds)


def test_memory_kinds_add_up_to_the_simulated_peak(k2: Plan) -> None:
    for stage, memory in enumerate(k2.memory):
        assert memory.activations + memory.transient + memory.weight_queue == k2.simulation.peak_bytes[stage]
        assert min(memory.activations, memory.transient, memory.weight_queue) >= 0


def test_k2_parameters_and_gradients_are_6_16_terabytes_and_on_the_fullest_gpu_near_30_gigabytes(
    k2: Plan,
) -> None:
    dense_replicas = 15 * 6 * sum(states.dense_elements for states in k2.states)
    total = 16 * sum(stage.parameters + stage.gradients for stage in k2.memory)
    assert total - dense_replicas == pytest.approx(6.16e12, abs=0.01e12)
    fullest = max(stage.parameters + stage.gradients for stage in k2.memory)
    assert fullest == k2.fullest.parameters + k2.fullest.gradients == pytest.approx(30e9, rel=0.1)


def test_host_states_of_k2_pass_through_slots_of_the_largest_matrix(k2: Plan) -> None:
    """Three slots of an FP32 master and momentum: of a dense layer's projection (18432 x 7168) on
    stage 0, elsewhere of an output projection (7168 x 8192), which four experts' matrices (2048 x
    7168) equal in size.
    """
    first, *rest = (stage.optimizer_on_device for stage in k2.memory)
    assert first == 3 * 2 * 4 * 18432 * 7168
    assert set(rest) == {3 * 2 * 4 * 7168 * 8192} == {3 * 2 * 4 * 4 * 2048 * 7168}


def test_k2_fits_32_nodes_with_its_activation_policies_and_not_without(k2: Plan) -> None:
    assert k2.fits
    for activations in ("none", "recompute", "recompute_fp8"):
        plan = build_plan(load_config([*K2_SHORT, f"activations={activations}"]), check=False)
        assert not plan.fits
        assert "on a device" in problems(plan)[0]


def test_k2_needs_host_resident_states_less_as_the_cluster_grows(k2: Plan) -> None:
    few, many = (
        build_plan(
            load_config([*K2_SHORT, "optim.states=device", f"layout.nodes={nodes}"]), check=False
        ).memory[1]
        for nodes in (32, 128)
    )
    assert few.optimizer_on_device == k2.memory[1].optimizer_on_host > 30e9
    assert many.optimizer_on_device == pytest.approx(few.optimizer_on_device / 4, rel=0.05)
    assert many.parameters == few.parameters == k2.memory[1].parameters


def test_pipeline_messages_of_k2_are_exposed_in_warmup_and_cooldown_only(
    k2: Plan, k2_per_expert: Plan
) -> None:
    """A stage meets one late message where the steady phase begins: less than W, 13.4 ms, in
    all."""
    for plan in (k2, k2_per_expert):
        assert plan.busiest.warmup.pp > 0.0
        assert plan.busiest.waits.copy == 0.0
        late = plan.busiest.steady.pp
        assert late < plan.program.costs.virtual_stages[1].weight_grad_seconds
        assert late < 1e-3 * plan.simulation.makespan_seconds


def test_the_all_to_all_of_k2_hides_if_tokens_cross_once_per_node_and_not_once_per_expert(
    k2: Plan, k2_per_expert: Plan
) -> None:
    """As the report says, but for a little: rows are copied and added up on the exchange's stream,
    too. In four parts, since hops one after the other would show more."""
    assert 0.0 < steady_ep_share(k2) < 0.02
    whole = build_plan(load_config([*K2_SHORT, "layout.dispatch_parts=1"]), check=False)
    assert 2 * steady_ep_share(k2) < steady_ep_share(whole) < steady_ep_share(k2_per_expert)
    note = all_to_all_note(k2_per_expert)
    assert note is not None
    assert "per_node" in note


@pytest.mark.parametrize("copies", ["per_expert", "per_node"])
def test_no_other_schedule_is_faster_than_k2s_at_k2s_shape(copies: str) -> None:
    """With 96 microbatches. With all 1024 DualPipe and DualPipeV are planned 1 and 2 % faster, and
    do not fit (docs/plan.md)."""
    words = [*K2_SHORT, f"layout.dispatch={copies}"]
    k2 = build_plan(load_config(words), check=False)
    for kind in ("interleaved_1f1b", "1f1b", "zb_h1", "dualpipe", "dualpipe_v"):
        vpp = [] if kind == "interleaved_1f1b" else ["layout.vpp=1"]
        other = build_plan(load_config([*words, f"schedule={kind}", *vpp]), check=False)
        assert k2.step_seconds <= other.step_seconds
        if kind.startswith("dualpipe"):
            assert not other.fits


def test_advice_names_a_switch_that_really_makes_it_fit() -> None:
    words = [*K2_SHORT, "activations=recompute", "layout.nodes=64"]
    advice = advise(build_plan(load_config(words), check=False))
    assert advice is not None
    assert build_plan(load_config([*words, *advice.overrides]), check=False).fits


def test_advice_is_silent_where_no_switch_helps() -> None:
    plan = build_plan(load_config([*K2_SHORT, "cluster.device_memory_bytes=1e9"]), check=False)
    assert not plan.fits
    assert advise(plan) is None


def test_mfu_and_tokens_follow_from_the_step_time(k2: Plan) -> None:
    assert k2.tokens_per_second * k2.step_seconds == pytest.approx(6291456)
    assert 0.2 < k2.mfu < k2.config.cluster.matmul_efficiency


def test_the_document_is_json_and_repeats_the_tables(k2: Plan) -> None:
    document = json.loads(json.dumps(plan_document(k2)))
    assert document["fits"] is True
    assert [row["device_bytes"] for row in document["memory"]] == [stage.device for stage in k2.memory]
    assert document["exposed_seconds"]["ep"] == k2.busiest.waits.ep
    assert document["bubble"]["share"] == k2.bubble_share
    assert document["schedule"] == k2.program.schedule.to_text()
    assert sum(row["num_layers"] for row in document["layout"]["virtual_stages"]) == 61
    peaks = [max(curve) for curve in document["memory_over_time"]["device_bytes"]]
    assert peaks == list(k2.simulation.peak_bytes)


def test_curves_are_read_between_their_points() -> None:
    import numpy as np

    curve = (np.array([1.0, 1.0, 3.0]), np.array([5, 2, 7]))
    assert [level_at(curve, moment) for moment in (0.5, 1.0, 2.0, 3.0)] == [0, 2, 2, 7]
    assert sampled(curve, 4.0, points=4) == [0, 5, 2, 7]


def test_sparsity_and_heads_move_the_plan_the_way_the_report_says(k2: Plan) -> None:
    config = k2.config
    dense = dataclasses.replace(config, model=dataclasses.replace(config.model, num_attention_heads=128))
    heavier = build_plan(dense, check=False)
    assert heavier.step_seconds > k2.step_seconds
    fewer = dataclasses.replace(config, model=dataclasses.replace(config.model, n_routed_experts=64))
    smaller = build_plan(fewer, check=False)
    assert smaller.states[1].expert_elements * 6 == k2.states[1].expert_elements
    assert smaller.step_seconds < k2.step_seconds


@pytest.mark.parametrize(
    ("pp", "edp", "ep", "gpus"), [(4, 1, 2, 8), (2, 3, 4, 8), (4, 3, 2, 4), (3, 1, 1, 2), (2, 2, 16, 8)]
)
def test_a_nodes_memory_is_the_sum_over_its_own_ranks(pp: int, edp: int, ep: int, gpus: int) -> None:
    words = [f"layout.pp={pp}", f"layout.edp={edp}", f"layout.ep={ep}", f"cluster.gpus_per_node={gpus}"]
    config = load_config(words)
    layout = build_layout(config.layout, config.cluster, config.model)
    per_rank = [10**stage for stage in range(pp)]
    nodes = [
        [layout.grid.coordinates(rank).pp_rank for rank in layout.ranks_of_node(node)]
        for node in range(layout.num_nodes)
    ]
    for stage in range(pp):
        expected = max(sum(per_rank[s] for s in stages) for stages in nodes if stage in stages)
        assert fullest_node(layout, stage, per_rank) == expected
