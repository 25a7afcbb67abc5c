"""The largest logit of each head where attention's own kernel returns the rows' log-sum-exp alone,
as Triton kernels.

A row's log-sum-exp is at least its largest logit, so the largest log-sum-exp of a block of rows
bounds the block's logits, and most blocks need no product:

- `best_blocks` bounds every block. A head whose bounds are all at most `exact_above` is done: what
is returned for it is
  its largest log-sum-exp, an upper bound. Of any other head it computes the logits of the block
  with the largest bound.
- `other_blocks` then takes every other block of those heads, and leaves at once where the bound
says that the block
  holds nothing larger than what is known by then, or nothing above `exact_above`. What is left in
  the end is the exact
  maximum where that is above `exact_above`; elsewhere a skipped block may hold a larger logit, so
  the largest of their
  bounds is returned.

Which blocks are computed depends on the order in which programs happen to run; the maximum does
not. The host waits for nothing. How many blocks that is depends on the data: where a row attends to
one key its bound is tight and a block or two are computed; where a row spreads over n keys its
bound is ln(n) above the logits, and with `exact_above` of minus infinity all blocks may have to be.

Needs triton (the `gpu` extra). Letters: B sequences, H heads, S positions, K query and key
features, M blocks of rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from k2train.ops.attention_kernels import load_parts, products
from k2train.ops.attention_triton import Blocks, query_features
from k2train.ops.kernels import launchable

# The largest scores so far of a block of rows and a block of keys are kept, beside the scores
# themselves.
BLOCKS = Blocks(rows=128, keys=64, num_warps=8, num_stages=2)
# Bounds that a program of `best_blocks` makes at once: 16 x 128 rows are 16 numbers for each of 128
# threads.
CHUNK = tl.constexpr(16)
# Log-sum-exp and logits are summed by different kernels, in FP32: the bound is raised by some
# thousand times its rounding, so that a block whose logits round up is not left out.
SLACK = tl.constexpr(2.0**-10)


def largest_logits(
    q_BHSK: torch.Tensor, k_BHSK: torch.Tensor, lse_BHS: torch.Tensor, scale: float, exact_above: float
) -> torch.Tensor:
    """Each head's largest scaled logit over the batch (H,), FP32, where it is above `exact_above`.

    For any other head an upper bound of its logits that is not above `exact_above` either. q, k:
    features together in memory, whatever the other strides. lse_BHS: natural logarithms,
    contiguous, FP32.
    """
    batch, heads, length, _ = q_BHSK.shape
    bounds_BHM = q_BHSK.new_empty(batch, heads, triton.cdiv(length, BLOCKS.rows), dtype=torch.float32)
    maxima_H = q_BHSK.new_empty(heads, dtype=torch.float32)
    attention_best_blocks(q_BHSK, k_BHSK, lse_BHS, bounds_BHM, maxima_H, scale, exact_above)
    attention_other_blocks(q_BHSK, k_BHSK, bounds_BHM, maxima_H, scale, exact_above)
    return maxima_H if exact_above == -math.inf else _with_skipped(maxima_H, bounds_BHM, exact_above)


def _with_skipped(maxima_H: torch.Tensor, bounds_BHM: torch.Tensor, exact_above: float) -> torch.Tensor:
    """Where nothing above `exact_above` was found, the bound of what was skipped, which is not
    above it."""
    bound_H = bounds_BHM.amax((0, 2))
    raised_H = torch.where(bound_H > maxima_H, bound_H + SLACK.value * (bound_H.abs() + 1.0), maxima_H)
    return torch.where(maxima_H <= exact_above, raised_H.clamp(max=exact_above).maximum(maxima_H), maxima_H)


def strides(x_BHSK: torch.Tensor) -> tuple[int, int, int]:
    """Of a sequence, a head and a position; their features lie together."""
    sequence, head, position, feature = x_BHSK.stride()
    assert feature == 1 or x_BHSK.shape[-1] == 1, "features must lie together"
    return sequence, head, position


@launchable("bounds_BHM", "maxima_H")
def attention_best_blocks(
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    lse_BHS: torch.Tensor,
    bounds_BHM: torch.Tensor,
    maxima_H: torch.Tensor,
    scale: float,
    exact_above: float,
) -> None:
    batch, heads, length, query = q_BHSK.shape
    with torch.cuda.device_of(q_BHSK):
        _best_blocks[(heads,)](
            q_BHSK,
            k_BHSK,
            lse_BHS,
            bounds_BHM,
            maxima_H,
            scale,
            exact_above,
            *strides(q_BHSK),
            *strides(k_BHSK),
            batch,
            heads,
            length,
            M=BLOCKS.rows,
            N=BLOCKS.keys,
            **query_features(query),
            **BLOCKS.options,
        )


@launchable("maxima_H")
def attention_other_blocks(
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    bounds_BHM: torch.Tensor,
    maxima_H: torch.Tensor,
    scale: float,
    exact_above: float,
) -> None:
    length, query = q_BHSK.shape[2:]
    heads = maxima_H.shape[0]
    with torch.cuda.device_of(q_BHSK):
        _other_blocks[(bounds_BHM.numel(),)](
            q_BHSK,
            k_BHSK,
            bounds_BHM,
            maxima_H,
            scale,
            exact_above,
            *strides(q_BHSK),
            *strides(k_BHSK),
            heads,
            length,
            M=BLOCKS.rows,
            N=BLOCKS.keys,
            **query_features(query),
            **BLOCKS.options,
        )


@triton.jit
def _raised(bound):  # type: ignore[no-untyped-def]
    # Minus infinity (a block that is done) stays what it is.
    return bound + SLACK * (tl.minimum(tl.abs(bound), 1e30) + 1.0)


@triton.jit
def _larger_scores(  # type: ignore[no-untyped-def]
    largest,
    q1,
    q2,
    k_ptr,
    row,
    first,
    last,
    length,
    k_position,
    N: tl.constexpr,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """The larger of `largest` (M, N) and the scores of keys `first` to `last`, block over block."""
    for start in range(first, last, N):
        column = start + tl.arange(0, N)
        k1, k2 = load_parts(k_ptr, column, length, k_position, K, K1, K2, DIAGONAL)
        scores = products(q1, q2, k1, k2, K2 > 0)
        if DIAGONAL:
            # Rows past the last see keys past the last, whose zeros must not count.
            visible = (column[None, :] <= row[:, None]) & (row < length)[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        largest = tl.maximum(largest, scores)
    return largest


@triton.jit
def _largest_of_block(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    block,
    length,
    q_position,
    k_position,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
):
    """The largest logit, not yet scaled, of a block of rows of one head. Pointers: of that head."""
    row = block * M + tl.arange(0, M)
    # Past the last row the last once more: what it sees counts anyway.
    q1, q2 = load_parts(q_ptr, tl.minimum(row, length - 1), length, q_position, K, K1, K2, False)
    largest = tl.full((M, N), float("-inf"), tl.float32)
    largest = _larger_scores(
        largest, q1, q2, k_ptr, row, 0, block * M, length, k_position, N, K, K1, K2, False
    )
    last = tl.minimum((block + 1) * M, length)
    largest = _larger_scores(
        largest, q1, q2, k_ptr, row, block * M, last, length, k_position, N, K, K1, K2, True
    )
    return tl.max(tl.max(largest, axis=1), axis=0)


@triton.jit
def _best_blocks(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    lse_ptr,
    bounds_ptr,
    maxima_ptr,
    scale,
    exact_above,
    q_sequence,
    q_head,
    q_position,
    k_sequence,
    k_head,
    k_position,
    batch,
    heads,
    length,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
):
    """Of one head: the bounds of its blocks in every sequence, and its largest logit as far as the
    best block tells."""
    head = tl.program_id(0).to(tl.int64)
    num_blocks = tl.cdiv(length, M)
    best = tl.full((), float("-inf"), tl.float32)
    best_sequence = tl.full((), 0, tl.int64)
    best_block = tl.full((), 0, tl.int32)
    for sequence in range(batch):
        place = tl.cast(sequence, tl.int64) * heads + head
        for first in range(0, num_blocks, CHUNK):
            block = first + tl.arange(0, CHUNK)
            row = block[:, None] * M + tl.arange(0, M)[None, :]
            lse = tl.load(lse_ptr + place * length + row, mask=row < length, other=float("-inf"))
            bound = tl.max(lse, axis=1)
            tl.store(bounds_ptr + place * num_blocks + block, bound, mask=block < num_blocks)
            highest = tl.max(bound, axis=0)
            if highest > best:
                best = highest
                best_sequence = tl.cast(sequence, tl.int64)
                best_block = first + tl.argmax(bound, axis=0)
    largest = best
    if _raised(best) > exact_above:
        q_ptr += best_sequence * q_sequence + head * q_head
        k_ptr += best_sequence * k_sequence + head * k_head
        largest = scale * _largest_of_block(
            q_ptr, k_ptr, best_block, length, q_position, k_position, M, N, K, K1, K2
        )
        # Computed: `other_blocks` leaves it out.
        tl.debug_barrier()
        tl.store(bounds_ptr + (best_sequence * heads + head) * num_blocks + best_block, float("-inf"))
    tl.store(maxima_ptr + head, largest)


@triton.jit
def _other_blocks(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    bounds_ptr,
    maxima_ptr,
    scale,
    exact_above,
    q_sequence,
    q_head,
    q_position,
    k_sequence,
    k_head,
    k_position,
    heads,
    length,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
):
    """One block of rows, if it may hold a logit that is both above `exact_above` and larger than
    what is known."""
    num_blocks = tl.cdiv(length, M)
    block = num_blocks - 1 - tl.program_id(0) % num_blocks
    place = (tl.program_id(0) // num_blocks).to(tl.int64)
    head = place % heads
    bound = _raised(tl.load(bounds_ptr + place * num_blocks + block))
    # What other programs have found may not be seen here yet; then a block is computed that need
    # not be.
    if bound > exact_above and bound > tl.load(maxima_ptr + head):
        q_ptr += (place // heads) * q_sequence + head * q_head
        k_ptr += (place // heads) * k_sequence + head * k_head
        largest = _largest_of_block(q_ptr, k_ptr, block, length, q_position, k_position, M, N, K, K1, K2)
        tl.atomic_max(maxima_ptr + head, largest * scale, sem="relaxed")
