"""The heads' largest logits beside a log-sum-exp: Triton's early exit and stock operations against
all scores in float64.

Tests called interpreted run in a process of their own, which one test starts (conftest).
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from k2train.ops.attention import causal_attention_reference
from k2train.ops.row_max import stock_largest_logits

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Positions on both sides of a block's 64 and 128, and more than a chunk of sixteen blocks.
LENGTHS = [1, 5, 64, 130, 2100]


@pytest.fixture
def kernels():
    from k2train.ops import row_max_triton

    return row_max_triton


def inputs(length: int, width: int, dtype: torch.dtype = torch.float32, batch: int = 2, heads: int = 3):
    """Queries with positions outside the heads in memory, keys the other way."""
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(batch, length, heads, width, generator=generator).transpose(1, 2)
    k = torch.randn(batch, heads, length, width, generator=generator)
    return q.to(dtype), k.to(dtype)


def scores(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """All causal logits (B, H, S, S), float64."""
    logits = q.double() @ k.double().transpose(2, 3) * scale
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))


def test_the_kernels_pass_their_tests_under_the_interpreter(pass_under_the_interpreter) -> None:
    pass_under_the_interpreter(__file__, 13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS[:-1])
def test_stock_operations_find_the_largest_logit_of_every_head(length, dtype: torch.dtype) -> None:
    """BF16 inputs are exact in float64, and FP32 sums of 48 products are within 48 roundings of the
    terms' size."""
    q, k = inputs(length, 48, dtype)
    want = causal_attention_reference(q.double(), k.double(), k.double(), 0.3)[1]
    got = stock_largest_logits(q, k, 0.3)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("width", [192, 12])
@pytest.mark.parametrize("length", LENGTHS)
def test_interpreted_kernels_find_the_largest_logit_of_every_head(length, width: int, kernels) -> None:
    q, k = inputs(length, width, batch=2 if length < 1000 else 1, heads=3 if length < 1000 else 1)
    logits = scores(q, k, 0.3)
    lse = logits.logsumexp(-1).float()
    got = kernels.largest_logits(q, k, lse, 0.3, -math.inf)
    torch.testing.assert_close(got.double(), logits.amax((0, 2, 3)), rtol=1e-5, atol=1e-5)


@needs_triton
def test_interpreted_heads_whose_log_sums_are_small_report_an_upper_bound_and_the_others_are_exact(
    kernels,
) -> None:
    q, k = inputs(300, 16)
    q[:, 1] *= 8
    logits = scores(q, k, 0.3)
    lse = logits.logsumexp(-1).float()
    bounds = lse.amax((0, 2))
    exact = logits.amax((0, 2, 3)).float()
    above = bounds[[0, 2]].max().item() + 1
    assert exact[1] > above
    got = kernels.largest_logits(q, k, lse, 0.3, above)
    torch.testing.assert_close(got[1], exact[1], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[[0, 2]], bounds[[0, 2]])
    assert (got[[0, 2]] > exact[[0, 2]]).all()
    assert torch.equal(kernels.largest_logits(q, k, lse, 0.3, math.inf), bounds)


@needs_triton
@pytest.mark.parametrize("above", [99.5, 100.0])
def test_interpreted_heads_with_a_large_log_sum_and_no_large_logit_report_an_upper_bound(
    above: float, kernels
) -> None:
    """Rows of the first block have logits of 95 and log sums of 100.5, those of the second 98.5
    each: the first block is looked into and holds nothing above 99.5, the second is skipped and
    must count all the same."""
    q, k = torch.zeros(1, 1, 256, 16), torch.zeros(1, 1, 256, 16)
    q[..., 0], k[..., 0] = 1.0, 95.0
    k[:, :, 200, 0] = 98.5
    lse = torch.full((1, 1, 256), 100.5)
    lse[:, :, 128:] = 98.5
    (got,) = kernels.largest_logits(q, k, lse, 1.0, above).tolist()
    assert 98.5 <= got <= above
    torch.testing.assert_close(kernels.largest_logits(q, k, lse, 1.0, -math.inf).item(), 98.5)


