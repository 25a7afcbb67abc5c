"""RMSNorm as transformers computes it: the normalised input in FP32, cast back, then times the
weight.

In two steps, so that the one number a token that the backward needs can be kept while the result is
rebuilt. On a GPU each is a kernel (`norm_triton`); elsewhere they are stock operations.

Letters: T tokens (any leading shape), D features.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from k2train.ops.dtypes import accumulation_dtype, cast
from k2train.ops.kernels import gpu_kernels
from k2train.ops.weight_grad import VectorWeightGrad, WeightGradSlot

_MAX_KERNEL_FEATURES = 8192


def inverse_rms(x_TD: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of every token (T, 1), FP32 (FP64 for float64). No gradient:
    rms_norm's covers it."""
    kernels = _kernels(x_TD)
    if kernels is not None:
        return kernels.inverse_rms_rows(x_TD.detach(), eps)
    wide_TD = cast(x_TD.detach(), accumulation_dtype(x_TD.dtype))
    mean_T1 = torch.linalg.vector_norm(wide_TD, dim=-1, keepdim=True).square_().div_(x_TD.shape[-1])
    return mean_T1.add_(eps).rsqrt_()


def rms_norm(
    x_TD: torch.Tensor, rstd_T1: torch.Tensor, weight_D: torch.Tensor, slot: WeightGradSlot | None = None
) -> torch.Tensor:
    """weight * x * rstd (T, D) in x's type, where rstd is `inverse_rms` of the same x; float64
    stays float64 throughout.

    With a slot the weight's gradient goes there in FP32 (FP64 for float64), and its own gradient is
    None. Without one autograd rounds it to the weight's type.
    """
    return _RMSNorm.apply(x_TD, rstd_T1, weight_D, slot)


def rms_norm_reference(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """The whole norm from stock operations, which save three more tensors."""
    wide_TD = x_TD.to(accumulation_dtype(x_TD.dtype))
    normed_TD = wide_TD * torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + eps)
    return weight_D * normed_TD.to(x_TD.dtype)


def _kernels(x_TD: torch.Tensor) -> ModuleType | None:
    """The Triton kernels where they take this: rows no wider than FP32 whose features lie together
    and fit a program."""
    if x_TD.dtype == torch.float64 or x_TD.dim() != 2 or not 0 < x_TD.shape[1] <= _MAX_KERNEL_FEATURES:
        return None
    return gpu_kernels("norm_triton", x_TD.device) if x_TD.stride(1) == 1 else None


class _RMSNorm(torch.autograd.Function):
    """Saves x and the inverse root mean square; the gradient of x goes through both."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        rstd_T1: torch.Tensor,
        weight_D: torch.Tensor,
        slot: WeightGradSlot | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TD, rstd_T1)
        ctx.weight, ctx.slot = weight_D, slot
        kernels = _kernels(x_TD)
        if kernels is not None:
            return kernels.rms_norm_rows(x_TD, rstd_T1, weight_D)
        return cast(cast(x_TD, rstd_T1.dtype) * rstd_T1, x_TD.dtype).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x_TD, rstd_T1 = ctx.saved_tensors
        kernels = _kernels(x_TD)
        if kernels is not None:
            dx_TD, dw_D = kernels.rms_norm_gradients(grads[0], x_TD, rstd_T1, ctx.weight)
            return dx_TD, None, _put_weight_gradient(ctx, dw_D), None
        wide, features = rstd_T1.dtype, x_TD.shape[-1]
        weight_D, wide_TD, dy_TD = (cast(t, wide) for t in (ctx.weight, x_TD, grads[0]))
        # LayerNorm's kernel for a mean of 0 does it in one pass: dw = sum over tokens of rstd x dy,
        # and dx = rstd (w dy - x rstd^2 sum(x dy w) / D), less rstd sum(dy w) / D, which is the
        # mean's part and is given back.
        zero_T1 = torch.zeros_like(rstd_T1)
        dx_TD, dw_D, _ = torch.ops.aten.native_layer_norm_backward(
            dy_TD, wide_TD, [features], zero_T1, rstd_T1, weight_D, None, [True, True, False]
        )
        of_mean_T1 = torch.matmul(dy_TD, weight_D.unsqueeze(-1)).mul_(rstd_T1)
        dx_TD.add_(of_mean_T1, alpha=1 / features)
        return cast(dx_TD, x_TD.dtype), None, _put_weight_gradient(ctx, dw_D), None


def _put_weight_gradient(ctx: Any, dw_D: torch.Tensor) -> torch.Tensor | None:
    """Into the slot; without one it is the gradient that autograd gets."""
    if ctx.slot is None:
        return cast(dw_D, ctx.weight.dtype)
    ctx.slot.put(VectorWeightGrad(ctx.weight, dw_D))
    return None
