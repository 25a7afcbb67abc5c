"""Against transformers' DeepseekV3ForCausalLM with the same weights: logits, loss and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from k2train.model.context import MicrobatchContext
from k2train.model.model import forward_backward, logits
from k2train.ops.weight_grad import PlainGradients


def batch(vocab: int, sequences: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (sequences, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def run_both(model, oracle, tokens, targets):
    sink = PlainGradients()
    context = MicrobatchContext(
        num_sequences=tokens.shape[0], gradients=sink, targets=targets, loss_scale=1 / tokens.numel()
    )
    loss = forward_backward(model, tokens, context)
    expected = oracle(tokens).logits
    expected_loss = F.cross_entropy(expected.flatten(0, 1).to(loss.dtype), targets.flatten())
    expected_loss.backward()
    return loss, expected_loss.detach(), expected.detach(), sink


@pytest.mark.parametrize(("sequences", "length", "seed"), [(2, 48, 0), (1, 17, 1), (3, 1, 2)])
def test_logits_loss_and_every_gradient_are_those_of_transformers_in_fp32(
    family, make_model, make_oracle, oracle_gradient, sequences, length, seed
):
    """FP32 rounding alone may differ: logits within 1e-5 of their scale, gradients within 1e-4 of their norm."""
    model = make_model(family, torch.float32, seed)
    oracle = make_oracle(model)
    tokens, targets = batch(family.vocab_size, sequences, length, seed)
    loss, expected_loss, expected, sink = run_both(model, oracle, tokens, targets)
    scale = expected.abs().max().clamp_min(1.0)
    assert (logits(model, tokens) - expected).abs().max() <= 1e-5 * scale
    assert (loss - expected_loss).abs() <= 1e-5 * expected_loss.abs().clamp_min(1.0)
    for piece in model.pieces():
        if not piece.trained:
            continue
        got = piece.view(sink.buffer(piece.parameter))
        want = oracle_gradient(oracle, piece.name)
        print(piece.name, ((got - want).norm() / want.norm().clamp_min(1e-12)).item())
        assert (got - want).norm() <= 1e-4 * want.norm() + 1e-12, piece.name
