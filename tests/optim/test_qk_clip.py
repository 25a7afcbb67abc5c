"""QK-Clip's factor and what it does to weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from k2train.architecture.heads import ClipRows
from k2train.config.model import ModelConfig
from k2train.model.context import MicrobatchContext
from k2train.model.loss import CrossEntropy
from k2train.model.model import forward
from k2train.optim.qk_clip import clip_rows, qk_clip_scale

QUERY_ROWS = (ClipRows(4, "root"), ClipRows(2, "whole"))
KEY_ROWS = (ClipRows(4, "root"), ClipRows(5, "none"))
TAU = 100.0


def test_gamma_is_tau_over_the_logit_above_tau_and_exactly_one_elsewhere() -> None:
    logits = torch.tensor([1000.0, 100.0, 99.0, 0.0, -5.0, -torch.inf, 101.0, 3e38])
    gamma = qk_clip_scale(logits, TAU)
    assert gamma.tolist() == pytest.approx([0.1, 1, 1, 1, 1, 1, 100 / 101, 100 / 3e38], rel=1e-6)
    assert torch.equal(gamma[1:6], torch.ones(5))


def test_non_finite_logits_are_left_to_the_non_finite_check() -> None:
    assert torch.equal(qk_clip_scale(torch.tensor([torch.nan, torch.inf]), TAU), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_only_the_named_rows_of_a_clipped_head_change(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3 * 6, 7, generator=generator).to(dtype)
    key = torch.randn(3 * 9, 8, generator=generator).to(dtype)
    gamma = qk_clip_scale(torch.tensor([50.0, 400.0, torch.nan]), TAU)
    clipped_query, clipped_key = query.clone(), key.clone()
    clip_rows(clipped_query, gamma, QUERY_ROWS)
    clip_rows(clipped_key, gamma, KEY_ROWS)
    for head in (0, 2):
        assert torch.equal(clipped_query.view(3, 6, 7)[head], query.view(3, 6, 7)[head])
        assert torch.equal(clipped_key.view(3, 9, 8)[head], key.view(3, 9, 8)[head])
    assert torch.equal(clipped_query.view(3, 6, 7)[1, :4], query.view(3, 6, 7)[1, :4] * 0.5)
    assert torch.equal(clipped_query.view(3, 6, 7)[1, 4:], query.view(3, 6, 7)[1, 4:] * 0.25)
    assert torch.equal(clipped_key.view(3, 9, 8)[1, :4], key.view(3, 9, 8)[1, :4] * 0.5)
    assert torch.equal(clipped_key.view(3, 9, 8)[1, 4:], key.view(3, 9, 8)[1, 4:])


def test_clipped_weights_give_logits_scaled_by_gamma() -> None:
    """q . k = (W_qc x) . (W_kc c) + (W_qr x) . k_r with the shared k_r: every head's logits shrink
    by its gamma."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(18, 7, dtype=torch.float64, generator=generator)
    key = torch.randn(27, 8, dtype=torch.float64, generator=generator)
    inputs = [torch.randn(20, n, dtype=torch.float64, generator=generator) for n in (7, 8, 2)]

    def max_logits() -> torch.Tensor:
        q = (inputs[0] @ query.T).view(20, 3, 6)
        k_nope = (inputs[1] @ key.T).view(20, 3, 9)[..., :4]
        logits = torch.einsum("qhd,khd->hqk", q[..., :4], k_nope) + torch.einsum(
            "qhd,kd->hqk", q[..., 4:], inputs[2]
        )
        return logits.amax((1, 2))

    before = max_logits()
    tau = float(before.median())
    gamma = qk_clip_scale(before, tau)
    clip_rows(query, gamma, QUERY_ROWS)
    clip_rows(key, gamma, KEY_ROWS)
    torch.testing.assert_close(max_logits(), before * gamma)
    assert (max_logits() <= tau * (1 + 1e-12)).all()


NO_LATENTS = dict.fromkeys(
    ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_scaling")
)
GROUPED = {**NO_LATENTS, "mixer": "grouped_query", "head_dim": 10}


@pytest.mark.parametrize(
    "mixer",
    [
        {"q_lora_rank": 14},
        {"q_lora_rank": None},
        {**GROUPED, "num_key_value_heads": 1},
        {**GROUPED, "num_key_value_heads": 3},
    ],
    ids=["query latent", "no query latent", "one shared key", "a key for each head"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_batch_stays_at_tau_after_the_step(
    one_rank, model_config: ModelConfig, mixer: dict[str, Any], dtype: torch.dtype
) -> None:
    """A real layer whose second head reaches 1000: after a step of rate 0 it reaches tau, the
    others what they did."""
    config = dataclasses.replace(model_config, num_hidden_layers=1, first_k_dense_replace=1, **mixer)
    rank = one_rank(model=config, dtype=dtype)
    tokens = torch.randint(0, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))

    def max_logits() -> torch.Tensor:
        context = MicrobatchContext(num_sequences=2, loss=CrossEntropy(tokens.flatten()))
        forward(rank.model, (tokens,), context)
        return context.statistics.max_logits[0]

    query = next(
        p.tensor for p in rank.model.pieces() if p.name.endswith(("q_b_proj.weight", "q_proj.weight"))
    )
    query.view(3, 10, -1)[1] *= 1000 / max_logits()[1]
    rank.optimizer.read_parameters()
    before = max_logits()
    assert before[1] == pytest.approx(1000, rel=1e-4)
    assert before[[0, 2]].max() < TAU
    rank.feed(0)
    result = rank.optimizer.step(0.0, {0: before})
    after = max_logits()
    assert result.clipped_heads == 1
    assert after[1] == pytest.approx(TAU, rel=1e-5)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
