"""Phase-wise forward and backward against plain autograd through the same mathematics, in
float64.

Letters: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from k2train.device.cpu import CpuDevice
from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import LocalDispatcher, Results
from k2train.model.loss import CrossEntropy
from k2train.model.model import Model, backward, build_model, forward, forward_backward, forward_loss, logits
from k2train.model.pieces import ModelPart, whole_model
from k2train.ops.weight_grad import PlainGradients, WeightGradQueue

# Rounding of float64 alone may differ: sums are taken in another order.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def batch(config, sequences: int, length: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (sequences, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def context_of(tokens, targets, **options) -> MicrobatchContext:
    options = {
        "gradients": PlainGradients(),
        "loss": CrossEntropy(targets, 1 / tokens.numel()),
        "balance_loss_scale": 0.3,
        **options,
    }
    return MicrobatchContext(num_sequences=tokens.shape[0], **options)


def plain_gradients(model, tokens, context) -> dict[torch.Tensor, torch.Tensor]:
    """One graph through all phases, no cuts and no queue."""
    inputs = (tokens,)
    for phase in model.phases:
        if phase.stream == "communication":
            results, _ = phase.finish_forward(phase.start_forward(Results(inputs), context), context)
            inputs = results.tensors
        else:
            inputs = phase.compute(inputs, context, None)
    parameters = trained(model)
    return dict(zip(parameters, torch.autograd.grad(inputs[0], parameters), strict=True))


def trained(model) -> list[torch.Tensor]:
    return list({id(p.parameter): p.parameter for p in model.pieces() if p.trained}.values())


def assert_gradients(sink: PlainGradients, expected: dict[torch.Tensor, torch.Tensor]) -> None:
    assert set(sink.buffers) == set(expected)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(sink.buffers[parameter], gradient, **CLOSE)


@pytest.mark.parametrize("queued", [False, True])
def test_phase_by_phase_backward_equals_plain_autograd(
    family, make_model: Callable[..., Model], queued: bool
) -> None:
    model = make_model(family, torch.float64, 0)
    tokens, targets = batch(family, 2, 21)
    queue = WeightGradQueue() if queued else None
    context = context_of(tokens, targets, weight_grads=queue, key=(1, 4))
    forward_backward(model, tokens, context)
    if queue is not None:
        assert queue.keys() == ((1, 4),)
        queue.drain((1, 4), context.gradients)
        assert queue.empty
    assert not context.routes
    assert_gradients(context.gradients, plain_gradients(model, tokens, context_of(tokens, targets)))


def test_two_interleaved_microbatches_with_late_weight_gradients_equal_their_sum(
    family, make_model: Callable[..., Model]
) -> None:
    """The steady state of K2's pipeline: one's forward phases between the other's backward phases,
    W at the end."""
    model = make_model(family, torch.float64, 1)
    queue, sink = WeightGradQueue(), PlainGradients()
    batches = [batch(family, 2, 9, seed) for seed in (1, 2)]
    first, second = (
        context_of(*b, weight_grads=queue, key=(0, i), gradients=sink) for i, b in enumerate(batches)
    )
    _, records = forward(model, (batches[0][0],), first)
    inputs, later, grads = (batches[1][0],), [], (None,)
    for ahead, behind in zip(model.phases, reversed(model.phases), strict=True):
        inputs, record = ahead.forward(inputs, second)
        later.append(record)
        grads = behind.backward(records.pop(), grads, first)
    backward(model, later, (None,), second)
    assert set(queue.keys()) == {(0, 0), (0, 1)}
    queue.drain((0, 1), sink)
    queue.drain((0, 0), sink)
    expected = [plain_gradients(model, b[0], context_of(*b)) for b in batches]
    assert_gradients(sink, {p: expected[0][p] + expected[1][p] for p in expected[0]})


def test_communication_phases_run_in_halves(family, make_model: Callable[..., Model]) -> None:
    model = make_model(family, torch.float64, 2)
    tokens, targets = batch(family, 1, 8)
    whole, halves = context_of(tokens, targets), context_of(tokens, targets)
    expected = forward_backward(model, tokens, whole)
    inputs, records = (tokens,), []
    for phase in model.phases:
        if phase.stream == "communication":
            results, record = phase.finish_forward(phase.start_forward(Results(inputs), halves), halves)
            inputs = results.tensors
        else:
            inputs, record = phase.forward(inputs, halves)
        records.append(record)
    assert torch.equal(inputs[0], expected)
    grads = (None,)
    for phase in reversed(model.phases):
        if phase.stream == "communication":
            started = phase.start_backward(records.pop(), Results(grads), halves)
            grads = phase.finish_backward(started, halves).tensors
        else:
            grads = phase.backward(records.pop(), grads, halves)
    for parameter, gradient in whole.gradients.buffers.items():
        assert torch.equal(gradient, halves.gradients.buffers[parameter])


class ReversedExperts(LocalDispatcher):
    """Holds the experts in reverse order, so that rows come in another order than experts are
    numbered in."""

    def start_route(self, experts_TK, counts_E, saved, ready=None):
        return super().start_route(len(counts_E) - 1 - experts_TK, counts_E.flip(0), saved, ready)


def test_the_order_in_which_a_rank_stores_its_experts_changes_nothing(
    families, make_model: Callable[..., Model]
) -> None:
    config = families["odd"]
    model = make_model(config, torch.float64, 3)
    part = dataclasses.replace(
        whole_model(config), local_experts=tuple(reversed(range(config.n_routed_experts)))
    )
    other = build_model(
        config, part, torch.float64, dispatcher=ReversedExperts(CpuDevice(torch.device("cpu")))
    )
    values = {piece.name: piece for piece in model.pieces()}
    for piece in other.pieces():
        piece.tensor.copy_(values[piece.name].tensor)
    tokens, targets = batch(config, 2, 11)
    mine, theirs = context_of(tokens, targets), context_of(tokens, targets)
    torch.testing.assert_close(
        forward_backward(other, tokens, theirs), forward_backward(model, tokens, mine), **CLOSE
    )
    for piece in other.pieces():
        if piece.trained:
            source = values[piece.name]
            torch.testing.assert_close(
                piece.view(theirs.gradients.buffer(piece.parameter)),
                source.view(mine.gradients.buffer(source.parameter)),
                **CLOSE,
            )


def test_stages_joined_by_hand_equal_the_whole_model(families, make_model: Callable[..., Model]) -> None:
    """Cut after the embedding, inside the layers and before the head; what crosses is one tensor
    each way."""
    config = families["deepseek_v3"]
    model = make_model(config, torch.float64, 4)
    values = {piece.name: piece.tensor for piece in model.pieces()}
    experts = tuple(range(config.n_routed_experts))
    parts = [
        ModelPart((0,), True, False, experts),
        ModelPart((1, 2, 3), False, False, experts),
        ModelPart((4,), False, True, experts),
    ]
    stages = [build_model(config, part, torch.float64) for part in parts]
    for piece in (piece for stage in stages for piece in stage.pieces()):
        piece.tensor.copy_(values[piece.name])
    tokens, targets = batch(config, 2, 10)
    whole = context_of(tokens, targets)
    expected = forward_backward(model, tokens, whole)
    contexts = [context_of(tokens, targets) for _ in stages]
    inputs, records = (tokens,), []
    for stage, context in zip(stages, contexts, strict=True):
        inputs, record = forward(stage, inputs, context)
        records.append(record)
    torch.testing.assert_close(inputs[0], expected, **CLOSE)
    grads = (None,)
    for stage, context in reversed(list(zip(stages, contexts, strict=True))):
        grads = backward(stage, records.pop(), grads, context)
    expected_pieces = {piece.name: piece for piece in model.pieces()}
    for stage, context in zip(stages, contexts, strict=True):
        for piece in (piece for piece in stage.pieces() if piece.trained):
            source = expected_pieces[piece.name]
            torch.testing.assert_close(
                piece.view(context.gradients.buffer(piece.parameter)),
                source.view(whole.gradients.buffer(source.parameter)),
                **CLOSE,
            )


def test_experts_that_no_token_chose_get_zero_gradients(families, make_model: Callable[..., Model]) -> None:
    config = families["k2"]
    model = make_model(config, torch.float64, 5)
    for router in model.routers().values():
        router.bias.fill_(-100.0)[: config.num_experts_per_tok] = 100.0
    tokens, targets = batch(config, 1, 6)
    context = context_of(tokens, targets)
    forward_backward(model, tokens, context)
    for loads in context.statistics.expert_loads.values():
        assert loads.tolist() == [6] * 4 + [0] * 12
    for piece in model.pieces():
        if ".mlp.experts." in piece.name:
            gradient = piece.view(context.gradients.buffer(piece.parameter))
            expert = int(piece.name.split(".experts.")[1].split(".")[0])
            assert (gradient.abs().max() > 0) == (expert < 4)


def test_evaluation_saves_nothing_and_gives_the_same_loss(family, make_model: Callable[..., Model]) -> None:
    model = make_model(family, torch.float64, 6)
    tokens, targets = batch(family, 2, 7)
    training = forward_backward(model, tokens, context_of(tokens, targets))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = forward_loss(model, tokens, context_of(tokens, targets, gradients=None))
        logits(model, tokens)
    assert not saved
    assert not loss.requires_grad
    torch.testing.assert_close(loss, training)


def test_a_later_token_never_changes_an_earlier_logit(family, make_model: Callable[..., Model]) -> None:
    model = make_model(family, torch.float64, 7)
    tokens, _ = batch(family, 1, 12)
    changed = tokens.clone()
    changed[0, 8] = (tokens[0, 8] + 1) % family.vocab_size
    before, after = logits(model, tokens), logits(model, changed)
    assert torch.equal(before[:, :8], after[:, :8]) or (before[:, :8] - after[:, :8]).abs().max() < 1e-10
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_train_and_keep_wide_gradients_and_statistics(
    family, make_model: Callable[..., Model], dtype: torch.dtype
) -> None:
    model = make_model(family, dtype, 8)
    tokens, targets = batch(family, 2, 16)
    context = context_of(tokens, targets)
    loss = forward_backward(model, tokens, context)
    reference = make_model(family, torch.float64, 8)
    expected = forward_loss(reference, tokens, context_of(tokens, targets, gradients=None))
    assert loss.dtype == torch.float32
    # A bfloat16 routing flip moves single tokens, not the mean loss by a tenth.
    assert abs(loss.item() / expected.item() - 1) < (0.1 if dtype == torch.bfloat16 else 1e-4)
    assert {buffer.dtype for buffer in context.gradients.buffers.values()} == {torch.float32}
    assert all(m.dtype == torch.float32 for m in context.statistics.max_logits.values())
    assert all(router.bias.dtype == torch.float32 for router in model.routers().values())