@needs_triton
def test_interpreted_blocks_that_cannot_hold_the_maximum_are_not_computed(kernels) -> None:
    """Log sums that lie: if the kernels looked where they say that nothing is, they would find
    more."""
    q, k = inputs(700, 16, batch=1, heads=1)
    logits = scores(q, k, 0.3)
    lse = torch.full((1, 1, 700), -50.0)
    lse[:, :, 200] = 50.0  # of rows 128 to 255
    got = kernels.largest_logits(q, k, lse, 0.3, -math.inf)
    here = logits[:, :, 128:256].amax().float()
    assert here < logits.amax()
    torch.testing.assert_close(got, here.view(1), rtol=1e-5, atol=1e-5)


@needs_triton
def test_interpreted_largest_logits_are_those_of_positions_that_see_each_other(kernels) -> None:
    q, k = torch.zeros(1, 2, 200, 16), torch.zeros(1, 2, 200, 16)
    q[0, 0, 3, 0], k[0, 0, 50, 0] = 9.0, 9.0  # row 3 does not see key 50
    q[0, 1, 150, 0], k[0, 1, 3, 0] = 9.0, 9.0
    for sign, want in ((1, [0.0, 40.5]), (-1, [0.0, 0.0])):
        lse = scores(sign * q, k, 0.5).logsumexp(-1).float()
        assert kernels.largest_logits(sign * q, k, lse, 0.5, -math.inf).tolist() == want
    # Where all are negative, the zeros past the last position must not count.
    ones = torch.ones(1, 2, 200, 16)
    lse = scores(-ones, ones, 0.5).logsumexp(-1).float()
    assert kernels.largest_logits(-ones, ones, lse, 0.5, -math.inf).tolist() == [-8.0, -8.0]


@needs_triton
@pytest.mark.parametrize(("heads", "length", "batch"), [(64, 4096, 1), (3, 1001, 2)])
def test_the_kernels_compile_for_an_h100(
    heads: int, length: int, batch: int, compile_for_h100, kernels
) -> None:
    """At K2's widths; of its sequences, and of lengths that are multiples of nothing."""
    places = {
        f"{of}_{name}": stride
        for of in "qk"
        for name, stride in (
            ("sequence", length * heads * 192),
            ("head", 192),
            ("position", heads * 192),
        )
    }
    pointers = {"q_ptr": "*bf16", "k_ptr": "*bf16", "bounds_ptr": "*fp32", "maxima_ptr": "*fp32"}
    common = {
        **pointers,
        **places,
        "scale": "fp32",
        "exact_above": "fp32",
        "heads": heads,
        "length": length,
    }
    blocks = kernels.BLOCKS
    constants = {"M": blocks.rows, "N": blocks.keys, **kernels.query_features(192)}
    best = compile_for_h100(
        kernels._best_blocks, {**common, "lse_ptr": "*fp32", "batch": batch}, constants, **blocks.options
    )
    other = compile_for_h100(kernels._other_blocks, common, constants, **blocks.options)
    for compiled in (best, other):
        assert "wgmma.mma_async" in compiled.ptx
        assert compiled.spilled == 0
        # Two programs on a multiprocessor.
        assert compiled.registers <= 128
        assert 2 * compiled.shared <= 227 * 1024


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("length", [*LENGTHS, 4096])
def test_on_a_gpu_the_kernels_find_the_largest_logit_of_every_head(length, kernels) -> None:
    q, k = (t.cuda() for t in inputs(length, 192, torch.bfloat16))
    logits = scores(q, k, 0.1)
    lse = logits.logsumexp(-1).float()
    want = logits.amax((0, 2, 3))
    for exact_above in (-math.inf, want.median().item()):
        got = kernels.largest_logits(q, k, lse, 0.1, exact_above).double()
        exact = want > exact_above
        torch.testing.assert_close(got[exact], want[exact], rtol=1e-4, atol=1e-4)
        assert (got >= want - 1e-4 * want.abs()).all()
    torch.testing.assert_close(stock_largest_logits(q, k, 0.1).double(), want, rtol=1e-4, atol=1e-4)
