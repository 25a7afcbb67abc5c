"""Causal attention that also returns every head's largest logit, as Triton kernels: no score ever
leaves a program.

This is the portable path: it takes every width up to 256 on every GPU that multiplies 16-bit
numbers, and its sums have a fixed order, so two runs give the same bits.

Four kernels (`attention_kernels`). The forward takes a block of rows against all keys up to it,
with the softmax of what it has seen so far (FlashAttention, arXiv 2205.14135, 2307.08691), and
leaves each row's log-sum-exp. The backward first sums output times gradient of each row. Then one
kernel goes the forward's way once more for the gradient of q, and one takes a block of keys against
all rows from it on. That is seven products; with the two in one kernel it would be five, but sums
in memory whose order changes from run to run.

Needs triton (the `gpu` extra), so only `attention` imports this module, and only where there is a
GPU.

Letters: B sequences, H heads, S positions, K query and key features, V value features, M blocks of
rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton

from k2train.ops import attention_kernels
from k2train.ops.kernels import launchable

# A product's sides are 16 at least.
MIN_SIDE = 16
# Rows of `output_products`: 64 of 128 features are 64 numbers for each thread of 4 warps.
ROWS = 64


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


# Rows are a multiple of keys in the first two, and keys of rows in the third, so that a block lies
# on the diagonal or off it.
FORWARD = Blocks(rows=128, keys=64, num_warps=8, num_stages=2)
ROW_GRADIENTS = Blocks(rows=128, keys=64, num_warps=8, num_stages=2)
KEY_GRADIENTS = Blocks(rows=32, keys=128, num_warps=8, num_stages=2)
# Features of queries and values together for which shared memory of an H100 holds the two of the
# backward, in 16 bits, and next to nothing spills (tests compile them): MLA's 192 and 128. Wider
# heads take half of their larger side.
_LARGE_BLOCKS_WIDTH = 320


def row_gradient_blocks(query: int, value: int) -> Blocks:
    """Of the launch that makes dq."""
    if _fits_large_blocks(query, value):
        return ROW_GRADIENTS
    return dataclasses.replace(ROW_GRADIENTS, rows=ROW_GRADIENTS.rows // 2)


def key_gradient_blocks(query: int, value: int) -> Blocks:
    """Of the launch that makes dk and dv."""
    if _fits_large_blocks(query, value):
        return KEY_GRADIENTS
    return dataclasses.replace(KEY_GRADIENTS, keys=KEY_GRADIENTS.keys // 2)


def _fits_large_blocks(query: int, value: int) -> bool:
    cut = features(query, value)
    return cut["K1"] + cut["K2"] + cut["VP"] <= _LARGE_BLOCKS_WIDTH


def query_features(query: int) -> dict[str, int]:
    """The constants that say how query and key features are cut: K = K1 + K2 at most, K2 may be
    0."""
    first = max(1 << (query.bit_length() - 1), MIN_SIDE)
    rest = query - first
    second = max(triton.next_power_of_2(rest), MIN_SIDE) if rest > 0 else 0
    return {"K": query, "K1": first, "K2": second}


def value_features(value: int) -> dict[str, int]:
    """The constants of the value features: V up to VP."""
    return {"V": value, "VP": max(triton.next_power_of_2(value), MIN_SIDE)}


def features(query: int, value: int) -> dict[str, int]:
    """Both."""
    return {**query_features(query), **value_features(value)}


def fused_attention(
    q_BHSK: torch.Tensor, k_BHSK: torch.Tensor, v_BHSV: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T, causal) v as (B, S, H, V), the largest scaled logit of each head (H,),
    and the log2-sum-exp2 of each row (B, H, S), both FP32. Saves q, k, v, the output and the last,
    and has a gradient for the output alone."""
    return _FusedAttention.apply(q_BHSK.contiguous(), k_BHSK.contiguous(), v_BHSV.contiguous(), scale)


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, heads, length, _ = q.shape
        out_BSHV = v.new_empty(batch, length, heads, v.shape[-1])
        maxima_BHM = q.new_empty(batch, heads, triton.cdiv(length, FORWARD.rows), dtype=torch.float32)
        lse_BHS = q.new_empty(batch, heads, length, dtype=torch.float32)
        attention_forward(q, k, v, out_BSHV, lse_BHS, maxima_BHM, scale)
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
        # What the softmax's gradient subtracts in each row, the sum of p dp, is the product of
        # output and gradient.
        sums_BHS = torch.empty_like(lse_BHS)
        attention_output_products(out_BSHV, dout_BSHV, sums_BHS)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        attention_row_gradients(q, k, v, dout_BSHV, lse_BHS, sums_BHS, dq, ctx.scale)
        attention_key_gradients(q, k, v, dout_BSHV, lse_BHS, sums_BHS, dk, dv, ctx.scale)
        return dq, dk, dv, None


