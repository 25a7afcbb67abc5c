"""The weight-gradient queue and the linear layers that feed it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.ops.grouped import grouped_linear, grouped_mm, grouped_mm_reference
from k2train.ops.linear import linear
from k2train.ops.weight_grad import PlainGradients, WeightGradQueue


class AddOnly:
    """A sink without buffers in the parameters' shapes."""

    def __init__(self) -> None:
        self.sums: dict[torch.Tensor, torch.Tensor] = {}

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        self.sums[parameter] = self.sums.get(parameter, 0) + gradient

    def buffer(self, parameter: torch.Tensor) -> torch.Tensor:
        return self.sums[parameter]


def parameter(*shape: int, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, dtype=dtype))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("sink_type", [PlainGradients, AddOnly])
def test_a_queued_linear_layer_has_the_gradients_of_a_plain_one(sink_type):
    x, weight, dy = parameter(7, 5), parameter(3, 5), torch.randn(7, 3, dtype=torch.float64)
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), dy)
    queue, sink = WeightGradQueue(), sink_type()
    y = linear(x, weight, queue.slot((1, 2)))
    dx, dw = torch.autograd.grad(y, (x, weight), dy, allow_unused=True)
    assert dw is None
    assert queue.keys() == ((1, 2),)
    assert not queue.empty
    assert queue.drain((1, 2), sink) == 1
    assert queue.empty
    torch.testing.assert_close(dx, expected[0])
    torch.testing.assert_close(sink.buffer(weight), expected[1])


def test_draining_one_key_leaves_the_others():
    queue, sink = WeightGradQueue(), PlainGradients()
    weight = parameter(3, 5)
    for key in ((0, 0), (0, 1), (1, 0)):
        linear(parameter(2, 5), weight, queue.slot(key)).sum().backward()
    assert queue.drain((0, 1), sink) == 1
    assert set(queue.keys()) == {(0, 0), (1, 0)}
    assert queue.drain((5, 5), sink) == 0
    queue.clear()
    assert queue.empty


def test_queue_bytes_count_each_storage_once():
    queue = WeightGradQueue()
    x = parameter(4, 6)
    slot = queue.slot((0, 0))
    first, second = linear(x, parameter(3, 6), slot), linear(x, parameter(2, 6), slot)
    torch.autograd.backward([first, second], [torch.ones_like(first), torch.ones_like(second)])
    assert queue.num_bytes() == 8 * (4 * 6 + 4 * 3 + 4 * 2)
    assert queue.num_bytes((0, 0)) == queue.num_bytes()
    assert queue.num_bytes((0, 1)) == 0


def test_bfloat16_weight_gradients_accumulate_in_float32():
    """1 + 1000 x 2^-10 needs more bits than bfloat16 has; a bfloat16 sum would stay at 1."""
    weight, sink = parameter(1, 1, dtype=torch.bfloat16), PlainGradients()
    for value, times in ((1.0, 1), (2.0**-10, 1000)):
        for _ in range(times):
            queue = WeightGradQueue()
            x = torch.full((1, 1), value, dtype=torch.bfloat16, requires_grad=True)
            linear(x, weight, queue.slot((0, 0))).sum().backward()
            queue.drain((0, 0), sink)
    assert sink.buffer(weight).dtype == torch.float32
    assert sink.buffer(weight).item() == 1 + 1000 * 2.0**-10


def test_the_router_dtype_of_a_linear_layer_keeps_small_differences():
    x = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = parameter(1, 2, dtype=torch.bfloat16)
    weight.data.fill_(1.0)
    queue = WeightGradQueue()
    y = linear(x, weight, queue.slot((0, 0)), compute_dtype=torch.float32)
    assert y.dtype == torch.float32
    assert y.item() == 257.0  # bfloat16 would say 256
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.dtype == torch.bfloat16


counts_strategy = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    counts=counts_strategy,
    widths=st.tuples(st.sampled_from([4, 6, 8, 13, 16]), st.sampled_from([3, 4, 8, 20])),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_grouped_linear_is_a_loop_over_experts_for_any_counts_and_widths(counts, widths, dtype, seed):
    """Also experts without tokens, no tokens at all, and widths that grouped_mm refuses."""
    torch.manual_seed(seed)
    inner, outer = widths
    x = torch.randn(sum(counts), inner, dtype=dtype, requires_grad=True)
    weight = parameter(len(counts), outer, inner, dtype=dtype)
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    chunks = zip(x.split(counts), weight, strict=True)
    expected = torch.cat([F.linear(chunk, matrix) for chunk, matrix in chunks])
    dy = torch.randn_like(expected)
    dx, dw = torch.autograd.grad(expected, (x, weight), dy)
    plain = grouped_linear(x, weight, offsets)
    torch.testing.assert_close(plain, expected)
    for got, want in zip(torch.autograd.grad(plain, (x, weight), dy), (dx, dw), strict=True):
        torch.testing.assert_close(got, want)
    for sink in (PlainGradients(), AddOnly()):
        queue = WeightGradQueue()
        queued = grouped_linear(x, weight, offsets, queue.slot((0, 0)))
        got = torch.autograd.grad(queued, (x, weight), dy, allow_unused=True)
        assert got[1] is None
        torch.testing.assert_close(got[0], dx)
        queue.drain((0, 0), sink)
        torch.testing.assert_close(sink.buffer(weight), dw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_grouped_product_is_the_reference_loop(dtype):
    x, weight = torch.randn(20, 16, dtype=dtype), torch.randn(4, 16, 24, dtype=dtype)
    offsets = torch.tensor([3, 3, 19, 20], dtype=torch.int32)
    torch.testing.assert_close(grouped_mm(x, weight, offsets), grouped_mm_reference(x, weight, offsets))


def test_rows_past_the_last_offset_touch_neither_other_rows_nor_the_weight_gradient():
    x, weight = parameter(10, 16, dtype=torch.float32), parameter(2, 8, 16, dtype=torch.float32)
    offsets = torch.tensor([2, 6], dtype=torch.int32)
    queue, sink = WeightGradQueue(), PlainGradients()
    y = grouped_linear(x, weight, offsets, queue.slot((0, 0)))
    torch.testing.assert_close(y[:6], grouped_linear(x[:6], weight, offsets))
    dy = torch.randn(10, 8)
    dy[6:] = float("nan")
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx[:6].isfinite().all()
    queue.drain((0, 0), sink)
    assert sink.buffer(weight).isfinite().all()
