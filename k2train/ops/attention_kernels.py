"""The Triton programs of causal attention, without their launches (`attention_triton`,
`row_max_triton`).

A program takes a block of rows against the keys up to it, or a block of keys against the rows from
it on. Only the blocks on the diagonal are masked: a loop runs over those that every row sees whole,
with no comparison and no mask on its loads, and another over the few on the diagonal. Blocks are
numbered so that neighbours in a launch share a head and so its keys and values in the L2 cache,
those with the most work first.

Products are in the inputs' type with FP32 sums; softmax and sums over keys are FP32. Features of
queries and keys are cut into two powers of two (MLA's 192 into 128 and 64), since a block's sides
must be such.

Letters: G = B x H heads of all sequences, S positions, M rows and N keys of a block, K query and
key features (K1 and K2 their two parts, K2 may be 0), V value features (VP the power of two that
holds them).
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

# Powers of 2 are what the hardware has: exp(x) = 2^(x log2 e). Every row sees the first block's
# first key, so that its maximum is finite from there on.
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def load_rows(  # type: ignore[no-untyped-def]
    ptr,
    position,
    length,
    stride,
    first: tl.constexpr,
    features: tl.constexpr,
    WIDTH: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Features `first` to `first + WIDTH` of the positions (rows, WIDTH), zero past the last
    feature.

    CHECK: positions may lie past the last, and are zero there.
    """
    feature = first + tl.arange(0, WIDTH)
    place = ptr + position[:, None] * stride + feature[None, :]
    if CHECK:
        if first + WIDTH > features:
            mask = (position < length)[:, None] & (feature < features)[None, :]
            return tl.load(place, mask=mask, other=0.0)
        else:
            return tl.load(place, mask=(position < length)[:, None], other=0.0)
    else:
        if first + WIDTH > features:
            return tl.load(place, mask=(feature < features)[None, :], other=0.0)
        else:
            return tl.load(place)


