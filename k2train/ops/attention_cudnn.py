"""Causal attention by torch's binding of cuDNN, Hopper's fastest for MLA's widths, and the largest
logits beside it.

cuDNN returns the output and each row's log-sum-exp (natural logarithm of the scaled logits) and
keeps the largest logits to itself; `row_max` finds them. Its backward makes five products where the
Triton kernels make seven, and adds up the gradient of q in the order in which programs happen to
end, so two runs may differ in the last bit.

The two calls are operations of their own (`torch.ops.k2train.cudnn_attention` and its backward):
they fix the output's layout, drop what only dropout needs, and can be rehearsed with tensors that
have no memory. The schemas of `aten::_scaled_dot_product_cudnn_attention` and its backward are the
same in torch 2.11 and 2.13. Not yet run on a GPU.

Letters: B sequences, H heads, S positions, K query and key features, V value features.
"""

from __future__ import annotations

from typing import Any

import torch

from k2train.ops.kernels import gpu_kernels, registered
from k2train.ops.row_max import stock_largest_logits


def cudnn_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """torch's own word on whether its cuDNN attention takes these, backward included where they
    require gradients.

    It knows the version of cuDNN, the GPU, and whether deterministic algorithms were asked for,
    which this is not.
    """
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, False)
    return torch.backends.cuda.can_use_cudnn_attention(params)


def attention_by_cudnn(
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSV: torch.Tensor,
    scale: float,
    exact_above: float,
    triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T, causal) v as (B, S, H, V), the heads' largest logits (H,) and the
    log-sum-exp (B, H, S, 1).

    At least two positions. In memory positions lie before heads, (B, S, H, features): the output
    takes the queries' order, so queries in another order are copied first; keys and values need
    only have their features together. Largest logits: as `row_max_triton.largest_logits` says,
    exact for every head without Triton. Saves q, k, v, the output and the log-sum-exp, and has a
    gradient for the output alone.
    """
    if not q_BHSK.transpose(1, 2).is_contiguous():
        q_BHSK = q_BHSK.transpose(1, 2).contiguous().transpose(1, 2)
    return _CudnnAttention.apply(q_BHSK, k_BHSK, v_BHSV, scale, exact_above, triton)


class _CudnnAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        exact_above: float,
        triton: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out_BHSV, lse_BHS1 = cudnn_attention(q, k, v, scale)
        out_BSHV = out_BHSV.transpose(1, 2)
        kernels = gpu_kernels("row_max_triton", q.device) if triton else None
        if kernels is None:
            max_H = stock_largest_logits(q, k, scale)
        else:
            max_H = kernels.largest_logits(q, k, lse_BHS1, scale, exact_above)
        ctx.save_for_backward(q, k, v, out_BSHV, lse_BHS1)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(max_H, lse_BHS1)
        return out_BSHV, max_H, lse_BHS1

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None, None, None, None
        q, k, v, out_BSHV, lse_BHS1 = ctx.saved_tensors
        dout_BHSV = grads[0].contiguous().transpose(1, 2)
        gradients = cudnn_attention_backward(
            dout_BHSV, q, k, v, out_BSHV.transpose(1, 2), lse_BHS1, ctx.scale
        )
        return *gradients, None, None, None


def _empty_output(
    q_BHSK: torch.Tensor, k_BHSK: torch.Tensor, v_BHSV: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = q_BHSK.shape
    out_BSHV = q_BHSK.new_empty(batch, length, heads, v_BHSV.shape[-1])
    return out_BSHV.transpose(1, 2), q_BHSK.new_empty(batch, heads, length, 1, dtype=torch.float32)


@registered(_empty_output)
def cudnn_attention(
    q_BHSK: torch.Tensor, k_BHSK: torch.Tensor, v_BHSV: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, S, V), in memory as (B, S, H, V), and log-sum-exp (B, H, S, 1), FP32."""
    # The output takes the order of the queries' memory.
    assert q_BHSK.transpose(1, 2).is_contiguous(), "cuDNN's output would have the heads outside"
    out_BHSV, lse_BHS1, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q_BHSK, k_BHSK, v_BHSV, None, True, 0.0, True, False, scale=scale
    )
    return out_BHSV, lse_BHS1


def _empty_gradients(
    dout_BHSV: torch.Tensor,
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSV: torch.Tensor,
    out_BHSV: torch.Tensor,
    lse_BHS1: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q_BHSK), torch.empty_like(k_BHSK), torch.empty_like(v_BHSV)


@registered(_empty_gradients)
def cudnn_attention_backward(
    dout_BHSV: torch.Tensor,
    q_BHSK: torch.Tensor,
    k_BHSK: torch.Tensor,
    v_BHSV: torch.Tensor,
    out_BHSV: torch.Tensor,
    lse_BHS1: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, in memory as those are."""
    length = q_BHSK.shape[2]
    # The state of a random generator: without dropout nothing reads it.
    unread = q_BHSK.new_empty((), dtype=torch.int64)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout_BHSV,
        q_BHSK,
        k_BHSK,
        v_BHSV,
        out_BHSV,
        lse_BHS1,
        unread,
        unread,
        None,
        None,
        None,
        length,
        length,
        0.0,
        True,
        scale=scale,
    )
