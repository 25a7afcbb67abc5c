"""Against transformers' DeepseekV3ForCausalLM with the same weights: logits, loss and every
gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from k2train.model.context import MicrobatchContext
from k2train.model.loss import CrossEntropy
from k2train.model.model import Model, forward_backward, logits
from k2train.ops.weight_grad import PlainGradients


def batch(vocab: int, sequences: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (sequences, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def run_both(model, oracle, tokens, targets):
    sink = PlainGradients()
    context = MicrobatchContext(
        num_sequences=tokens.shape[0], gradients=sink, loss=CrossEntropy(targets, 1 / tokens.numel())
    )
    loss = forward_backward(model, tokens, context)
    expected = oracle(tokens).logits
    expected_loss = F.cross_entropy(expected.flatten(0, 1).to(loss.dtype), targets.flatten())
    expected_loss.backward()
    return loss, expected_loss.detach(), expected.detach(), sink


# Shapes: several tiles of attention, one sequence of an odd length, and sequences of a single
# token.
@pytest.mark.parametrize(("sequences", "length", "seed"), [(2, 70, 0), (1, 17, 1), (3, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_loss_and_every_gradient_are_those_of_transformers(
    family,
    make_model: Callable[..., Model],
    make_oracle,
    oracle_gradient,
    dtype: torch.dtype,
    sequences: int,
    length: int,
    seed: int,
) -> None:
    """Logits within 1e-5 of their scale, gradients within 1e-4 of their norm.

    FP32 rounding alone may differ. In float64 ours has none, but transformers still computes norms
    and router in FP32.
    """
    model = make_model(family, dtype, seed)
    oracle = make_oracle(model)
    tokens, targets = batch(family.vocab_size, sequences, length, seed)
    loss, expected_loss, expected, sink = run_both(model, oracle, tokens, targets)
    scale = expected.abs().max().clamp_min(1.0)
    assert (logits(model, tokens) - expected).abs().max() <= 1e-5 * scale
    assert (loss - expected_loss).abs() <= 1e-5 * expected_loss.abs().clamp_min(1.0)
    for piece in model.pieces():
        if piece.trained:
            got = piece.view(sink.buffer(piece.parameter))
            want = oracle_gradient(oracle, piece.name)
            # A gradient that is zero in truth (queries of a lone token) is rounding noise on both
            # sides.
            assert (got - want).norm() <= 1e-4 * want.norm() + 1e-7, piece.name


def test_the_oracle_notices_a_wrong_rotary_base_scale_bias_or_factor(
    families, make_model: Callable[..., Model], make_oracle
) -> None:
    """Each rule matters at these weights: change one on our side alone and the logits leave the
    tolerance by far."""
    base = families["deepseek_v3"]
    model = make_model(base, torch.float32, 0)
    tokens, _ = batch(base.vocab_size, 2, 70, 0)
    expected = make_oracle(model)(tokens).logits.detach()
    changes = [
        {"rope_theta": 500.0},
        {"rope_scaling": dataclasses.replace(base.rope_scaling, mscale_all_dim=0.5)},
        {"rope_scaling": dataclasses.replace(base.rope_scaling, beta_fast=500.0)},
        {"topk_group": 3},
        {"n_group": 4},
        {"norm_topk_prob": False},
        {"routed_scaling_factor": 2.4},
        {"rms_norm_eps": 1e-2},
    ]
    for change in changes:
        wrong = make_model(dataclasses.replace(base, **change), torch.float32, 0)
        assert (logits(wrong, tokens) - expected).abs().max() > 1e-3 * expected.abs().max(), change
    for router in model.routers().values():
        router.bias.zero_()
    assert (logits(model, tokens) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_our_fp32_is_as_near_to_the_truth_as_transformers(
    family, make_model: Callable[..., Model], make_oracle
) -> None:
    """Truth is our float64, which the tests above hold to transformers' float64; a lossy step would
    double the error."""
    tokens, _ = batch(family.vocab_size, 2, 70, 5)
    truth = logits(make_model(family, torch.float64, 5), tokens)
    model = make_model(family, torch.float32, 5)
    ours = (logits(model, tokens) - truth).norm()
    theirs = (make_oracle(model)(tokens).logits.detach() - truth).norm()
    assert ours <= 1.5 * theirs
