"""FLOPs of the phases against sums over the catalogue, and the quadratic term by counting
positions."""

import dataclasses

import pytest

from k2train.architecture.embedding import EMBEDDING_COLUMNS
from k2train.architecture.head import head_flops, head_ops
from k2train.architecture.heads import TRITON_SPEED
from k2train.architecture.layer import layer_of, mixer_of
from k2train.architecture.microbatch import workload
from k2train.config.compose import load_config
from k2train.config.ops import OpsConfig
from k2train.estimate.layer_costs import Exchange, head, transformer_layer
from k2train.estimate.work import Machine
from k2train.layout.tensors import layer_tensors
from k2train.layout.weights import layer_flops
from k2train.ops.embedding import COLUMNS


@pytest.mark.parametrize("mixer", ["latent", "grouped_query"])
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_phases_multiply_every_active_weight_once(model, train, ep: int, mixer: str) -> None:
    if mixer == "grouped_query":
        model = load_config(["model=glm_tiny"]).model
    w = workload(model, train, ep)
    for kind, layer in (
        ("dense", layer_of(model, "dense")),
        ("moe", layer_of(model, "moe")),
    ):
        flops = sum(op.flops for _, ops in layer.phases(w) for op in ops)
        assert flops == pytest.approx(w.tokens * layer_flops(model, kind, train.seq_len))
    assert sum(op.flops for op in head_ops(w)) == w.tokens * head_flops(model)


