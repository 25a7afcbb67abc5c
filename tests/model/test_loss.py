"""Losses of the head: weighted cross-entropy against torch's, and the protocol with an objective of
whole responses.

Letters: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from k2train.config.model import ModelConfig
from k2train.model.context import MicrobatchContext
from k2train.model.ends import HeadPhase
from k2train.model.loss import CrossEntropy
from k2train.model.model import Model
from k2train.ops.cross_entropy import AddWeightGrad, linear_cross_entropy
from k2train.ops.weight_grad import PlainGradients, add_product_into

TOKENS, HIDDEN, VOCABULARY = 12, 5, 9
WEIGHTS = {
    "fractions": torch.linspace(0.1, 1.0, TOKENS, dtype=torch.float64),
    "zeros": torch.tensor([0.0, 1.0, 0.0] * 4, dtype=torch.float64),
    "signed": torch.linspace(-2.0, 3.0, TOKENS, dtype=torch.float64),
    "negative": torch.full((TOKENS,), -0.5, dtype=torch.float64),
    "huge": 1e6 * torch.linspace(-1.0, 1.0, TOKENS, dtype=torch.float64),
}


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("chunk_elements", [1, 4 * VOCABULARY, 10**6])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weighted_cross_entropy_and_its_gradients_are_torchs(name: str, chunk_elements: int) -> None:
    """The same sums in float64 in another order, so the largest term's rounding is the error."""
    hidden, weight, targets = problem()
    targets[3] = -100
    weights_T = WEIGHTS[name]
    expected = 0.3 * (F.cross_entropy(F.linear(hidden, weight), targets, reduction="none") * weights_T).sum()
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets, 0.3, None, chunk_elements, token_weights_T=weights_T)
    atol = 1e-13 * weights_T.abs().max().item()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=atol)
    for mine, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=atol)
    buffer = torch.zeros(VOCABULARY, HIDDEN, dtype=torch.float64)
    add = functools.partial(add_product_into, buffer)
    linear_cross_entropy(
        hidden, weight.detach(), targets, 0.3, add, chunk_elements, token_weights_T=weights_T
    )
    torch.testing.assert_close(buffer, expected_gradients[1], rtol=1e-12, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_give_the_bits_of_no_weights(dtype: torch.dtype) -> None:
    results = []
    for weights in (None, torch.ones(3, 4)):
        hidden, weight, targets = problem(dtype)
        loss = CrossEntropy(targets.view(3, 4), 1 / 7, weights)(hidden, weight)
        results.append([loss, *torch.autograd.grad(loss, (hidden, weight))])
    for plain, weighted in zip(*results, strict=True):
        assert torch.equal(plain, weighted)


@pytest.mark.parametrize("target", [-1, -99, -101, VOCABULARY])
def test_a_target_that_is_no_id_is_an_error_and_not_token_0(target: int) -> None:
    hidden, weight, targets = problem()
    targets[5] = target
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, targets)


@dataclasses.dataclass(frozen=True)
class Responses:
    """Implements Loss: for each response of `length` tokens (reward - beta log p(response))^2, plus
    a cross-entropy: a mixture whose first part is no sum over tokens."""

    targets: torch.Tensor
    rewards: torch.Tensor
    length: int
    beta: float = 0.2
    share: float = 0.5

    def objective(self, log_probs_T: torch.Tensor) -> torch.Tensor:
        of_responses = log_probs_T.view(-1, self.length).sum(1)
        return ((self.rewards - self.beta * of_responses) ** 2).sum() - self.share * log_probs_T.sum()

    def __call__(
        self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, add: AddWeightGrad | None = None
    ) -> torch.Tensor:
        with torch.no_grad():
            logits_TV = F.linear(hidden_TD, weight_VD)
            log_probs_T = -F.cross_entropy(logits_TV, self.targets, reduction="none")
        with torch.enable_grad():
            log_probs_T.requires_grad_()
            value = self.objective(log_probs_T)
            (slopes_T,) = torch.autograd.grad(value, log_probs_T)
        linear = linear_cross_entropy(hidden_TD, weight_VD, self.targets, 1.0, add, token_weights_T=-slopes_T)
        return linear + (value - linear).detach()


def test_the_head_takes_an_objective_of_whole_responses(
    families: dict[str, ModelConfig], make_model: Callable[..., Model]
) -> None:
    """Its value, the gradients of input, norm and head: those of plain autograd, but for rounding
    in float64."""
    model = make_model(families["k2"], torch.float64, 0)
    head = model.phases[-1]
    assert isinstance(head, HeadPhase)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, families["k2"].hidden_size, dtype=torch.float64, generator=generator)
    targets = torch.randint(families["k2"].vocab_size, (TOKENS,), generator=generator)
    loss = Responses(targets, torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64), 4)
    context = MicrobatchContext(3, PlainGradients(), loss=loss)
    outputs, record = head.forward((x,), context)
    (dx,) = head.backward(record, (None,), context)
    leaf = x.clone().requires_grad_()
    log_probs = -F.cross_entropy(head.logits(leaf), targets, reduction="none")
    expected = loss.objective(log_probs)
    gradients = torch.autograd.grad(expected, (leaf, head.norm, head.weight))
    torch.testing.assert_close(outputs[0], expected.detach())
    assert dx is not None
    mine = (dx, context.gradients.buffer(head.norm), context.gradients.buffer(head.weight))
    for found, theirs in zip(mine, gradients, strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-9, atol=1e-12)
