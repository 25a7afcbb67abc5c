"""Linear layer without bias, y = x W^T, with its weight gradient by plain autograd or handed to a slot.

Letters: T tokens, I input features, O output features.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

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

    With a slot, backward returns the input gradient and puts (weight, x, dy) there; the weight's own gradient is None.
    """
    wide = compute_dtype or x_TI.dtype
    if slot is None or not torch.is_grad_enabled():
        return F.linear(cast(x_TI, wide), cast(weight_OI, wide))
    return _QueuedLinear.apply(x_TI, weight_OI, slot, wide)


class _QueuedLinear(torch.autograd.Function):
    """Saves x alone. The weight is a parameter, alive anyway, and its identity names the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, weight_OI: torch.Tensor, slot: WeightGradSlot, wide: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(x_TI)
        ctx.weight, ctx.slot = weight_OI, slot
        return F.linear(cast(x_TI, wide), cast(weight_OI, wide))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dy_TO,) = grads
        (x_TI,) = ctx.saved_tensors
        ctx.slot.put(LinearWeightGrad(ctx.weight, x_TI.flatten(0, -2), dy_TO.flatten(0, -2)))
        dx_TI = torch.matmul(dy_TO, cast(ctx.weight, dy_TO.dtype))
        return cast(dx_TI, x_TI.dtype), None, None, None
