"""SwiGLU in one pass over memory each way: Triton kernels for `swiglu` and `weighted_swiglu`.

Arithmetic is FP32 whatever the type, rounded once at the end. The backward writes over its input,
element by element, and sums a row's part of the weight's gradient as it goes along the row.

Needs triton (the `gpu` extra), so only `swiglu` imports this module, and only where there is a GPU.

Letters: N rows, F width of the feed-forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from k2train.ops.kernels import launchable

# 4 x 256 elements are 8 for each thread of 4 warps: 16 bytes of BF16 at a time.
ROWS, COLUMNS = 4, 256


def swiglu_rows(gate_up_NF2: torch.Tensor, w_N: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) * up (* w) of contiguous rows (N, F)."""
    assert gate_up_NF2.is_contiguous()
    out_NF = gate_up_NF2.new_empty(gate_up_NF2.shape[0], gate_up_NF2.shape[1] // 2)
    if out_NF.numel():
        swiglu(gate_up_NF2, None if w_N is None else w_N.contiguous(), out_NF)
    return out_NF


def swiglu_gradients(
    dy_NF: torch.Tensor, gate_up_NF2: torch.Tensor, w_N: torch.Tensor | None
) -> torch.Tensor | None:
    """Write the input's gradient over the contiguous input; the weights' gradient (N,), FP32, where
    there are weights."""
    assert gate_up_NF2.is_contiguous()
    dw_N = None if w_N is None else torch.zeros_like(w_N, memory_format=torch.contiguous_format)
    if dy_NF.numel():
        swiglu_backward(dy_NF.contiguous(), gate_up_NF2, None if w_N is None else w_N.contiguous(), dw_N)
    return dw_N


@launchable("out_NF")
def swiglu(gate_up_NF2: torch.Tensor, w_N: torch.Tensor | None, out_NF: torch.Tensor) -> None:
    num_rows, width = out_NF.shape
    with torch.cuda.device_of(gate_up_NF2):
        _swiglu[(triton.cdiv(num_rows, ROWS), triton.cdiv(width, COLUMNS))](
            gate_up_NF2,
            gate_up_NF2 if w_N is None else w_N,
            out_NF,
            num_rows,
            width,
            WEIGHTED=w_N is not None,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            enable_fp_fusion=True,
        )


@launchable("gate_up_NF2", "dw_N")
def swiglu_backward(
    dy_NF: torch.Tensor, gate_up_NF2: torch.Tensor, w_N: torch.Tensor | None, dw_N: torch.Tensor | None
) -> None:
    num_rows, width = dy_NF.shape
    with torch.cuda.device_of(gate_up_NF2):
        _swiglu_gradients[(triton.cdiv(num_rows, ROWS),)](
            dy_NF,
            gate_up_NF2,
            gate_up_NF2 if w_N is None else w_N,
            gate_up_NF2 if dw_N is None else dw_N,
            num_rows,
            width,
            WEIGHTED=w_N is not None,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            enable_fp_fusion=True,
        )


@triton.jit
def _swiglu(  # type: ignore[no-untyped-def]
    gate_up_ptr,
    w_ptr,
    out_ptr,
    num_rows,
    width,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # 64 bits: rows times width may pass 2^31.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    gate_at = row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(gate_up_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_at + width, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        w = tl.load(w_ptr + row, mask=row < num_rows, other=0.0)
        out *= w[:, None]
    tl.store(out_ptr + row[:, None] * width + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_gradients(  # type: ignore[no-untyped-def]
    dy_ptr,
    gate_up_ptr,
    w_ptr,
    dw_ptr,
    num_rows,
    width,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    w = tl.full((ROWS,), 1.0, tl.float32)
    if WEIGHTED:
        w = tl.load(w_ptr + row, mask=inside, other=0.0)
    dw = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < width)[None, :]
        gate_at = row[:, None] * (2 * width) + column[None, :]
        gate = tl.load(gate_up_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + gate_at + width, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if WEIGHTED:
            dw += tl.sum(dy * silu * up, axis=1)
        dh = dy * w[:, None]
        dgate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(gate_up_ptr + gate_at, dgate.to(gate_up_ptr.dtype.element_ty), mask=mask)
        tl.store(gate_up_ptr + gate_at + width, (dh * silu).to(gate_up_ptr.dtype.element_ty), mask=mask)
    if WEIGHTED:
        tl.store(dw_ptr + row, dw, mask=inside)
