"""The weight-gradient queue and the linear layers that feed it.

Letters: T tokens, D features, N rows, C columns.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.ops.embedding import COLUMNS, EmbeddingWeightGrad, add_sums_of_equal_tokens
from k2train.ops.grouped import GroupedWeightGrad, grouped_linear, grouped_mm, grouped_mm_reference
from k2train.ops.linear import linear
from k2train.ops.norm import inverse_rms, rms_norm, rms_norm_reference
from k2train.ops.weight_grad import AtOnce, PlainGradients, RowRun, WeightGradQueue


class CutGradients:
    """A sink whose matrices lie in runs of two rows, as where rows have different owners."""

    def __init__(self) -> None:
        self.whole = PlainGradients()

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        self.whole.add(parameter, gradient)

    def runs(self, parameter: torch.Tensor) -> list[RowRun]:
        return [
            RowRun(run.matrix, first, min(first + 2, run.last), run.buffer[first : first + 2])
            for run in self.whole.runs(parameter)
            for first in range(0, run.last, 2)
        ]

    def add_rows(self, parameter, rows_N, gradient_NC, first_column: int = 0) -> None:
        self.whole.add_rows(parameter, rows_N, gradient_NC, first_column)

    def buffer(self, parameter: torch.Tensor) -> torch.Tensor:
        return self.whole.buffer(parameter)


def parameter(*shape: int, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, dtype=dtype))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("sink_type", [PlainGradients, CutGradients])
def test_a_queued_linear_layer_has_the_gradients_of_a_plain_one(sink_type) -> None:
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


def test_draining_one_key_leaves_the_others() -> None:
    queue, sink = WeightGradQueue(), PlainGradients()
    weight = parameter(3, 5)
    for key in ((0, 0), (0, 1), (1, 0)):
        linear(parameter(2, 5), weight, queue.slot(key)).sum().backward()
    assert queue.drain((0, 1), sink) == 1
    assert set(queue.keys()) == {(0, 0), (1, 0)}
    assert queue.drain((5, 5), sink) == 0
    queue.clear()
    assert queue.empty


def test_queue_bytes_count_each_storage_once() -> None:
    queue = WeightGradQueue()
    x = parameter(4, 6)
    slot = queue.slot((0, 0))
    first, second = linear(x, parameter(3, 6), slot), linear(x, parameter(2, 6), slot)
    torch.autograd.backward([first, second], [torch.ones_like(first), torch.ones_like(second)])
    assert queue.num_bytes() == 8 * (4 * 6 + 4 * 3 + 4 * 2)
    assert queue.num_bytes((0, 0)) == queue.num_bytes()
    assert queue.num_bytes((0, 1)) == 0


def test_bfloat16_weight_gradients_accumulate_in_float32() -> None:
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


def test_the_router_dtype_of_a_linear_layer_keeps_small_differences() -> None:
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
def test_grouped_linear_is_a_loop_over_experts_for_any_counts_and_widths(counts, widths, dtype, seed) -> None:
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
    for sink in (PlainGradients(), CutGradients()):
        queue = WeightGradQueue()
        queued = grouped_linear(x, weight, offsets, queue.slot((0, 0)))
        got = torch.autograd.grad(queued, (x, weight), dy, allow_unused=True)
        assert got[1] is None
        torch.testing.assert_close(got[0], dx)
        queue.drain((0, 0), sink)
        torch.testing.assert_close(sink.buffer(weight), dw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_grouped_product_is_the_reference_loop(dtype: torch.dtype) -> None:
    x, weight = torch.randn(20, 16, dtype=dtype), torch.randn(4, 16, 24, dtype=dtype)
    offsets = torch.tensor([3, 3, 19, 20], dtype=torch.int32)
    torch.testing.assert_close(grouped_mm(x, weight, offsets), grouped_mm_reference(x, weight, offsets))


def test_rows_past_the_last_offset_touch_neither_other_rows_nor_the_weight_gradient() -> None:
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


def test_experts_whose_rows_the_host_knows_ask_the_device_for_nothing() -> None:
    """The offsets say something else on purpose: they must not be read. One expert has no rows."""
    x, dy, weight = torch.randn(7, 6), torch.randn(7, 5), parameter(3, 5, 6, dtype=torch.float32)
    sink = PlainGradients()
    GroupedWeightGrad(weight, x, dy, torch.full((3,), 99, dtype=torch.int32), (4, 0, 3)).accumulate(sink)
    expected = torch.stack([dy[:4].t() @ x[:4], torch.zeros(5, 6), dy[4:].t() @ x[4:]])
    torch.testing.assert_close(sink.buffer(weight), expected)


@pytest.mark.parametrize("sink_type", [PlainGradients, CutGradients])
def test_many_microbatches_of_bfloat16_experts_sum_as_in_float64(sink_type) -> None:
    """Factors are BF16 in both, so products are exact; 100 x 9 FP32 additions lose at most 900 x
    2^-24 of the sum of magnitudes. One rounding of a microbatch to BF16 alone would lose up to 2^-8
    of it."""
    weight, sink = parameter(2, 4, 8, dtype=torch.bfloat16), sink_type()
    offsets = torch.tensor([4, 9], dtype=torch.int32)
    expected, magnitude = torch.zeros(2, 2, 4, 8, dtype=torch.float64)
    for _ in range(100):
        x, dy = torch.randn(9, 8).bfloat16().requires_grad_(), torch.randn(9, 4).bfloat16()
        grouped_linear(x, weight, offsets, AtOnce(sink), (4, 5)).backward(dy)
        for expert, rows in enumerate((slice(0, 4), slice(4, 9))):
            wide_dy, wide_x = dy[rows].double(), x.detach()[rows].double()
            expected[expert] += wide_dy.t() @ wide_x
            magnitude[expert] += wide_dy.t().abs() @ wide_x.abs()
    error = (sink.buffer(weight).double() - expected).abs()
    assert (error <= 900 * 2.0**-24 * magnitude).all()


def test_many_microbatches_of_a_bfloat16_norm_sum_as_in_float64() -> None:
    """The weight's gradient of every microbatch reaches the sum in FP32. Inputs are BF16 in both;
    each of 16 terms of a microbatch has four FP32 roundings (x, rstd, the two products), and there
    are 50 x 16 additions of them."""
    weight, sink = parameter(24, dtype=torch.bfloat16), PlainGradients()
    wide = weight.detach().double().requires_grad_()
    magnitude = torch.zeros(24, dtype=torch.float64)
    for _ in range(50):
        x, dy = torch.randn(16, 24).bfloat16().requires_grad_(), torch.randn(16, 24).bfloat16()
        rms_norm(x, inverse_rms(x, 1e-6), weight, AtOnce(sink)).backward(dy)
        normed = rms_norm_reference(x.detach().double(), torch.ones(24, dtype=torch.float64), 1e-6)
        magnitude += (normed * dy.double()).abs().sum(0)
        rms_norm_reference(x.detach().double(), wide, 1e-6).backward(dy.double())
    assert weight.grad is None
    assert sink.buffer(weight).dtype == torch.float32
    error = (sink.buffer(weight).double() - wide.grad).abs()
    assert (error <= (50 * 16 + 4) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("tokens", [[], [3], [5, 2, 5, 5, 0, 2, 6], [4] * 9])
@pytest.mark.parametrize("width", [1, 7, COLUMNS + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_equal_tokens_are_added_up_before_they_reach_the_sum(
    tokens, width, dtype: torch.dtype
) -> None:
    """Against torch's index_add; small whole numbers, so that every order of additions is exact."""
    weight, sink = parameter(7, width, dtype=dtype), PlainGradients()
    tokens_T = torch.tensor(tokens, dtype=torch.int64)
    dx_TD = torch.randint(-4, 5, (len(tokens), width)).to(dtype)
    sink.buffer(weight).copy_(torch.randint(-9, 9, (7, width)))
    expected = sink.buffer(weight).index_add(0, tokens_T, dx_TD.to(sink.buffer(weight).dtype))
    add_sums_of_equal_tokens(sink, weight, tokens_T, dx_TD)
    assert torch.equal(sink.buffer(weight), expected)