@triton.jit
def load_parts(  # type: ignore[no-untyped-def]
    ptr, position, length, stride, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, CHECK: tl.constexpr
):
    """Both parts of queries or keys (rows, K1), (rows, K2); where there is no second part, the
    first once more."""
    first = load_rows(ptr, position, length, stride, 0, K, K1, CHECK)
    second = load_rows(ptr, position, length, stride, K1, K, K2, CHECK) if K2 > 0 else first
    return first, second


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    ptr, value, position, length, stride, first: tl.constexpr, features: tl.constexpr, WIDTH: tl.constexpr
):
    feature = first + tl.arange(0, WIDTH)
    mask = (position < length)[:, None] & (feature < features)[None, :]
    tl.store(ptr + position[:, None] * stride + feature[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_parts(  # type: ignore[no-untyped-def]
    ptr, first, second, position, length, K: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr
):
    """The other way; where there is no second part, it is left alone."""
    _store(ptr, first, position, length, K, 0, K, K1)
    if K2 > 0:
        _store(ptr, second, position, length, K, K1, K, K2)


@triton.jit
def _of_head(q_ptr, k_ptr, v_ptr, out_ptr, head, heads, length, K: tl.constexpr, V: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a head's queries, keys and values begin, each together in memory, and its output,
    beside the other heads'."""
    out_ptr += ((head // heads) * length * heads + head % heads) * V
    return q_ptr + head * length * K, k_ptr + head * length * K, v_ptr + head * length * V, out_ptr


@triton.jit
def _product(a, b):  # type: ignore[no-untyped-def]
    """a b with FP32 sums; FP32 inputs are not rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def products(a1, a2, b1, b2, TWO: tl.constexpr):  # type: ignore[no-untyped-def]
    """a b^T over both parts of the features; the second counts where there is one."""
    product = _product(a1, tl.trans(b1))
    if TWO:
        product += _product(a2, tl.trans(b2))
    return product


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    out,
    top,
    total,
    q1,
    q2,
    k_ptr,
    v_ptr,
    row,
    first,
    last,
    length,
    exponent,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    VP: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """The running output, maximum and sum of a block of rows after keys `first` to `last`."""
    for start in range(first, last, N):
        column = start + tl.arange(0, N)
        k1, k2 = load_parts(k_ptr, column, length, K, K, K1, K2, DIAGONAL)
        v = load_rows(v_ptr, column, length, V, 0, V, VP, DIAGONAL)
        scores = products(q1, q2, k1, k2, K2 > 0)
        if DIAGONAL:
            scores = tl.where(column[None, :] <= row[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2(scores * exponent - (higher * exponent)[:, None])
        shrink = tl.exp2((top - higher) * exponent)
        total = total * shrink + tl.sum(p, axis=1)
        out = out * shrink[:, None] + _product(p.to(v.dtype), v)
        top = higher
    return out, top, total


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    maxima_ptr,
    scale,
    heads,
    length,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    VP: tl.constexpr,
):
    """Output, log2-sum-exp2 and largest scaled logit of a block of rows."""
    num_blocks = tl.cdiv(length, M)
    # Last rows first: they see the most keys.
    block = num_blocks - 1 - tl.program_id(0) % num_blocks
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    q_ptr, k_ptr, v_ptr, out_ptr = _of_head(q_ptr, k_ptr, v_ptr, out_ptr, head, heads, length, K, V)
    row = block * M + tl.arange(0, M)
    q1, q2 = load_parts(q_ptr, row, length, K, K, K1, K2, True)
    exponent = scale * LOG2_E
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, VP), tl.float32)
    out, top, total = _attend(
        out, top, total, q1, q2, k_ptr, v_ptr, row, 0, block * M, length, exponent, N, K, V, K1, K2, VP, False
    )
    out, top, total = _attend(
        out,
        top,
        total,
        q1,
        q2,
        k_ptr,
        v_ptr,
        row,
        block * M,
        tl.minimum((block + 1) * M, length),
        length,
        exponent,
        N,
        K,
        V,
        K1,
        K2,
        VP,
        True,
    )
    _store(out_ptr, out / total[:, None], row, length, heads * V, 0, V, VP)
    tl.store(lse_ptr + head * length + row, top * exponent + tl.log2(total), mask=row < length)
    largest = tl.max(tl.where(row < length, top, float("-inf")), axis=0)
    tl.store(maxima_ptr + head * num_blocks + block, largest * scale)


@triton.jit
def output_products(  # type: ignore[no-untyped-def]
    out_ptr, dout_ptr, sums_ptr, rows, heads, length, ROWS: tl.constexpr, V: tl.constexpr, VP: tl.constexpr
):
    """Each row's sum of output times its gradient. Rows lie as the output does, (B, S, H); sums as
    (B, H, S)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    out = load_rows(out_ptr, row, rows, V, 0, V, VP, True).to(tl.float32)
    dout = load_rows(dout_ptr, row, rows, V, 0, V, VP, True).to(tl.float32)
    token, head = row // heads, row % heads
    place = ((token // length) * heads + head) * length + token % length
    tl.store(sums_ptr + place, tl.sum(out * dout, axis=1), mask=row < rows)


@triton.jit
def _row_gradient_sums(  # type: ignore[no-untyped-def]
    dq1,
    dq2,
    q1,
    q2,
    dout,
    lse,
    p_dp,
    k_ptr,
    v_ptr,
    row,
    first,
    last,
    length,
    exponent,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    VP: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """The sums of dq, not yet scaled, after keys `first` to `last`."""
    for start in range(first, last, N):
        column = start + tl.arange(0, N)
        k1, k2 = load_parts(k_ptr, column, length, K, K, K1, K2, DIAGONAL)
        v = load_rows(v_ptr, column, length, V, 0, V, VP, DIAGONAL)
        scores = products(q1, q2, k1, k2, K2 > 0)
        if DIAGONAL:
            scores = tl.where(column[None, :] <= row[:, None], scores, float("-inf"))
        p = tl.exp2(scores * exponent - lse[:, None])
        ds = (p * (_product(dout, tl.trans(v)) - p_dp[:, None])).to(k1.dtype)
        dq1 += _product(ds, k1)
        if K2 > 0:
            dq2 += _product(ds, k2)
    return dq1, dq2


@triton.jit
def row_gradients(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    sums_ptr,
    dq_ptr,
    scale,
    heads,
    length,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    VP: tl.constexpr,
):
    """dq of a block of rows."""
    num_blocks = tl.cdiv(length, M)
    block = num_blocks - 1 - tl.program_id(0) % num_blocks
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    q_ptr, k_ptr, v_ptr, dout_ptr = _of_head(q_ptr, k_ptr, v_ptr, dout_ptr, head, heads, length, K, V)
    row = block * M + tl.arange(0, M)
    q1, q2 = load_parts(q_ptr, row, length, K, K, K1, K2, True)
    dout = load_rows(dout_ptr, row, length, heads * V, 0, V, VP, True)
    lse = tl.load(lse_ptr + head * length + row, mask=row < length, other=0.0)
    p_dp = tl.load(sums_ptr + head * length + row, mask=row < length, other=0.0)
    exponent = scale * LOG2_E
    dq1 = tl.zeros((M, K1), tl.float32)
    dq2 = tl.zeros((M, K2), tl.float32) if K2 > 0 else dq1
    dq1, dq2 = _row_gradient_sums(
        dq1,
        dq2,
        q1,
        q2,
        dout,
        lse,
        p_dp,
        k_ptr,
        v_ptr,
        row,
        0,
        block * M,
        length,
        exponent,
        N,
        K,
        V,
        K1,
        K2,
        VP,
        False,
    )
    dq1, dq2 = _row_gradient_sums(
        dq1,
        dq2,
        q1,
        q2,
        dout,
        lse,
        p_dp,
        k_ptr,
        v_ptr,
        row,
        block * M,
        tl.minimum((block + 1) * M, length),
        length,
        exponent,
        N,
        K,
        V,
        K1,
        K2,
        VP,
        True,
    )
    _store_parts(dq_ptr + head * length * K, dq1 * scale, dq2 * scale, row, length, K, K1, K2)


@triton.jit
def _key_gradient_sums(  # type: ignore[no-untyped-def]
    dk1,
    dk2,
    dv,
    k1,
    k2,
    v,
    q_ptr,
    dout_ptr,
    lse_ptr,
    sums_ptr,
    column,
    first,
    last,
    length,
    stride,
    exponent,
    M: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    VP: tl.constexpr,
    EVEN: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """The sums of dk, not yet scaled, and dv after rows `first` to `last`. Scores are held
    transposed (N, M)."""
    for start in range(first, last, M):
        row = start + tl.arange(0, M)
        q1, q2 = load_parts(q_ptr, row, length, K, K, K1, K2, not EVEN)
        dout = load_rows(dout_ptr, row, length, stride, 0, V, VP, not EVEN)
        if EVEN:
            lse = tl.load(lse_ptr + row)
            p_dp = tl.load(sums_ptr + row)
        else:
            # Past the last row all are zero, and so is what they add.
            lse = tl.load(lse_ptr + row, mask=row < length, other=0.0)
            p_dp = tl.load(sums_ptr + row, mask=row < length, other=0.0)
        scores = products(k1, k2, q1, q2, K2 > 0)
        if DIAGONAL:
            scores = tl.where(column[:, None] <= row[None, :], scores, float("-inf"))
        p = tl.exp2(scores * exponent - lse[None, :])
        dv += _product(p.to(v.dtype), dout)
        ds = (p * (_product(v, tl.trans(dout)) - p_dp[None, :])).to(k1.dtype)
        dk1 += _product(ds, q1)
        if K2 > 0:
            dk2 += _product(ds, q2)
    return dk1, dk2, dv


@triton.jit
def key_gradients(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    sums_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    heads,
    length,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    VP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """dk and dv of a block of keys. EVEN: rows are a multiple of M."""
    num_blocks = tl.cdiv(length, N)
    # First keys first: the most rows see them.
    block = tl.program_id(0) % num_blocks
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    q_ptr, k_ptr, v_ptr, dout_ptr = _of_head(q_ptr, k_ptr, v_ptr, dout_ptr, head, heads, length, K, V)
    lse_ptr += head * length
    sums_ptr += head * length
    column = block * N + tl.arange(0, N)
    k1, k2 = load_parts(k_ptr, column, length, K, K, K1, K2, True)
    v = load_rows(v_ptr, column, length, V, 0, V, VP, True)
    exponent = scale * LOG2_E
    dk1 = tl.zeros((N, K1), tl.float32)
    dk2 = tl.zeros((N, K2), tl.float32) if K2 > 0 else dk1
    dv = tl.zeros((N, VP), tl.float32)
    first_whole = tl.minimum((block + 1) * N, length)
    dk1, dk2, dv = _key_gradient_sums(
        dk1,
        dk2,
        dv,
        k1,
        k2,
        v,
        q_ptr,
        dout_ptr,
        lse_ptr,
        sums_ptr,
        column,
        block * N,
        first_whole,
        length,
        heads * V,
        exponent,
        M,
        K,
        V,
        K1,
        K2,
        VP,
        EVEN,
        True,
    )
    dk1, dk2, dv = _key_gradient_sums(
        dk1,
        dk2,
        dv,
        k1,
        k2,
        v,
        q_ptr,
        dout_ptr,
        lse_ptr,
        sums_ptr,
        column,
        first_whole,
        length,
        length,
        heads * V,
        exponent,
        M,
        K,
        V,
        K1,
        K2,
        VP,
        EVEN,
        False,
    )
    _store_parts(dk_ptr + head * length * K, dk1 * scale, dk2 * scale, column, length, K, K1, K2)
    _store(dv_ptr + head * length * V, dv, column, length, V, 0, V, VP)
