"""RMSNorm in one pass over memory each way: Triton kernels for `inverse_rms` and `rms_norm`.

A program takes a whole row at a time, in FP32. In the backward a program takes every PROGRAMS-th
row and sums their part of the weight's gradient as it goes; the programs' sums are added up
afterwards, so that the order is always the same.

Needs triton (the `gpu` extra), so only `norm` imports this module, and only where there is a GPU.

Letters: T tokens, D features, P programs of a launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from k2train.ops.kernels import launchable

# In the backward: two for each of an H100's multiprocessors, nearly.
PROGRAMS = 256


def options(features: int) -> dict[str, Any]:
    """The launch for rows of so many features: some 16 a thread."""
    block = triton.next_power_of_2(features)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16), "enable_fp_fusion": True}


def inverse_rms_rows(x_TD: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of every row (T, 1), FP32. Rows may lie apart, their features
    together."""
    rstd_T1 = x_TD.new_empty(x_TD.shape[0], 1, dtype=torch.float32)
    if rstd_T1.numel():
        inverse_rms(x_TD, rstd_T1, eps)
    return rstd_T1


def rms_norm_rows(x_TD: torch.Tensor, rstd_T1: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    """weight * x * rstd (T, D), rounded after each of the two products, as stock operations do."""
    tokens, features = x_TD.shape
    out_TD = x_TD.new_empty(tokens, features)
    if tokens:
        rms_norm(x_TD, rstd_T1, weight_D, out_TD)
    return out_TD


def rms_norm_gradients(
    dy_TD: torch.Tensor, x_TD: torch.Tensor, rstd_T1: torch.Tensor, weight_D: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x (T, D), in its type, and of the weight (D,), FP32."""
    tokens, features = x_TD.shape
    dx_TD = x_TD.new_empty(tokens, features)
    programs = min(PROGRAMS, tokens)
    sums_PD = x_TD.new_empty(programs, features, dtype=torch.float32)
    if tokens:
        rms_norm_backward(dy_TD.contiguous(), x_TD, rstd_T1, weight_D, dx_TD, sums_PD)
    return dx_TD, sums_PD.sum(0)


@launchable("rstd_T1")
def inverse_rms(x_TD: torch.Tensor, rstd_T1: torch.Tensor, eps: float) -> None:
    tokens, features = x_TD.shape
    with torch.cuda.device_of(x_TD):
        _inverse_rms[(tokens,)](x_TD, rstd_T1, x_TD.stride(0), features, eps, **options(features))


@launchable("out_TD")
def rms_norm(x_TD: torch.Tensor, rstd_T1: torch.Tensor, weight_D: torch.Tensor, out_TD: torch.Tensor) -> None:
    tokens, features = x_TD.shape
    with torch.cuda.device_of(x_TD):
        _rms_norm[(tokens,)](x_TD, rstd_T1, weight_D, out_TD, x_TD.stride(0), features, **options(features))


@launchable("dx_TD", "sums_PD")
def rms_norm_backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    rstd_T1: torch.Tensor,
    weight_D: torch.Tensor,
    dx_TD: torch.Tensor,
    sums_PD: torch.Tensor,
) -> None:
    """Each program's part of the weight's gradient goes into its row of sums_PD."""
    tokens, features = x_TD.shape
    with torch.cuda.device_of(x_TD):
        _rms_norm_gradients[(sums_PD.shape[0],)](
            dy_TD,
            x_TD,
            rstd_T1,
            weight_D,
            dx_TD,
            sums_PD,
            tokens,
            x_TD.stride(0),
            features,
            **options(features),
        )


@triton.jit
def _load_row(ptr, row, stride, features, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row's features in FP32, zero past the last."""
    feature = tl.arange(0, BLOCK)
    return tl.load(ptr + row * stride + feature, mask=feature < features, other=0.0).to(tl.float32)


@triton.jit
def _store_row(ptr, value, row, features, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    feature = tl.arange(0, BLOCK)
    tl.store(ptr + row * features + feature, value.to(ptr.dtype.element_ty), mask=feature < features)


@triton.jit
def _inverse_rms(x_ptr, rstd_ptr, stride, features, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # 64 bits: tokens times features may pass 2^31.
    row = tl.program_id(0).to(tl.int64)
    x = _load_row(x_ptr, row, stride, features, BLOCK)
    tl.store(rstd_ptr + row, tl.rsqrt(tl.sum(x * x, axis=0) / features + eps))


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x_ptr, rstd_ptr, weight_ptr, out_ptr, stride, features, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x = _load_row(x_ptr, row, stride, features, BLOCK)
    weight = _load_row(weight_ptr, 0, 0, features, BLOCK)
    normed = (x * tl.load(rstd_ptr + row)).to(out_ptr.dtype.element_ty).to(tl.float32)
    _store_row(out_ptr, normed * weight, row, features, BLOCK)


@triton.jit
def _rms_norm_gradients(  # type: ignore[no-untyped-def]
    dy_ptr, x_ptr, rstd_ptr, weight_ptr, dx_ptr, sums_ptr, tokens, stride, features, BLOCK: tl.constexpr
):
    """dx = rstd (w dy - x rstd^2 sum(x w dy) / D), and the sum of rstd x dy over this program's
    rows."""
    program = tl.program_id(0)
    weight = _load_row(weight_ptr, 0, 0, features, BLOCK)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for token in range(program, tokens, tl.num_programs(0)):
        row = tl.cast(token, tl.int64)
        normed = _load_row(x_ptr, row, stride, features, BLOCK)
        rstd = tl.load(rstd_ptr + row)
        normed *= rstd
        dy = _load_row(dy_ptr, row, features, features, BLOCK)
        dweight += dy * normed
        dnormed = dy * weight
        mean = tl.sum(dnormed * normed, axis=0) / features
        _store_row(dx_ptr, rstd * (dnormed - normed * mean), row, features, BLOCK)
    _store_row(sums_ptr, dweight, program.to(tl.int64), features, BLOCK)