@launchable("out_BSHV", "lse_BHS", "maxima_BHM")
def attention_forward(
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSV: torch.Tensor,
    out_BSHV: torch.Tensor,
    lse_BHS: torch.Tensor,
    maxima_BHM: torch.Tensor,
    scale: float,
) -> None:
    batch, heads, length, query = q_BHSK.shape
    cut = features(query, v_BHSV.shape[-1])
    with torch.cuda.device_of(q_BHSK):
        attention_kernels.forward[(batch * heads * maxima_BHM.shape[2],)](
            q_BHSK,
            k_BHSK,
            v_BHSV,
            out_BSHV,
            lse_BHS,
            maxima_BHM,
            scale,
            heads,
            length,
            M=FORWARD.rows,
            N=FORWARD.keys,
            **cut,
            **FORWARD.options,
        )


@launchable("sums_BHS")
def attention_output_products(
    out_BSHV: torch.Tensor, dout_BSHV: torch.Tensor, sums_BHS: torch.Tensor
) -> None:
    batch, length, heads, value = out_BSHV.shape
    rows = batch * length * heads
    with torch.cuda.device_of(out_BSHV):
        attention_kernels.output_products[(triton.cdiv(rows, ROWS),)](
            out_BSHV,
            dout_BSHV,
            sums_BHS,
            rows,
            heads,
            length,
            ROWS=ROWS,
            **value_features(value),
            enable_fp_fusion=True,
        )


@launchable("dq_BHSK")
def attention_row_gradients(
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSV: torch.Tensor,
    dout_BSHV: torch.Tensor,
    lse_BHS: torch.Tensor,
    sums_BHS: torch.Tensor,
    dq_BHSK: torch.Tensor,
    scale: float,
) -> None:
    batch, heads, length, query = q_BHSK.shape
    value = v_BHSV.shape[-1]
    blocks, cut = row_gradient_blocks(query, value), features(query, value)
    with torch.cuda.device_of(q_BHSK):
        attention_kernels.row_gradients[(batch * heads * triton.cdiv(length, blocks.rows),)](
            q_BHSK,
            k_BHSK,
            v_BHSV,
            dout_BSHV,
            lse_BHS,
            sums_BHS,
            dq_BHSK,
            scale,
            heads,
            length,
            M=blocks.rows,
            N=blocks.keys,
            **cut,
            **blocks.options,
        )


@launchable("dk_BHSK", "dv_BHSV")
def attention_key_gradients(
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSV: torch.Tensor,
    dout_BSHV: torch.Tensor,
    lse_BHS: torch.Tensor,
    sums_BHS: torch.Tensor,
    dk_BHSK: torch.Tensor,
    dv_BHSV: torch.Tensor,
    scale: float,
) -> None:
    batch, heads, length, query = q_BHSK.shape
    value = v_BHSV.shape[-1]
    blocks, cut = key_gradient_blocks(query, value), features(query, value)
    with torch.cuda.device_of(q_BHSK):
        attention_kernels.key_gradients[(batch * heads * triton.cdiv(length, blocks.keys),)](
            q_BHSK,
            k_BHSK,
            v_BHSV,
            dout_BSHV,
            lse_BHS,
            sums_BHS,
            dk_BHSK,
            dv_BHSV,
            scale,
            heads,
            length,
            M=blocks.rows,
            N=blocks.keys,
            EVEN=length % blocks.rows == 0,
            **cut,
            **blocks.options,
        )