def test_weight_gradients_touch_every_local_matrix_once(model, train) -> None:
    w = workload(model, train, ep=4)
    ops = [op for _, phase in layer_of(model, "moe").phases(w) for op in phase]
    local = sum(
        spec.num_elements
        for spec in layer_tensors(model, 1)
        if spec.role == "matrix" and (spec.expert is None or spec.expert < model.n_routed_experts // 4)
    )
    assert sum(op.weight_elements for op in ops) == local


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
def test_causal_attention_counts_each_visible_position(model, seq_len: int) -> None:
    visible = sum(position + 1 for position in range(seq_len))
    heads = mixer_of(model).heads
    per_position = 2 * model.num_attention_heads * (heads.query + heads.value)
    assert heads.score_flops(seq_len) * seq_len == pytest.approx(visible * per_position)


def test_doubling_the_heads_doubles_the_quadratic_term_alone(model, train) -> None:
    double = dataclasses.replace(model, num_attention_heads=2 * model.num_attention_heads)
    once, twice = (mixer_of(m).heads.score_flops(4096) for m in (model, double))
    assert twice == 2 * once
    few, many = (layer_of(m, "moe").channel.ops(workload(m, train, 1)) for m in (model, double))
    assert few == many


def test_recomputation_costs_what_it_rebuilds(model, train, cluster, policies) -> None:
    w = workload(model, train, 1)
    machine = Machine(cluster, train.dtype)
    plain = transformer_layer(w, policies(), machine, Exchange(0.0, 0.0, 0.0, 0.0, 0.0), "moe")
    rebuilt = transformer_layer(
        w,
        policies(query="recompute", swiglu_input="recompute"),
        machine,
        Exchange(0.0, 0.0, 0.0, 0.0, 0.0),
        "moe",
    )
    up = 2 * w.rows * model.hidden_size * 2 * model.moe_intermediate_size
    query = 2 * w.tokens * model.q_lora_rank * model.num_attention_heads * mixer_of(model).heads.query
    assert rebuilt.recompute_flops == up + query
    assert plain.recompute_flops == 0
    assert rebuilt.forward == plain.forward
    assert sum(p.seconds for p in rebuilt.backward_input) > sum(p.seconds for p in plain.backward_input)


def test_a_kernel_takes_the_longer_of_its_arithmetic_and_its_bytes(cluster) -> None:
    machine = Machine(cluster, "bfloat16")
    assert machine.seconds(5e14, 1.0, "matmul") == 1.0
    assert machine.seconds(2.5e14, 1.0, "attention") == 1.0
    assert machine.seconds(1.0, 3e12, "matmul") == 3.0


def test_exact_largest_logits_cost_all_scores_once_more_and_count_for_no_utilisation(
    model, train, cluster
) -> None:
    """Scores are the query width's share of attention, at the Triton kernels' rate."""
    machine = Machine(cluster, train.dtype)
    train = dataclasses.replace(train, device="cuda", seq_len=4096)
    usual, exact = (
        layer_of(model, "dense").attention_ops(
            workload(model, train, 1, ops=OpsConfig(exact_max_logits=exact))
        )
        for exact in (False, True)
    )
    (statistics,) = (op for op in exact if op.name == "row_statistics")
    (attention,) = (op for op in exact if op.name == "attention")
    heads = mixer_of(model).heads
    scores = attention.flops * heads.query / (heads.query + heads.value)
    assert statistics.extra_flops == pytest.approx(scores)
    assert sum(op.flops for op in exact) == sum(op.flops for op in usual)
    latency = cluster.kernel_latency_seconds
    seconds = machine.seconds(scores / TRITON_SPEED, 0.0, "attention") - latency
    (plain,) = (op for op in usual if op.name == "row_statistics")
    assert machine.forward([statistics]) == pytest.approx(seconds + latency)
    assert machine.forward([plain]) < seconds
    assert machine.backward_input([plain]) == machine.backward_input([statistics])


def test_triton_attention_is_slower_and_makes_two_more_products(model, train, cluster) -> None:
    """At a length where arithmetic bounds it: seven products at 0.7 of the rate where cuDNN makes
    five."""
    machine = Machine(cluster, train.dtype)
    train = dataclasses.replace(train, device="cuda", seq_len=2**17)
    forward, backward = ([], [])
    for backend in ("auto", "triton"):
        ops = layer_of(model, "dense").attention_ops(workload(model, train, 1, ops=OpsConfig(backend)))
        (attention,) = (op for op in ops if op.name == "attention")
        forward.append(machine.forward([attention]))
        backward.append(machine.backward_input([attention]))
    query, value = mixer_of(model).heads.query, mixer_of(model).heads.value
    more = (4 * query + 3 * value) / (3 * query + 2 * value)
    assert forward[1] / forward[0] == pytest.approx(1 / TRITON_SPEED, rel=1e-3)
    assert backward[1] / backward[0] == pytest.approx(more / TRITON_SPEED, rel=1e-3)


def test_the_head_does_its_three_products_in_the_forward(model, train, cluster) -> None:
    w = workload(model, train, 1)
    costs = head(w, Machine(cluster, train.dtype))
    three_products = 3 * 2 * w.tokens * model.hidden_size * model.vocab_size / 5e14
    assert sum(phase.seconds for phase in costs.forward) > three_products
    assert sum(phase.seconds for phase in costs.backward_input) < three_products / 3
    # The final norm's gradient alone is left: read in FP32, and its sum read and written, at 1e12
    # bytes a second.
    assert costs.weight_grad_seconds == pytest.approx(3 * 4 * model.hidden_size / 1e12)
    assert costs.weight_queue_bytes == 4 * model.hidden_size


def test_a_chunked_head_passes_over_its_weight_once_a_chunk(model, train) -> None:
    w = workload(model, train, 1)
    once, thrice = head_ops(w, 1)[1], head_ops(w, 3)[1]
    weight = model.hidden_size * model.vocab_size
    assert thrice.weight_elements == 3 * once.weight_elements == 3 * weight
    assert thrice.bytes - once.bytes == 2 * 2 * weight
    assert thrice.flops == once.flops


def test_gradients_of_norms_wait_in_the_type_of_the_sums(model, train, cluster, policies) -> None:
    """BF16 products beside FP32 norms: what is left of a dense layer's queue without its products
    is four norms."""
    w = workload(model, train, 1)
    queue = transformer_layer(w, policies(), Machine(cluster, train.dtype), 0.0, "dense").weight_queue_bytes
    products = [
        op
        for op in [op for _, phase in layer_of(model, "dense").phases(w) for op in phase]
        if op.weight_elements
    ]
    inputs = {op.queued[0]: op.queued[1] for op in products}
    products_bytes = sum(inputs.values()) + sum(op.queued[2] for op in products)
    assert queue - products_bytes == 4 * (2 * model.hidden_size + model.q_lora_rank + model.kv_lora_rank)


def test_a_bf16_router_multiplies_its_fp32_gradient_in_parts(model, train, cluster) -> None:
    """One product forward, a double one for the input, three for the weight; in FP32 one of
    each."""
    narrow = next(
        op for op in layer_of(model, "moe").attention_ops(workload(model, train, 1)) if op.name == "router"
    )
    wide_train = dataclasses.replace(train, dtype="float32")
    wide = next(
        op
        for op in layer_of(model, "moe").attention_ops(workload(model, wide_train, 1))
        if op.name == "router"
    )
    assert (narrow.backward_flops, narrow.weight_passes) == (2 * narrow.flops, 3)
    assert (wide.backward_flops, wide.weight_passes) == (None, 1)
    machine = Machine(cluster, "bfloat16")
    once = dataclasses.replace(narrow, weight_passes=1)
    assert machine.weight_grad([narrow]) == 3 * machine.weight_grad([once])


def test_every_expert_and_every_run_of_the_heads_rows_is_a_kernel(model, train, cluster) -> None:
    slow = dataclasses.replace(cluster, kernel_latency_seconds=1.0)
    local = model.n_routed_experts // 4
    up = next(
        op for op in layer_of(model, "moe").channel.ops(workload(model, train, 4)) if op.name == "experts_up"
    )
    logits = head_ops(workload(model, train, 1), num_chunks=3, num_owners=5)[1]
    for op, kernels in ((up, local), (logits, 15)):
        assert Machine(slow, "bfloat16").weight_grad([op]) == pytest.approx(kernels, abs=0.1)


def test_the_plan_sums_as_many_columns_of_the_embedding_at_a_time_as_the_program() -> None:
    assert EMBEDDING_COLUMNS == COLUMNS
