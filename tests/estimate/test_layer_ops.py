"""FLOPs of the phases against sums over the catalogue, and the quadratic term by counting positions."""

import dataclasses

import pytest

from k2train.estimate.layer_costs import Exchange, head, transformer_layer
from k2train.estimate.layer_ops import attention_phase, experts_phase, head_ops, mlp_phase, workload
from k2train.estimate.work import Machine
from k2train.layout.tensors import layer_tensors
from k2train.layout.weights import attention_flops, head_flops, layer_flops


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_phases_multiply_every_active_weight_once(model, train, ep):
    w = workload(model, train, ep)
    for layer, phases in (
        (0, [attention_phase(w, False), mlp_phase(w)]),
        (1, [attention_phase(w, True), experts_phase(w)]),
    ):
        flops = sum(op.flops for phase in phases for op in phase)
        assert flops == pytest.approx(w.tokens * layer_flops(model, layer, train.seq_len))
    assert sum(op.flops for op in head_ops(w)) == w.tokens * head_flops(model)


def test_weight_gradients_touch_every_local_matrix_once(model, train):
    w = workload(model, train, ep=4)
    ops = attention_phase(w, True) + experts_phase(w)
    local = sum(
        spec.num_elements for spec in layer_tensors(model, 1)
        if spec.role == "matrix" and (spec.expert is None or spec.expert < model.n_routed_experts // 4)
    )  # fmt: skip
    assert sum(op.weight_elements for op in ops) == local


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
def test_causal_attention_counts_each_visible_position(model, seq_len):
    visible = sum(position + 1 for position in range(seq_len))
    per_position = 2 * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)
    assert attention_flops(model, seq_len) * seq_len == pytest.approx(visible * per_position)


def test_doubling_the_heads_doubles_the_quadratic_term_alone(model, train):
    double = dataclasses.replace(model, num_attention_heads=2 * model.num_attention_heads)
    assert attention_flops(double, 4096) == 2 * attention_flops(model, 4096)
    few, many = (experts_phase(workload(m, train, 1)) for m in (model, double))
    assert few == many


def test_recomputation_costs_what_it_rebuilds(model, train, cluster, policies):
    w = workload(model, train, 1)
    machine = Machine(cluster, train.dtype)
    plain = transformer_layer(w, policies(), machine, Exchange(0.0, 0.0), True)
    rebuilt = transformer_layer(
        w, policies(query="recompute", swiglu_input="recompute"), machine, Exchange(0.0, 0.0), True
    )
    up = 2 * w.rows * model.hidden_size * 2 * model.moe_intermediate_size
    query = 2 * w.tokens * model.q_lora_rank * model.num_attention_heads * model.qk_head_dim
    assert rebuilt.recompute_flops == up + query
    assert plain.recompute_flops == 0
    assert rebuilt.forward == plain.forward
    assert sum(p.seconds for p in rebuilt.backward_input) > sum(p.seconds for p in plain.backward_input)


def test_a_kernel_takes_the_longer_of_its_arithmetic_and_its_bytes(cluster):
    machine = Machine(cluster, "bfloat16")
    assert machine.seconds(5e14, 1.0, "matmul") == 1.0
    assert machine.seconds(2.5e14, 1.0, "attention") == 1.0
    assert machine.seconds(1.0, 3e12, "matmul") == 3.0


def test_the_head_does_its_three_products_in_the_forward(model, train, cluster):
    w = workload(model, train, 1)
    costs = head(w, Machine(cluster, train.dtype))
    three_products = 3 * 2 * w.tokens * model.hidden_size * model.vocab_size / 5e14
    assert sum(phase.seconds for phase in costs.forward) > three_products
    assert sum(phase.seconds for phase in costs.backward_input) < three_products / 3
    assert costs.weight_grad_seconds == 0.0


def test_a_chunked_head_passes_over_its_weight_once_a_chunk(model, train):
    w = workload(model, train, 1)
    once, thrice = head_ops(w, 1)[1], head_ops(w, 3)[1]
    weight = model.hidden_size * model.vocab_size
    assert thrice.weight_elements == 3 * once.weight_elements == 3 * weight
    assert thrice.bytes - once.bytes == 2 * 2 * weight
    assert thrice.flops == once.flops
