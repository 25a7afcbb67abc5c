"""Linear layer without bias, y = x W^T, with its weight gradient by plain autograd or handed to a
slot.

The router computes in FP32 from BF16 inputs and weights. On CUDA that takes BF16 products with FP32
results (`bf16_products`):

    y   one product: as exact as FP32's, in another order of sums
    dx  the gradient of y is FP32, so two parts of it, which differ from it by at most 2^-17 of each
        element; dx itself is
        rounded to BF16, by up to 2^-8
    dw  three parts of it, which are all of it

Letters: T tokens, I input features, O output features, P two parts of O side by side.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from k2train.ops import bf16_products
from k2train.ops.dtypes import cast
from k2train.ops.weight_grad import GradientSink, WeightGradSlot, add_product


@dataclasses.dataclass(frozen=True)
class LinearWeightGrad:
    """The put-off weight gradient of one linear layer."""

    weight: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.x, self.dy)

    def accumulate(self, sink: GradientSink) -> None:
        add_product(sink, self.weight, self.dy, self.x)


def linear(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    slot: WeightGradSlot | None = None,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x W^T (T, O), in `compute_dtype` where given (the router's FP32), else in the inputs' type.

    With a slot, backward returns the input gradient and puts (weight, x, dy) there; the weight's
    own gradient is None.
    """
    wide = compute_dtype or x_TI.dtype
    if torch.is_grad_enabled():
        if slot is None:
            return F.linear(cast(x_TI, wide), cast(weight_OI, wide))
        return _QueuedLinear.apply(x_TI, weight_OI, slot, wide)
    return _product(x_TI, weight_OI, wide)


def _product(x_TI: torch.Tensor, weight_OI: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """x W^T in the type `wide`."""
    if bf16_products.takes(x_TI, weight_OI, wide):
        return bf16_products.multiply(x_TI, weight_OI.t())
    return F.linear(cast(x_TI, wide), cast(weight_OI, wide))


def _input_gradient(dy_TO: torch.Tensor, weight_OI: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dy W (T, I) in the inputs' type."""
    if dy_TO.dtype != dtype and bf16_products.takes(dy_TO, weight_OI):
        return product_of_parts(dy_TO, weight_OI)
    return cast(torch.matmul(dy_TO, cast(weight_OI, dy_TO.dtype)), dtype)


def product_of_parts(dy_TO: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """dy W (T, I) in BF16 from FP32 dy and BF16 W: one product over two parts of dy, side by side,
    rounded once."""
    parts_TP = torch.cat(bf16_products.bf16_parts(dy_TO, 2), dim=1)
    return torch.mm(parts_TP, torch.cat((weight_OI, weight_OI)))


class _QueuedLinear(torch.autograd.Function):
    """Saves x alone. The weight is a parameter, alive anyway, and its identity names the
    gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, slot: WeightGradSlot, wide: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TI)
        ctx.weight, ctx.slot = weight_OI, slot
        return _product(x_TI, weight_OI, wide)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dy_TO,) = grads
        (x_TI,) = ctx.saved_tensors
        ctx.slot.put(LinearWeightGrad(ctx.weight, x_TI.flatten(0, -2), dy_TO.flatten(0, -2)))
        return _input_gradient(dy_TO, ctx.weight, x_TI.dtype), None, None, None
