"""SwiGLU on the fused projection: silu(gate) * up, where gate and up are the two halves of one tensor.

Letters: N rows, F width of the feed-forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from k2train.ops.weight_grad import accumulation_dtype


def swiglu(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last dimension (N, F)."""
    return _SwiGLU.apply(gate_up_NF2)


def swiglu_reference(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """The same from stock operations, which also save silu(gate)."""
    gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


class _SwiGLU(torch.autograd.Function):
    """Saves its input alone."""

    @staticmethod
    def forward(ctx: Any, gate_up_NF2: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up_NF2)
        gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
        return F.silu(gate_NF).mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gate_up_NF2,) = ctx.saved_tensors
        gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
        grad_NF2 = torch.empty_like(gate_up_NF2)
        dgate_NF, dup_NF = grad_NF2.chunk(2, dim=-1)
        # One exponential serves both: silu = gate s and silu' = s + silu (1 - s).
        wide = accumulation_dtype(gate_NF.dtype)
        sigmoid_NF = torch.sigmoid(gate_NF.to(wide))
        silu_NF = sigmoid_NF * gate_NF
        torch.mul(grads[0], silu_NF, out=dup_NF)
        slope_NF = torch.addcmul(sigmoid_NF, silu_NF, sigmoid_NF, value=-1).add_(silu_NF)
        torch.mul(slope_NF.mul_(up_NF), grads[0], out=dgate_NF)
        return grad_NF2
