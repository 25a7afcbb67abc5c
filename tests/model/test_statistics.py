"""What a step reports, and load balancing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from k2train.model.context import MicrobatchContext, Statistics
from k2train.model.loss import CrossEntropy
from k2train.model.model import Model, forward_backward, forward_loss
from k2train.model.routing import choose_experts, load_violation, update_correction_bias
from k2train.ops.attention import causal_attention_reference
from k2train.ops.weight_grad import PlainGradients


def tokens_of(config, sequences, length, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(config.vocab_size, (sequences, length + 1), generator=generator)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def evaluate(model, tokens, targets, **options) -> MicrobatchContext:
    context = MicrobatchContext(num_sequences=tokens.shape[0], loss=CrossEntropy(targets), **options)
    forward_loss(model, tokens, context)
    return context


def test_max_logits_are_the_largest_over_heads_queries_and_microbatches(
    family, make_model: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed from full scores of the queries and keys that attention really got."""
    import k2train.model.attention as module

    model = make_model(family, torch.float64, 0)
    original, seen = module.causal_attention, []

    def spy(q, k, v, scale, **options):
        seen.append(causal_attention_reference(q, k, v, scale)[1])
        return original(q, k, v, scale, **options)

    monkeypatch.setattr(module, "causal_attention", spy)
    statistics = Statistics()
    for seed in (1, 2):
        evaluate(model, *tokens_of(family, 2, 13, seed), statistics=statistics)
    layers = family.num_hidden_layers
    for layer in range(layers):
        expected = torch.maximum(seen[layer], seen[layers + layer])
        torch.testing.assert_close(statistics.max_logits[layer], expected)
        assert expected.shape == (family.num_attention_heads,)


def test_loads_count_every_choice_once_and_add_up_over_microbatches(
    family, make_model: Callable[..., Model]
) -> None:
    model = make_model(family, torch.float64, 1)
    statistics = Statistics()
    for seed in (1, 2, 3):
        evaluate(model, *tokens_of(family, 2, 11, seed), statistics=statistics)
    moe_layers = range(family.first_k_dense_replace, family.num_hidden_layers)
    assert set(statistics.expert_loads) == set(moe_layers)
    for loads in statistics.expert_loads.values():
        assert loads.dtype == torch.int64
        assert loads.sum().item() == 3 * 2 * 11 * family.num_experts_per_tok


def test_the_balance_loss_changes_gradients_but_not_the_reported_loss(
    families, make_model: Callable[..., Model]
) -> None:
    config = families["k2"]
    model = make_model(config, torch.float64, 2)
    tokens, targets = tokens_of(config, 3, 9)
    contexts = []
    for scale in (0.0, 0.5):
        context = MicrobatchContext(3, PlainGradients(), loss=CrossEntropy(targets), balance_loss_scale=scale)
        forward_backward(model, tokens, context)
        contexts.append(context)
    without, with_loss = contexts
    assert torch.equal(without.statistics.loss, with_loss.statistics.loss)
    assert without.statistics.balance_loss is None
    assert with_loss.statistics.balance_loss > 0
    gate = model.routers()[1].weight
    assert not torch.equal(without.gradients.buffer(gate), with_loss.gradients.buffer(gate))


def test_the_bias_changes_the_choice_but_not_the_weights_of_what_is_chosen(
    families, make_model: Callable[..., Model]
) -> None:
    config = families["k2"]
    model = make_model(config, torch.float64, 4)
    router = model.routers()[1]
    normed = torch.randn(20, config.hidden_size, dtype=torch.float64)
    router.bias.zero_()
    context = MicrobatchContext(1)
    with torch.no_grad():
        plain, _, _ = router(normed, context, None)
        router.bias[5] = 10.0
        experts, weights, _ = router(normed, context, None)
    assert (experts == 5).any(1).all()
    assert not (plain == 5).any(1).all()
    scores = torch.sigmoid(normed @ router.weight.detach().T).gather(1, experts)
    expected = scores / scores.sum(1, keepdim=True) * config.routed_scaling_factor
    torch.testing.assert_close(weights, expected)


def test_chosen_experts_lie_in_the_best_groups(families) -> None:
    config = families["deepseek_v3"]
    torch.manual_seed(0)
    scores, bias = torch.rand(50, config.n_routed_experts), 0.1 * torch.randn(config.n_routed_experts)
    experts = choose_experts(scores, bias, config)
    per_group = config.n_routed_experts // config.n_group
    for token in range(50):
        biased = (scores[token] + bias).view(config.n_group, per_group)
        ranks = [sum(sorted(group.tolist())[-2:]) for group in biased]
        best = sorted(range(config.n_group), key=lambda g: -ranks[g])[: config.topk_group]
        allowed = [g * per_group + i for g in best for i in range(per_group)]
        expected = sorted(allowed, key=lambda e: -(scores[token] + bias)[e].item())
        assert set(experts[token].tolist()) == set(expected[: config.num_experts_per_tok])


def test_the_bias_rises_where_load_is_short_and_falls_where_it_is_long() -> None:
    bias = torch.zeros(4)
    update_correction_bias(bias, torch.tensor([0, 5, 10, 5]), 0.001)
    torch.testing.assert_close(bias, torch.tensor([0.001, 0.0, -0.001, 0.0]))


def test_bias_updates_even_out_a_router_that_prefers_one_expert(
    families, make_model: Callable[..., Model]
) -> None:
    config = families["k2"]
    model = make_model(config, torch.float64, 5)
    router = model.routers()[1]
    with torch.no_grad():
        router.weight[3] *= 0.0
        router.bias.zero_()[3] = 0.5
    normed = torch.randn(256, config.hidden_size, dtype=torch.float64)
    violations = []
    for _ in range(150):
        context = MicrobatchContext(1)
        with torch.no_grad():
            _, _, loads = router(normed, context, None)
        violations.append(load_violation(loads.unsqueeze(0)).item())
        update_correction_bias(router.bias, loads, 0.01)
    assert violations[0] > 2.0
    assert violations[-1] < 0.3


def test_load_violation_is_that_of_the_worst_layer() -> None:
    assert load_violation(torch.empty(0, 4)) == 0.0
    assert load_violation(torch.tensor([[4, 4], [2, 6]])).item() == pytest.approx(0.5)
    assert load_violation(torch.tensor([[0, 0]])) == 0.0
