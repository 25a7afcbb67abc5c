"""Products of BF16 values with FP32 results: their parts, the router that stands on them, and the
additions on a GPU."""

from __future__ import annotations

import pytest
import torch

from k2train.ops import bf16_products
from k2train.ops.bf16_products import EXACT_PARTS, add_into, bf16_parts, multiply
from k2train.ops.linear import linear, product_of_parts
from k2train.ops.weight_grad import AtOnce, PlainGradients, add_product_into

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def products_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA products by FP32 ones of the same values, so that what is done with them can be
    tried without a GPU.

    They refuse what the CUDA products refuse: factors that are not both BF16, sums that are not
    FP32.
    """

    def takes(x, other, result: torch.dtype = torch.float32):
        return other.dtype == torch.bfloat16 and result == torch.float32

    def product(x, y):
        assert x.dtype == y.dtype == torch.bfloat16
        return x.float() @ y.float()

    def add(total, x, y) -> None:
        assert total.dtype == torch.float32
        total.add_(product(x, y))

    for name, function in (("takes", takes), ("multiply", product), ("add_into", add)):
        monkeypatch.setattr(bf16_products, name, function)


def numbers(*shape: int) -> torch.Tensor:
    """FP32 of very different sizes, with all their bits in use."""
    return torch.randn(shape) * torch.exp(4 * torch.randn(shape))


def test_three_parts_of_an_fp32_number_are_the_number() -> None:
    x = numbers(10_000)
    assert torch.equal(sum(part.double() for part in bf16_parts(x, EXACT_PARTS)), x.double())


def test_fewer_parts_leave_out_what_they_say() -> None:
    x = numbers(10_000)
    for num_parts, bound in ((1, 2.0**-8), (2, 2.0**-17)):
        parts = bf16_parts(x, num_parts)
        assert {part.dtype for part in parts} == {torch.bfloat16}
        left = (sum(part.double() for part in parts) - x.double()).abs()
        assert (left <= bound * x.double().abs()).all()
        assert (left > bound / 2 * x.double().abs()).any()


def test_a_bf16_number_is_its_only_part() -> None:
    x = numbers(5).bfloat16()
    assert [part.data_ptr() for part in bf16_parts(x, 3)] == [x.data_ptr()]


def test_not_finite_gradients_stay_not_finite() -> None:
    x = torch.tensor([float("inf"), float("nan"), 1.0])
    assert sum(bf16_parts(x, 3)).isfinite().tolist() == [False, False, True]


def test_the_routers_input_gradient_is_within_its_bound() -> None:
    """Two parts leave out 2^-17 of each dy; 2 x 40 FP32 additions of at most the sum of magnitudes;
    one rounding to BF16."""
    dy, weight = numbers(30, 40), torch.randn(40, 25).bfloat16()
    got = product_of_parts(dy, weight)
    expected = dy.double() @ weight.double()
    magnitude = dy.double().abs() @ weight.double().abs()
    assert got.dtype == torch.bfloat16
    assert (
        (got.double() - expected).abs() <= (2.0**-17 + 80 * 2.0**-24) * magnitude + 2.0**-8 * expected.abs()
    ).all()


def test_a_router_of_bf16_products_has_scores_and_gradients_of_float64(products_here) -> None:
    """FP32 additions are all that is lost of scores and weight gradient (40 and 3 x 30 of them); dx
    as above."""
    x, weight, dy = torch.randn(30, 40).bfloat16(), torch.randn(25, 40).bfloat16(), numbers(30, 25)
    sink, leaf = PlainGradients(), x.clone().requires_grad_()
    weight = torch.nn.Parameter(weight)
    y = linear(leaf, weight, AtOnce(sink), compute_dtype=torch.float32)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    wide_x, wide_w, wide_dy = x.double(), weight.detach().double(), dy.double()
    for got, left, right, additions in (
        (y, wide_x, wide_w.t(), 40),
        (sink.buffer(weight), wide_dy.t(), wide_x, 90),
    ):
        assert got.dtype == torch.float32
        bound = additions * 2.0**-24 * (left.abs() @ right.abs())
        assert ((got.double() - left @ right).abs() <= bound).all()
    expected, magnitude = wide_dy @ wide_w, wide_dy.abs() @ wide_w.abs()
    assert (
        (dx.double() - expected).abs() <= (2.0**-17 + 50 * 2.0**-24) * magnitude + 2.0**-8 * expected.abs()
    ).all()
    with torch.no_grad():
        assert torch.equal(linear(x, weight, None, compute_dtype=torch.float32), y)


def test_a_cpu_takes_none_of_these_products() -> None:
    x, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    assert not bf16_products.takes(x, weight)


# Rows of K2's experts; a run of an odd number of rows; more columns than rows.
GPU_SHAPES = [(1300, 2048, 7168), (37, 129, 264), (4096, 64, 512), (1, 8, 8)]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("tokens", "outer", "inner"), GPU_SHAPES)
def test_on_a_gpu_a_product_adds_to_its_own_sum(
    tokens, outer, inner, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """out = self of addmm: against float64 (so many FP32 additions), and against the product by
    itself and an addition."""
    monkeypatch.setattr(bf16_products, "ADDS_IN_PLACE", in_place)
    # Columns of a wider gradient, as a run of rows takes them, and a sum that lies inside a larger
    # buffer.
    dy = torch.randn(tokens, outer + 16, device="cuda").bfloat16()[:, 8 : 8 + outer]
    x = torch.randn(tokens, inner, device="cuda").bfloat16()
    flat = torch.randn(outer * inner + 20, device="cuda")
    before = flat.clone()
    total = flat[7 : 7 + outer * inner].view(outer, inner)
    alone = multiply(dy.t(), x)
    expected = total.double() + dy.double().t() @ x.double()
    magnitude = total.double().abs() + dy.double().abs().t() @ x.double().abs()
    apart = total + alone
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    add_into(total, dy.t(), x)
    grown = torch.cuda.max_memory_allocated() - held
    # Tensor cores may cut where FP32 would round, so twice the unit of rounding.
    bound = 2 * (tokens + 1) * 2.0**-24 * magnitude
    assert ((total.double() - expected).abs() <= bound).all()
    assert ((total - apart).double().abs() <= 2 * bound).all()
    assert torch.equal(flat[:7], before[:7])
    assert torch.equal(flat[7 + outer * inner :], before[7 + outer * inner :])
    if in_place and outer * inner > 10**6:
        assert grown < 4 * outer * inner, "a temporary as large as the sum"


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_fp32_gradients_add_products_as_in_float64() -> None:
    dy, x = numbers(500, 48).cuda(), torch.randn(500, 256).bfloat16().cuda()
    total = torch.zeros(48, 256, device="cuda")
    add_product_into(total, dy, x)
    magnitude = dy.double().abs().t() @ x.double().abs()
    assert ((total.double() - dy.double().t() @ x.double()).abs() <= 2 * 1500 * 2.0**-24 * magnitude).all()
