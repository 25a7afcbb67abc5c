"""SwiGLU on the fused projection: silu(gate) * up, where gate and up are the two halves of one
tensor.

A routed expert's rows are also multiplied by their routing weights here, before the
down-projection, which is linear: then the gradient of a weight is the sum of h times the gradient
that the down-projection's backward computes anyway, and the experts' outputs are needed by no
backward at all (docs/decisions/0010).

On a GPU both ways are a kernel each (`swiglu_triton`); elsewhere they are stock operations.

Letters: N rows, F width of the feed-forward.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from k2train.ops.dtypes import accumulation_dtype, cast
from k2train.ops.kernels import gpu_kernels


def swiglu(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last dimension (N, F). Saves its input alone, which its
    backward consumes: the gradient is written over it. So nothing else may need the input then, and
    the graph is good for one backward; autograd raises where either is not so, but cannot see
    through hooks that store what is saved."""
    return _SwiGLU.apply(gate_up_NF2, None)


def weighted_swiglu(gate_up_NF2: torch.Tensor, w_N: torch.Tensor) -> torch.Tensor:
    """swiglu times a weight a row, FP32 (FP64 for float64). Saves both, and consumes the first as
    swiglu does."""
    return _SwiGLU.apply(gate_up_NF2, w_N)


def swiglu_reference(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """swiglu from stock operations, which also save silu(gate) and leave the input as it is."""
    gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


class _SwiGLU(torch.autograd.Function):
    """The input is the widest tensor of a layer; a gradient beside it would be what backward's peak
    of memory is made of."""

    @staticmethod
    def forward(ctx: Any, gate_up_NF2: torch.Tensor, w_N: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(gate_up_NF2, w_N)
        kernels = _kernels(gate_up_NF2)
        if kernels is not None:
            return kernels.swiglu_rows(gate_up_NF2, w_N)
        gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
        hidden_NF = F.silu(gate_NF).mul_(up_NF)
        if w_N is None:
            return hidden_NF
        if w_N.dtype == hidden_NF.dtype:
            return hidden_NF.mul_(w_N.unsqueeze(1))
        return cast(hidden_NF * w_N.unsqueeze(1), hidden_NF.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gate_up_NF2, w_N = ctx.saved_tensors
        kernels = _kernels(gate_up_NF2)
        if kernels is not None:
            # Autograd cannot see a kernel's writes.
            torch.autograd.graph.increment_version(gate_up_NF2)
            return gate_up_NF2, kernels.swiglu_gradients(grads[0], gate_up_NF2, w_N)
        gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
        w_N1 = None if w_N is None else w_N.unsqueeze(1)
        if gate_NF.dtype == accumulation_dtype(gate_NF.dtype):
            dw_N = _to_gradients(grads[0], gate_NF, up_NF, w_N1)
        else:
            dw_N = _to_wide_gradients(grads[0], gate_NF, up_NF, w_N1)
        return gate_up_NF2, dw_N


def _kernels(gate_up_NF2: torch.Tensor) -> ModuleType | None:
    """The Triton kernels where they take this: contiguous rows that are no wider than FP32."""
    if gate_up_NF2.dtype == torch.float64 or gate_up_NF2.dim() != 2 or not gate_up_NF2.is_contiguous():
        return None
    return gpu_kernels("swiglu_triton", gate_up_NF2.device)


def _to_gradients(
    dy_NF: torch.Tensor, gate_NF: torch.Tensor, up_NF: torch.Tensor, w_N1: torch.Tensor | None
) -> torch.Tensor | None:
    """Write both gradients over gate and up, in four passes without weights; the weights'
    gradient."""
    dsilu_NF = dy_NF * up_NF
    dw_N = None
    if w_N1 is None:
        torch.ops.aten.silu.out(gate_NF, out=up_NF).mul_(dy_NF)
    else:
        silu_NF = F.silu(gate_NF)
        dw_N = torch.mul(silu_NF, dsilu_NF, out=up_NF).sum(1)
        torch.mul(silu_NF, dy_NF, out=up_NF).mul_(w_N1)
        dsilu_NF.mul_(w_N1)
    torch.ops.aten.silu_backward.grad_input(dsilu_NF, gate_NF, grad_input=gate_NF)
    return dw_N


def _to_wide_gradients(
    dy_NF: torch.Tensor, gate_NF: torch.Tensor, up_NF: torch.Tensor, w_N1: torch.Tensor | None
) -> torch.Tensor | None:
    """The same for types narrower than FP32, rounded once at the end.

    One exponential serves both: silu = gate s and silu' = s + silu (1 - s).
    """
    sigmoid_NF = torch.sigmoid(gate_NF.to(accumulation_dtype(gate_NF.dtype)))
    silu_NF = sigmoid_NF * gate_NF
    slope_NF = torch.addcmul(sigmoid_NF, silu_NF, sigmoid_NF, value=-1).add_(silu_NF).mul_(up_NF)
    dw_N, weighted_NF = None, dy_NF
    if w_N1 is not None:
        dw_N = (silu_NF * up_NF).mul_(dy_NF).sum(1)
        weighted_NF = dy_NF * w_N1
    torch.mul(slope_NF, weighted_NF, out=gate_NF)
    torch.mul(silu_NF, weighted_NF, out=up_NF)
    return dw_N