def test_an_embedding_adds_each_row_once_in_the_order_of_the_tokens() -> None:
    """0.1 three times and 2^24 once: (2^24 + 0.1) + ... would lose every 0.1, their sum first does
    not."""
    weight, cut = parameter(3, 1, dtype=torch.float32), CutGradients()
    cut.buffer(weight).fill_(2.0**24)
    tokens, dx = torch.tensor([1, 0, 1, 1, 1]), torch.full((5, 1), 0.6)
    EmbeddingWeightGrad(weight, tokens, dx).accumulate(cut)
    assert cut.buffer(weight).tolist() == [[2.0**24], [2.0**24 + 2], [2.0**24]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_equal_tokens_add_up_to_the_same_bits_every_time() -> None:
    weight, dx = parameter(50, 2000, dtype=torch.bfloat16).cuda(), torch.randn(4096, 2000).bfloat16().cuda()
    tokens = torch.randint(0, 50, (4096,)).cuda()
    sums = []
    for _ in range(5):
        sink = PlainGradients()
        EmbeddingWeightGrad(weight, tokens, dx).accumulate(sink)
        sums.append(sink.buffer(weight))
    assert all(torch.equal(other, sums[0]) for other in sums)
    expected = torch.zeros(50, 2000, dtype=torch.float64, device="cuda").index_add_(0, tokens, dx.double())
    torch.testing.assert_close(sums[0].double(), expected, rtol=1e-4, atol=1e-3)
