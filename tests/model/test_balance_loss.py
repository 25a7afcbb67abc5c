"""The balance loss of the router against the paper's sum and against megatron-core, under a
correction bias that changes what is chosen."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

from k2train.config.model import ModelConfig
from k2train.model.context import MicrobatchContext
from k2train.model.model import Model
from k2train.model.routing import Router

SEQUENCES, LENGTH, SCALE = 3, 7, 0.25
# "k2" has one group of experts, "deepseek_v3" several: equation 18 knows none, and neither does
# Megatron's loss.
FAMILIES = ("k2", "deepseek_v3")


@pytest.fixture(params=FAMILIES)
def config(request: pytest.FixtureRequest, families: dict[str, ModelConfig]) -> ModelConfig:
    return families[request.param]


@pytest.fixture
def router(config: ModelConfig, make_model: Callable[..., Model]) -> Router:
    """With a bias as large as the spread of its scores."""
    return make_model(config, torch.float64, 3).routers()[config.first_k_dense_replace]


def tokens_of(config: ModelConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (SEQUENCES * LENGTH, config.hidden_size)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def loss_and_gradient(
    router: Router, normed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reported loss, its gradient alone by the router's input, and the experts that were
    chosen."""
    context = MicrobatchContext(SEQUENCES, balance_loss_scale=SCALE)
    experts, weights, _ = router(normed, context, None)
    (gradient,) = torch.autograd.grad((0.0 * weights).sum(), normed)
    assert context.statistics.balance_loss is not None
    return context.statistics.balance_loss, gradient, experts


def scores_of(router: Router, normed: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(normed @ router.weight.detach().T)


def test_the_bias_of_these_tests_changes_choices(config: ModelConfig, router: Router) -> None:
    normed = tokens_of(config)
    _, _, experts = loss_and_gradient(router, normed)
    raw = scores_of(router, normed).topk(config.num_experts_per_tok).indices
    assert not torch.equal(experts.sort().values, raw.sort().values)


def test_it_is_the_papers_sum_written_out(config: ModelConfig, router: Router) -> None:
    """DeepSeek-V3, equations 17 to 20, one sequence after the other. The rounding of float64 alone
    may differ."""
    normed = tokens_of(config)
    scores, top_k = scores_of(router, normed).tolist(), config.num_experts_per_tok
    expected = 0.0
    for start in range(0, SEQUENCES * LENGTH, LENGTH):
        rows = scores[start : start + LENGTH]
        for i in range(config.n_routed_experts):
            chosen = sum(row[i] >= sorted(row)[-top_k] for row in rows)
            f = config.n_routed_experts / (top_k * LENGTH) * chosen
            expected += f * sum(row[i] / sum(row) for row in rows) / LENGTH / SEQUENCES
    assert loss_and_gradient(router, normed)[0].item() == pytest.approx(SCALE * expected, rel=1e-12)


def test_loss_and_gradient_are_megatrons(config: ModelConfig, router: Router) -> None:
    """Megatron's sequence-level loss is its loss of each sequence, averaged. Both sides are sums of
    some hundred terms in float64, taken in another order."""
    with warnings.catch_warnings():  # about packages that megatron-core does not find
        warnings.simplefilter("ignore")
        from megatron.core.transformer.moe.moe_utils import (
            compute_routing_scores_for_aux_loss,
            switch_load_balancing_loss_func,
        )
    normed, top_k = tokens_of(config), config.num_experts_per_tok
    logits = normed @ router.weight.detach().T
    total = torch.zeros((), dtype=torch.float64)
    for sequence in logits.split(LENGTH):
        chosen, scores = compute_routing_scores_for_aux_loss(sequence, top_k, "sigmoid")
        total = total + switch_load_balancing_loss_func(
            scores, chosen.sum(0), LENGTH, top_k, config.n_routed_experts, SCALE
        )
    expected = total / SEQUENCES
    loss, gradient, _ = loss_and_gradient(router, normed)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, normed)[0], rtol=1e-9, atol=1e-15)


def test_it_does_not_depend_on_the_bias(config: ModelConfig, router: Router) -> None:
    """So it keeps its pull on the scores however well the bias has evened out the load."""
    normed = tokens_of(config)
    loss, gradient, experts = loss_and_gradient(router, normed)
    router.bias.zero_()
    plain_loss, plain_gradient, plain_experts = loss_and_gradient(router, normed)
    assert not torch.equal(experts, plain_experts)
    assert torch.equal(loss, plain_loss)
    assert torch.equal(gradient, plain_gradient)
