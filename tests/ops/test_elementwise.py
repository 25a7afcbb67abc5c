"""Norm, SwiGLU, rotary, permutation, routing and cross-entropy: gradcheck, references, and what
each saves.

Letters: N copies, S sources, D features.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from k2train.architecture.layer import mixer_of
from k2train.config.compose import load_config
from k2train.config.model import YarnConfig
from k2train.estimate.layer_costs import LOGITS_CHUNK_ELEMENTS
from k2train.ops.cross_entropy import default_chunk_elements, linear_cross_entropy
from k2train.ops.norm import inverse_rms, rms_norm, rms_norm_reference
from k2train.ops.permute import sort_slots, sum_copies, sum_order, sum_slots
from k2train.ops.rotary import (
    RotaryTables,
    rotary_keys,
    rotary_queries,
    rotary_tables,
    rotate_reference,
    softmax_scale,
)
from k2train.ops.routing import attach_loss, chosen_weights, sequence_balance_loss
from k2train.ops.swiglu import swiglu, swiglu_reference, weighted_swiglu
from k2train.ops.weight_grad import add_product_into


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def routing(tokens: int, experts: int, k: int) -> torch.Tensor:
    return torch.rand(tokens, experts).topk(k).indices


def num_saved(function) -> int:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return len(saved)


def of_copies(function):
    """Each backward consumes a copy, so that gradcheck may go through the graph as often as it
    likes."""

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            return function(*inputs)

    return call


def test_gradcheck_of_every_custom_function() -> None:
    check = torch.autograd.gradcheck
    assert check(lambda x, w: rms_norm(x, inverse_rms(x, 1e-3), w), (leaf(4, 5), leaf(5)))
    assert check(of_copies(swiglu), (leaf(3, 10),))
    assert check(of_copies(weighted_swiglu), (leaf(3, 10), leaf(3)))
    cos, sin = torch.rand(6, 2, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    for nope in (2, 3):
        tables = RotaryTables.of(cos, sin, nope)
        assert check(lambda q, t=tables: rotary_queries(q, t), (leaf(2, 6, 3, nope + 4),))
        assert check(lambda kv, k, t=tables: rotary_keys(kv, k, t), (leaf(2, 6, 3, nope + 2), leaf(2, 6, 4)))


@pytest.mark.parametrize("normalise", [True, False])
def test_gradcheck_of_routing_weights_and_balance_loss(normalise: bool) -> None:
    experts = routing(6, 5, 2)
    scores = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: chosen_weights(s, experts, normalise, 2.5), (scores,))
    counts = torch.randint(0, 4, (2, 5))
    assert torch.autograd.gradcheck(lambda s: sequence_balance_loss(s, counts, 2), (scores,))


@pytest.mark.parametrize("chunk_elements", [1, 20, 10**6])
def test_gradcheck_of_linear_cross_entropy_with_ignored_targets(chunk_elements: int) -> None:
    targets = torch.tensor([0, 4, -100, 2, 1])
    hidden, weight = leaf(5, 3), leaf(7, 3)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, 0.3, None, chunk_elements), (hidden, weight)
    )
    expected = 0.3 * F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, targets, 0.3, None, chunk_elements), expected
    )


def test_a_gpu_has_as_many_logits_alive_as_the_plan_assumes_and_a_cpu_an_eighth() -> None:
    assert default_chunk_elements(torch.device("cuda", 1)) == LOGITS_CHUNK_ELEMENTS
    assert default_chunk_elements(torch.device("cpu")) == LOGITS_CHUNK_ELEMENTS // 8


def test_linear_cross_entropy_adds_the_weight_gradient_to_a_buffer_it_is_given() -> None:
    targets = torch.tensor([0, 4, 2])
    hidden, weight = leaf(3, 3), leaf(5, 3)
    loss = linear_cross_entropy(hidden, weight, targets, 0.5)
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    buffer = torch.ones(5, 3, dtype=torch.float64)
    add = functools.partial(add_product_into, buffer)
    same = linear_cross_entropy(hidden, weight.detach(), targets, 0.5, add, chunk_elements=5)
    torch.testing.assert_close(buffer, dweight + 1)
    torch.testing.assert_close(torch.autograd.grad(same, hidden)[0], dhidden)


def test_linear_cross_entropy_of_hopeless_tokens_is_finite() -> None:
    """The target's probability underflows to 0 in FP32, but its logarithm is just the difference of
    logits."""
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.0], [500.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0]))
    assert loss.item() == 500.0
    assert torch.autograd.grad(loss, hidden)[0].item() == 500.0


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "mm" in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def test_linear_cross_entropy_without_gradients_makes_none() -> None:
    """A parameter asks for its gradient inside an autograd function even where gradients are
    off."""
    hidden, targets = leaf(4, 3), torch.tensor([0, 6, 2, 1])
    weight = torch.nn.Parameter(torch.randn(7, 3, dtype=torch.float64))
    with Products() as training:
        expected = linear_cross_entropy(hidden, weight, targets)
    with torch.no_grad(), Products() as evaluation:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(loss, expected)
    assert (training.count, evaluation.count) == (3, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_swiglu_equal_their_references(dtype: torch.dtype) -> None:
    x, weight, gate_up = leaf(9, 24, dtype=dtype), leaf(24, dtype=dtype), leaf(9, 26, dtype=dtype)
    torch.testing.assert_close(rms_norm(x, inverse_rms(x, 1e-6), weight), rms_norm_reference(x, weight, 1e-6))
    torch.testing.assert_close(swiglu(gate_up), swiglu_reference(gate_up))
    dy = torch.randn(9, 24, dtype=dtype)
    got = torch.autograd.grad(rms_norm(x, inverse_rms(x, 1e-6), weight), (x, weight), dy)
    want = torch.autograd.grad(rms_norm_reference(x, weight, 1e-6), (x, weight), dy)
    for one, other in zip(got, want, strict=True):
        # The reference rounds each step to bfloat16, ours once.
        torch.testing.assert_close(one, other, rtol=0.05 if dtype == torch.bfloat16 else 1e-5, atol=0.05)


def test_operations_save_what_they_say_and_no_more() -> None:
    x, weight = leaf(4, 6), leaf(6)
    assert num_saved(lambda: rms_norm(x, inverse_rms(x, 1e-6), weight)) == 2
    assert num_saved(lambda: rms_norm_reference(x, weight, 1e-6)) > 3
    assert num_saved(lambda: swiglu(x)) == 1
    assert num_saved(lambda: weighted_swiglu(x, torch.rand(x.shape[0], requires_grad=True))) == 2
    assert num_saved(lambda: swiglu_reference(x)) > 1
    cos, sin = torch.rand(4, 1, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    tables = RotaryTables.of(cos, sin, 3)
    assert num_saved(lambda: rotary_queries(leaf(1, 4, 2, 5), tables)) == 0
    assert num_saved(lambda: rotary_keys(leaf(1, 4, 2, 5), leaf(1, 4, 2), tables)) == 0


def test_rows_are_sorted_by_expert_and_in_token_order_within_one() -> None:
    experts = torch.tensor([[2, 0], [0, 1], [2, 1]])
    order = sort_slots(experts)
    assert experts.reshape(-1)[order.slot_of_row].tolist() == [0, 0, 1, 1, 2, 2]
    assert order.token_of_row.tolist() == [0, 1, 1, 2, 0, 2]
    rows = torch.arange(6.0).unsqueeze(1)
    assert sum_slots(rows, order.row_of_slot).squeeze(1).tolist() == [4.0, 3.0, 8.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("copies", "sources"), [(0, 3), (1, 1), (12, 5), (3, 9)])
def test_copies_are_added_up_at_their_source(dtype: torch.dtype, copies: int, sources: int) -> None:
    """Against torch's index_add; small whole numbers, so that every type adds them exactly."""
    generator = torch.Generator().manual_seed(copies)
    source_N = torch.randint(sources, (copies,), generator=generator)
    rows_ND = torch.randint(-4, 5, (copies, 3), generator=generator).to(dtype)
    expected_SD = torch.zeros(sources, 3, dtype=dtype).index_add(0, source_N, rows_ND)
    assert torch.equal(sum_copies(rows_ND, *sum_order(source_N, sources)), expected_SD)


