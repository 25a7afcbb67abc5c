"""What weight gradients lose on their way from a phase to the FP32 sums: nothing below FP32, for
any weight of the model."""

from __future__ import annotations

import pytest
import torch

from k2train.model.context import MicrobatchContext
from k2train.model.loss import CrossEntropy
from k2train.model.model import build_model, forward_backward
from k2train.model.pieces import whole_model
from k2train.ops.weight_grad import PlainGradients, WeightGradQueue


def bf16_model(config):
    model = build_model(config, whole_model(config), torch.bfloat16)
    model.initialise(3)
    return model


def microbatch(config, seed: int, **options) -> tuple[torch.Tensor, MicrobatchContext]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (2, 25), generator=generator)
    targets = tokens[:, 1:].contiguous()
    context = MicrobatchContext(
        2, loss=CrossEntropy(targets, 1 / targets.numel()), balance_loss_scale=0.3, **options
    )
    return tokens[:, :-1].contiguous(), context


@pytest.mark.parametrize("queued", [False, True])
def test_no_gradient_of_a_bf16_model_was_rounded_to_bf16(family, queued: bool) -> None:
    """Sums of products over 48 tokens need more than 8 bits, so a gradient that BF16 can hold has
    been rounded to it.

    The embedding's is left out: where a token occurs once, its row is the BF16 gradient of that
    token's activations.
    """
    model, sink = bf16_model(family), PlainGradients()
    queue = WeightGradQueue() if queued else None
    tokens, context = microbatch(family, 0, gradients=sink, weight_grads=queue)
    forward_backward(model, tokens, context)
    if queue is not None:
        queue.drain(context.key, sink)
    trained = [piece for piece in model.pieces() if piece.trained]
    assert len(trained) > 20
    for piece in trained:
        gradient = piece.view(sink.buffer(piece.parameter))
        assert gradient.dtype == torch.float32
        if "embed_tokens" not in piece.name and gradient.any():
            assert not torch.equal(gradient, gradient.bfloat16().float()), piece.name


def test_every_norm_hands_its_gradient_over_once(family) -> None:
    """A sink is given whole gradients by norms alone: all of them, latent and final ones too, in
    FP32."""

    class Given(PlainGradients):
        def add(self, parameter, gradient) -> None:
            given.append((parameter, gradient.dtype))

    given: list[tuple[torch.Tensor, torch.dtype]] = []
    model = bf16_model(family)
    tokens, context = microbatch(family, 0, gradients=Given())
    forward_backward(model, tokens, context)
    norms = [piece.parameter for piece in model.pieces() if piece.name.endswith("norm.weight")]
    assert len(norms) > 2 * family.num_hidden_layers
    assert sorted(id(parameter) for parameter, _ in given) == sorted(id(norm) for norm in norms)
    assert {dtype for _, dtype in given} == {torch.float32}
