"""SwiGLU on the fused projection: silu(gate) * up, where gate and up are the two halves of one tensor.

Letters: N rows, F width of the feed-forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from k2train.ops.weight_grad import accumulation_dtype


def swiglu(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last dimension (N, F). Saves its input alone, which its backward consumes:
    the gradient is written over it. So nothing else may need the input then, and the graph is good for one backward;
    autograd raises where either is not so, but cannot see through hooks that store what is saved."""
    return _SwiGLU.apply(gate_up_NF2)


def swiglu_reference(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """The same from stock operations, which also save silu(gate) and leave the input as it is."""
    gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


class _SwiGLU(torch.autograd.Function):
    """The input is the widest tensor of a layer; a gradient beside it would be what backward's peak of memory is made of."""

    @staticmethod
    def forward(ctx: Any, gate_up_NF2: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up_NF2)
        gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
        return F.silu(gate_NF).mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gate_up_NF2,) = ctx.saved_tensors
        gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
        if gate_NF.dtype == accumulation_dtype(gate_NF.dtype):
            _to_gradients(grads[0], gate_NF, up_NF)
        else:
            _to_wide_gradients(grads[0], gate_NF, up_NF)
        return gate_up_NF2


def _to_gradients(dy_NF: torch.Tensor, gate_NF: torch.Tensor, up_NF: torch.Tensor) -> None:
    """Write both gradients over gate and up, in four passes."""
    dsilu_NF = dy_NF * up_NF
    torch.ops.aten.silu.out(gate_NF, out=up_NF).mul_(dy_NF)
    torch.ops.aten.silu_backward.grad_input(dsilu_NF, gate_NF, grad_input=gate_NF)


def _to_wide_gradients(dy_NF: torch.Tensor, gate_NF: torch.Tensor, up_NF: torch.Tensor) -> None:
    """The same for types narrower than FP32, rounded once at the end.

    One exponential serves both: silu = gate s and silu' = s + silu (1 - s).
    """
    sigmoid_NF = torch.sigmoid(gate_NF.to(accumulation_dtype(gate_NF.dtype)))
    silu_NF = sigmoid_NF * gate_NF
    slope_NF = torch.addcmul(sigmoid_NF, silu_NF, sigmoid_NF, value=-1).add_(silu_NF)
    torch.mul(slope_NF.mul_(up_NF), dy_NF, out=gate_NF)
    torch.mul(dy_NF, silu_NF, out=up_NF)