def test_an_attached_loss_gets_its_gradient_and_changes_no_value() -> None:
    x, y = leaf(3), leaf(3)
    out = attach_loss(x, y.pow(2).sum(), 0.25)
    assert torch.equal(out, x)
    dx, dy = torch.autograd.grad(out, (x, y), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(dx, torch.ones_like(dx))
    torch.testing.assert_close(dy, 0.5 * y)


def test_balance_loss_is_1_when_even_and_the_number_of_experts_over_k_when_one_takes_all() -> None:
    even = sequence_balance_loss(torch.full((8, 4), 0.3), torch.full((1, 4), 4), 2)
    assert even.item() == pytest.approx(1.0)
    scores = torch.zeros(8, 4)
    scores[:, 0] = 1.0
    assert sequence_balance_loss(scores, torch.tensor([[8, 0, 0, 0]]), 1).item() == pytest.approx(4.0)


def test_rotation_keeps_lengths_and_scores_depend_on_distance_alone() -> None:
    model = dataclasses.replace(load_config(["model=k2_tiny"]).model, qk_nope_head_dim=2)
    tables = rotary_tables(model, 12, torch.float64, torch.device("cpu"))
    vector = torch.randn(mixer_of(model).heads.query, dtype=torch.float64)
    same = vector.expand(1, 12, 1, -1)
    rotated = rotary_queries(same, tables)[0, 0]
    torch.testing.assert_close(rotated.norm(dim=1), vector.norm().expand(12), rtol=1e-6, atol=1e-6)
    scores = rotated @ rotated.T
    torch.testing.assert_close(scores[3, 1], scores[11, 9], rtol=1e-5, atol=1e-5)
    assert (scores[3, 1] - scores[3, 2]).abs() > 1e-3


def test_softmax_scale_follows_yarn() -> None:
    model = load_config(["model=k2"]).model
    mscale = 0.1 * 3.4657359027997265 + 1  # ln 32
    assert softmax_scale(model) == pytest.approx(192**-0.5 * mscale**2)
    assert softmax_scale(dataclasses.replace(model, rope_scaling=None)) == pytest.approx(192**-0.5)
    no_all_dim = YarnConfig(factor=32.0, original_max_position_embeddings=64)
    assert softmax_scale(dataclasses.replace(model, rope_scaling=no_all_dim)) == pytest.approx(192**-0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("nope", [2, 3])
def test_a_pair_turned_as_a_complex_number_is_the_pair_turned_by_hand(dtype: torch.dtype, nope: int) -> None:
    """Even offsets take the complex product, odd ones the two halves; both round each of two
    products and their sum."""
    q = torch.randn(2, 6, 3, nope + 8, dtype=dtype, requires_grad=True)
    cos, sin = torch.rand(6, 4, dtype=dtype), torch.rand(6, 4, dtype=dtype)
    rotated = rotary_queries(q, RotaryTables.of(cos, sin, nope))
    expected = q.detach().transpose(1, 2).clone()
    rotate_reference(expected[..., nope:], q.detach().transpose(1, 2)[..., nope:], cos, sin)
    torch.testing.assert_close(rotated, expected)
    dout = torch.randn_like(rotated)
    (dq,) = torch.autograd.grad(rotated, q, dout)
    back = dout.transpose(1, 2).clone()
    rotate_reference(back[..., nope:], dout.transpose(1, 2)[..., nope:], cos[:, None], -sin[:, None])
    torch.testing.assert_close(dq, back)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_swiglu_are_those_of_its_reference(dtype: torch.dtype) -> None:
    """In bfloat16 the reference rounds at each of its three steps, a relative 2^-8 each; ours
    rounds once."""
    gate_up, dy = leaf(9, 26, dtype=dtype), torch.randn(9, 13, dtype=dtype)
    (want,) = torch.autograd.grad(swiglu_reference(gate_up), gate_up, dy)
    (got,) = torch.autograd.grad(swiglu(gate_up), gate_up, dy)
    tolerance = 3 * 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_swiglu_writes_its_gradient_over_its_input_and_says_so_to_others_that_saved_it() -> None:
    gate_up = leaf(3, 10)
    fed = gate_up.clone()
    (dfed,) = torch.autograd.grad(swiglu(fed).sum(), fed)
    assert dfed.data_ptr() == fed.data_ptr()
    shared = gate_up.clone()
    squared, out = shared.square(), swiglu(shared)
    torch.autograd.grad(out.sum(), shared)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(squared.sum(), shared)


@pytest.mark.parametrize("rows", [9, 1, 0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weighted_swiglu_is_its_reference_times_a_weight_a_row(dtype: torch.dtype, rows: int) -> None:
    """The weights are FP32 beside bfloat16 rows. One of them is 0, which stops its row but not the
    weight's own gradient.

    Against float64. In bfloat16 forward rounds three times and backward once, a relative 2^-8 each;
    a weight's gradient sums 13 products in FP32.
    """
    gate_up, dy = leaf(rows, 26, dtype=dtype), torch.randn(rows, 13, dtype=dtype)
    weights = torch.rand(rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weights[:1] = 0.0
    weights.requires_grad_()
    wide, wide_weights = (
        t.detach().to(torch.float64, copy=True).requires_grad_() for t in (gate_up, weights)
    )
    expected = swiglu_reference(wide) * wide_weights.unsqueeze(1)
    out = weighted_swiglu(gate_up, weights)
    tolerance = 3 * 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(out, (gate_up, weights), dy)
    want = torch.autograd.grad(expected, (wide, wide_weights), dy.double())
    for one, other, like in zip(got, want, (gate_up, weights), strict=True):
        assert one.dtype == like.dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
