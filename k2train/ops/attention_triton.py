"""Causal attention that also returns every head's largest logit, as Triton kernels: no score ever leaves a program.

Three kernels. `_forward` takes a block of rows against all keys up to it, with the softmax of what it has seen so far
(FlashAttention, arXiv 2205.14135, 2307.08691), and leaves each row's log-sum-exp. `_row_gradients` goes the same way once
more for the gradient of q; `_key_gradients` takes a block of keys against all rows from it on. That is seven products in
the backward; with both in one kernel it would be five, but sums in memory whose order changes from run to run.

Products are in the inputs' type with FP32 sums; softmax and sums over keys are FP32. Features of queries and keys are
cut into two powers of two (MLA's 192 into 128 and 64), since a block's sides must be such.

Needs triton (the `gpu` extra), so only `attention` imports this module, and only where there is a GPU.

Letters: G = B x H heads of all sequences, S positions, M rows and N keys of a block, K query and key features, V value features.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl

# A product's sides are 16 at least.
MIN_SIDE = 16
# Powers of 2 are what the hardware has: exp(x) = 2^(x log2 e). Every row sees the first block's first key, so that its
# maximum is finite from there on.
LOG2_E = tl.constexpr(math.log2(math.e))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows and keys of a block, and how a launch runs it."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# Shared memory of an H100 holds them at 192 and 128 features of 16 bits (tests compile them for it).
FORWARD = Blocks(rows=128, keys=64, num_warps=8, num_stages=2)
ROW_GRADIENTS = Blocks(rows=64, keys=64, num_warps=8, num_stages=2)
KEY_GRADIENTS = Blocks(rows=32, keys=64, num_warps=8, num_stages=2)


def features(query: int, value: int) -> dict[str, int]:
    """The constants that say how features are cut: K = K1 + K2 at most, K2 may be 0; V up to VP."""
    first = max(1 << (query.bit_length() - 1), MIN_SIDE)
    rest = query - first
    second = max(triton.next_power_of_2(rest), MIN_SIDE) if rest > 0 else 0
    return {
        "K": query,
        "V": value,
        "K1": first,
        "K2": second,
        "VP": max(triton.next_power_of_2(value), MIN_SIDE),
    }


def fused_attention(
    q_BHSK: torch.Tensor, k_BHSK: torch.Tensor, v_BHSV: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T, causal) v as (B, S, H, V), the largest scaled logit of each head (H,), and the log2-sum-exp2
    of each row (B, H, S), both FP32. Saves q, k, v, the output and the last, and has a gradient for the output alone."""
    return _FusedAttention.apply(q_BHSK.contiguous(), k_BHSK.contiguous(), v_BHSV.contiguous(), scale)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, heads, length, query = q.shape
        value = v.shape[-1]
        out_BSHV = v.new_empty(batch, length, heads, value)
        num_blocks = triton.cdiv(length, FORWARD.rows)
        maxima_BHM = q.new_empty(batch, heads, num_blocks, dtype=torch.float32)
        lse_BHS = q.new_empty(batch, heads, length, dtype=torch.float32)
        with torch.cuda.device_of(q):
            _forward[(batch * heads, num_blocks)](
                q, k, v, out_BSHV, lse_BHS, maxima_BHM, scale, heads, length,
                M=FORWARD.rows, N=FORWARD.keys, **features(query, value), **FORWARD.options,
            )  # fmt: skip
        max_H = maxima_BHM.amax((0, 2))
        ctx.save_for_backward(q, k, v, out_BSHV, lse_BHS)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(max_H, lse_BHS)
        return out_BSHV, max_H, lse_BHS

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None, None
        q, k, v, out_BSHV, lse_BHS = ctx.saved_tensors
        dout_BSHV = grads[0].contiguous()
        # What the softmax's gradient subtracts in each row, the sum of p dp, is the product of output and gradient.
        sums_BHS = (out_BSHV.float() * dout_BSHV).sum(-1).transpose(1, 2).contiguous()
        batch, heads, length, query = q.shape
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        inputs = (q, k, v, dout_BSHV, lse_BHS, sums_BHS)
        cut = features(query, v.shape[-1])
        with torch.cuda.device_of(q):
            _row_gradients[(batch * heads, triton.cdiv(length, ROW_GRADIENTS.rows))](
                *inputs, dq, ctx.scale, heads, length,
                M=ROW_GRADIENTS.rows, N=ROW_GRADIENTS.keys, **cut, **ROW_GRADIENTS.options,
            )  # fmt: skip
            _key_gradients[(batch * heads, triton.cdiv(length, KEY_GRADIENTS.keys))](
                *inputs, dk, dv, ctx.scale, heads, length,
                M=KEY_GRADIENTS.rows, N=KEY_GRADIENTS.keys, **cut, **KEY_GRADIENTS.options,
            )  # fmt: skip
        return dq, dk, dv, None


