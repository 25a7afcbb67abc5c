"""States of a stage against sums over parameters, sharded by owner."""

import dataclasses
import itertools

import pytest

from k2train.config.compose import load_config
from k2train.estimate.parameters import model_parameters
from k2train.estimate.states import stage_states
from k2train.estimate.step import model_flops_utilisation, step_flops, update_seconds
from k2train.estimate.work import Machine
from k2train.update_rules.chosen import all_rules, chosen_rules
from k2train.update_rules.rule import numbers_kept

NAMES = [named.name for named in all_rules()]


def optim_of(name, **changes):
    return dataclasses.replace(load_config([f"optim={name}"]).optim, **changes)


def states_of(model, layout, stage, optim, dtype: str = "bfloat16"):
    pieces = [layout.virtual_stages[v] for v in layout.virtual_stages_of(stage)]
    return stage_states(pieces, model, optim, dtype, layout.ep, (layout.dp, layout.edp))


@pytest.mark.parametrize(("pp", "edp", "ep"), list(itertools.product((1, 2, 4), (1, 3), (1, 2, 4))))
def test_parameters_and_gradients_cover_what_the_stage_holds(model, make_layout, pp, edp, ep) -> None:
    layout = make_layout(pp=pp, edp=edp, ep=ep)
    parameters = model_parameters(model)
    for stage in range(pp):
        held = sum(parameters.of(layout.virtual_stages[v], ep) for v in layout.virtual_stages_of(stage))
        states = states_of(model, layout, stage, optim_of("muonclip"))
        assert states.dense_elements + states.expert_elements == held
        assert (states.parameter_bytes, states.gradient_bytes) == (2 * held, 4 * held)


@pytest.mark.parametrize(("pp", "edp", "ep"), list(itertools.product((1, 2), (1, 2, 3), (1, 2, 4))))
@pytest.mark.parametrize("name", NAMES)
def test_owners_together_hold_each_state_once(model, make_layout, pp, edp, ep, name) -> None:
    layout = make_layout(pp=pp, edp=edp, ep=ep)
    parameters = model_parameters(model)
    total = 0.0
    for stage in range(pp):
        states = states_of(model, layout, stage, optim_of(name))
        total += layout.dp * states.optimizer_mean_bytes
        assert states.optimizer_bytes >= states.optimizer_mean_bytes - 1
    norms = (2 * model.hidden_size + model.q_lora_rank + model.kv_lora_rank) * model.num_hidden_layers
    others = 2 * parameters.embedding + parameters.final_norm + norms
    rules = chosen_rules(optim_of(name))
    kept = [1 + len(rule.states) for rule in (rules.matrices, rules.others)]
    assert total == pytest.approx(4 * (kept[0] * (parameters.total - others) + kept[1] * others))


def test_muonclip_keeps_two_numbers_of_a_matrix_and_adamw_three_of_everything() -> None:
    kept = {
        named.name: [numbers_kept(rule) for rule in (rules.matrices, rules.others)]
        for named in all_rules()
        for rules in [chosen_rules(optim_of(named.name))]
    }
    assert (kept["muonclip"], kept["adamw"]) == ([2, 3], [3, 3])


def test_more_replicas_shrink_optimizer_states_and_nothing_else(model, make_layout) -> None:
    few, many = (states_of(model, make_layout(edp=edp), 0, optim_of("adamw")) for edp in (1, 8))
    assert many.parameter_bytes == few.parameter_bytes
    assert many.optimizer_bytes == pytest.approx(few.optimizer_bytes / 8, rel=0.01)


def test_float64_runs_double_every_state(model, make_layout) -> None:
    single, double = (
        states_of(model, make_layout(), 0, optim_of("muonclip"), dtype) for dtype in ("float32", "float64")
    )
    for name in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
        assert getattr(double, name) == 2 * getattr(single, name)


def test_one_rank_needs_no_gradient_traffic_and_replicas_do(model, make_layout, cluster) -> None:
    machine = Machine(cluster, "bfloat16")
    alone, replicated = (
        update_seconds(
            states_of(model, layout, 0, optim_of("muonclip")), layout, optim_of("muonclip"), machine
        )
        for layout in (make_layout(), make_layout(edp=4))
    )
    assert alone.data_parallel == 0.0
    # FP32 out, BF16 back.
    assert replicated.reduce_scatter == pytest.approx(2 * replicated.all_gather)
    assert replicated.update < alone.update


@pytest.mark.parametrize("name", NAMES)
def test_host_states_of_muon_cross_the_bus_and_of_adamw_only_gradients_do(
    model, make_layout, cluster, name
) -> None:
    """FP32: Muon's master and momentum out, 8 bytes; AdamW's gradient out, 4; then every master in
    for the gather, 4."""
    slow = dataclasses.replace(cluster, host_link_bytes_per_second=1e6, host_link_efficiency=1.0)
    layout, optim = make_layout(), optim_of(name, states="host")
    states = states_of(model, layout, 0, optim)
    assert (states.whole_elements > 0) == (name == "muonclip")
    crossed = 12 * states.whole_elements + 8 * states.row_elements
    update = update_seconds(states, layout, optim, Machine(slow, "bfloat16")).update
    assert update == pytest.approx(crossed / 1e6)


def test_host_states_wait_for_the_host_where_it_is_slowest(model, make_layout, cluster) -> None:
    """Seven FP32 numbers of an AdamW parameter are read or written; the link of the round cluster
    moves 2e10 bytes/s."""
    slow = dataclasses.replace(cluster, host_update_bytes_per_second=1e6)
    layout, optim = make_layout(), optim_of("adamw", states="host")
    states = states_of(model, layout, 0, optim)
    update = update_seconds(states, layout, optim, Machine(slow, "bfloat16")).update
    assert update == pytest.approx(states.row_elements * (28 / 1e6 + 4 / 2e10))


def test_mfu_is_one_when_devices_do_nothing_but_useful_work(model) -> None:
    flops = step_flops(model, 512, tokens=1024)
    assert model_flops_utilisation(flops, flops / 1e12 / 8, world=8, peak=1e12) == pytest.approx(1.0)


def test_k2_needs_about_six_flops_a_token_and_active_parameter() -> None:
    model = load_config(["model=k2"]).model
    active = model_parameters(model).activated - 163840 * 7168  # the look-up multiplies nothing
    # 8 % more for causal attention at 4096 tokens.
    assert 1.0 < step_flops(model, 4096, 1) / (6 * active) < 1.1