@triton.jit
def _load(ptr, position, length, stride, first, features, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """From `first` on, up to WIDTH of so many features at the positions (rows, WIDTH); zero outside."""
    feature = first + tl.arange(0, WIDTH)
    mask = (position < length)[:, None] & (feature < features)[None, :]
    return tl.load(ptr + position[:, None] * stride + feature[None, :], mask=mask, other=0.0)


@triton.jit
def _load_parts(ptr, position, length, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both parts of queries or keys (rows, K1), (rows, K2); where there is no second part, the first once more."""
    first = _load(ptr, position, length, K, 0, K, K1)
    second = _load(ptr, position, length, K, K1, K, K2) if K2 > 0 else first
    return first, second


@triton.jit
def _store(ptr, value, position, length, stride, first, features, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    feature = first + tl.arange(0, WIDTH)
    mask = (position < length)[:, None] & (feature < features)[None, :]
    tl.store(ptr + position[:, None] * stride + feature[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_parts(ptr, first, second, position, length, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr):  # type: ignore[no-untyped-def]
    """The other way; where there is no second part, it is left alone."""
    _store(ptr, first, position, length, K, 0, K, K1)
    if K2 > 0:
        _store(ptr, second, position, length, K, K1, K, K2)


@triton.jit
def _of_head(q_ptr, k_ptr, v_ptr, out_ptr, head, heads, length, K: tl.constexpr, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a head's queries, keys and values begin, each together in memory, and its output, beside the other heads'."""
    out_ptr += ((head // heads) * length * heads + head % heads) * V
    return q_ptr + head * length * K, k_ptr + head * length * K, v_ptr + head * length * V, out_ptr


@triton.jit
def _product(a, b):  # type: ignore[no-untyped-def]
    """a b with FP32 sums; FP32 inputs are not rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _products(a1, a2, b1, b2, TWO: tl.constexpr):  # type: ignore[no-untyped-def]
    """a b^T over both parts of the features; the second counts where there is one."""
    product = _product(a1, tl.trans(b1))
    if TWO:
        product += _product(a2, tl.trans(b2))
    return product


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, maxima_ptr, scale, heads, length, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    # The blocks with the most keys first, so that no long one is left at the end.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    # 64 bits: heads times positions times features may pass 2^31.
    head = tl.program_id(0).to(tl.int64)
    q_ptr, k_ptr, v_ptr, out_ptr = _of_head(q_ptr, k_ptr, v_ptr, out_ptr, head, heads, length, K, V)
    row = block * M + tl.arange(0, M)
    q1, q2 = _load_parts(q_ptr, row, length, K, K1, K2)
    exponent = scale * LOG2_E
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, VP), tl.float32)
    for start in range(0, tl.minimum((block + 1) * M, length), N):
        column = start + tl.arange(0, N)
        k1, k2 = _load_parts(k_ptr, column, length, K, K1, K2)
        v = _load(v_ptr, column, length, V, 0, V, VP)
        scores = _products(q1, q2, k1, k2, K2 > 0)
        scores = tl.where(column[None, :] <= row[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2((scores - higher[:, None]) * exponent)
        shrink = tl.exp2((top - higher) * exponent)
        total = total * shrink + tl.sum(p, axis=1)
        out = out * shrink[:, None] + _product(p.to(v.dtype), v)
        top = higher
    _store(out_ptr, out / total[:, None], row, length, heads * V, 0, V, VP)
    tl.store(lse_ptr + head * length + row, top * exponent + tl.log2(total), mask=row < length)
    largest = tl.max(tl.where(row < length, top, float("-inf")), axis=0)
    tl.store(maxima_ptr + head * tl.num_programs(1) + block, largest * scale)


@triton.jit
def _row_gradients(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, sums_ptr, dq_ptr, scale, heads, length, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """dq of a block of rows."""
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    head = tl.program_id(0).to(tl.int64)
    q_ptr, k_ptr, v_ptr, dout_ptr = _of_head(q_ptr, k_ptr, v_ptr, dout_ptr, head, heads, length, K, V)
    row = block * M + tl.arange(0, M)
    q1, q2 = _load_parts(q_ptr, row, length, K, K1, K2)
    dout = _load(dout_ptr, row, length, heads * V, 0, V, VP)
    lse = tl.load(lse_ptr + head * length + row, mask=row < length, other=0.0)
    p_dp = tl.load(sums_ptr + head * length + row, mask=row < length, other=0.0)
    dq1 = tl.zeros((M, K1), tl.float32)
    dq2 = tl.zeros((M, K2), tl.float32) if K2 > 0 else dq1
    for start in range(0, tl.minimum((block + 1) * M, length), N):
        column = start + tl.arange(0, N)
        k1, k2 = _load_parts(k_ptr, column, length, K, K1, K2)
        v = _load(v_ptr, column, length, V, 0, V, VP)
        scores = _products(q1, q2, k1, k2, K2 > 0)
        scores = tl.where(column[None, :] <= row[:, None], scores, float("-inf"))
        p = tl.exp2(scores * (scale * LOG2_E) - lse[:, None])
        ds = (p * (_product(dout, tl.trans(v)) - p_dp[:, None])).to(k1.dtype)
        dq1 += _product(ds, k1)
        if K2 > 0:
            dq2 += _product(ds, k2)
    _store_parts(dq_ptr + head * length * K, dq1 * scale, dq2 * scale, row, length, K, K1, K2)


@triton.jit
def _key_gradients(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, sums_ptr, dk_ptr, dv_ptr, scale, heads, length, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys. Scores and their gradients are held transposed (N, M)."""
    block = tl.program_id(1)
    head = tl.program_id(0).to(tl.int64)
    q_ptr, k_ptr, v_ptr, dout_ptr = _of_head(q_ptr, k_ptr, v_ptr, dout_ptr, head, heads, length, K, V)
    column = block * N + tl.arange(0, N)
    k1, k2 = _load_parts(k_ptr, column, length, K, K1, K2)
    v = _load(v_ptr, column, length, V, 0, V, VP)
    dk1 = tl.zeros((N, K1), tl.float32)
    dk2 = tl.zeros((N, K2), tl.float32) if K2 > 0 else dk1
    dv = tl.zeros((N, VP), tl.float32)
    for start in range((block * N) // M * M, length, M):
        row = start + tl.arange(0, M)
        q1, q2 = _load_parts(q_ptr, row, length, K, K1, K2)
        dout = _load(dout_ptr, row, length, heads * V, 0, V, VP)
        lse = tl.load(lse_ptr + head * length + row, mask=row < length, other=0.0)
        p_dp = tl.load(sums_ptr + head * length + row, mask=row < length, other=0.0)
        scores = _products(k1, k2, q1, q2, K2 > 0)
        visible = (column[:, None] <= row[None, :]) & (row < length)[None, :]
        p = tl.exp2(tl.where(visible, scores, float("-inf")) * (scale * LOG2_E) - lse[None, :])
        dv += _product(p.to(v.dtype), dout)
        ds = (p * (_product(v, tl.trans(dout)) - p_dp[None, :])).to(k1.dtype)
        dk1 += _product(ds, q1)
        if K2 > 0:
            dk2 += _product(ds, q2)
    _store_parts(dk_ptr + head * length * K, dk1 * scale, dk2 * scale, column, length, K, K1, K2)
    _store(dv_ptr + head * length * V, dv, column, length, V, 0, V, VP)
