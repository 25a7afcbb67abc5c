"""Grouped linear layer: rows sorted by expert, each expert's rows times its own matrix.

torch's `grouped_mm` where it applies, a loop over experts elsewhere: grouped_mm knows no float64, and wants int32
offsets and rows that start on 16-byte boundaries. Letters: M rows, L local experts, I input and O output features.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from k2train.ops.dtypes import accumulation_dtype
from k2train.ops.weight_grad import BufferedSink, GradientSink, WeightGradSlot, add_product_into

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16


def grouped_mm(x_MI: torch.Tensor, weight_LIO: torch.Tensor, offsets_L: torch.Tensor) -> torch.Tensor:
    """Rows offsets[e-1]:offsets[e] of x times weight[e] (M, O); rows past the last offset are left undefined."""
    if _fast(x_MI, weight_LIO):
        return F.grouped_mm(x_MI, weight_LIO, offs=offsets_L)
    return grouped_mm_reference(x_MI, weight_LIO, offsets_L)


def grouped_mm_reference(
    x_MI: torch.Tensor, weight_LIO: torch.Tensor, offsets_L: torch.Tensor
) -> torch.Tensor:
    """The same as a loop over experts, for every type and width. Reads the offsets on the host."""
    y_MO = x_MI.new_zeros(x_MI.shape[0], weight_LIO.shape[2])
    for expert, (start, end) in enumerate(_ranges(offsets_L)):
        if end > start:
            torch.mm(x_MI[start:end], weight_LIO[expert], out=y_MO[start:end])
    return y_MO


def _fast(x_MI: torch.Tensor, weight_LIO: torch.Tensor) -> bool:
    """Whether grouped_mm takes these. The weight is a parameter or its transpose, so its widths are its strides."""
    size = x_MI.element_size()
    widths_fit = all(width * size % _ALIGNMENT_BYTES == 0 for width in weight_LIO.shape[1:])
    return widths_fit and _aligned(x_MI) and weight_LIO.data_ptr() % _ALIGNMENT_BYTES == 0


def _aligned(x_MI: torch.Tensor) -> bool:
    row_bytes = x_MI.shape[1] * x_MI.element_size()
    return (
        x_MI.dtype in _GROUPED_DTYPES
        and x_MI.device.type in ("cpu", "cuda")
        and x_MI.is_contiguous()
        and row_bytes % _ALIGNMENT_BYTES == 0
        and x_MI.data_ptr() % _ALIGNMENT_BYTES == 0
    )


def _ranges(offsets_L: torch.Tensor) -> list[tuple[int, int]]:
    ends = offsets_L.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@dataclasses.dataclass(frozen=True)
class GroupedWeightGrad:
    """The put-off weight gradient of one grouped layer."""

    weight: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor
    offsets: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.x, self.dy, self.offsets)

    def accumulate(self, sink: GradientSink) -> None:
        # On a CPU a loop that adds into the buffer beats one product that first needs a buffer of its own.
        loop = self.x.device.type == "cpu" or not _fast_weight_grad(self.x, self.dy)
        if isinstance(sink, BufferedSink) and loop:
            _add_products(sink.buffer(self.weight), self.dy, self.x, self.offsets)
        else:
            sink.add(self.weight, grouped_weight_grad(self.dy, self.x, self.offsets))


def grouped_weight_grad(dy_MO: torch.Tensor, x_MI: torch.Tensor, offsets_L: torch.Tensor) -> torch.Tensor:
    """Every expert's dy^T x (L, O, I), zero for an expert without rows; FP32 or FP64, but bfloat16's own on CUDA."""
    if _fast_weight_grad(x_MI, dy_MO):
        return F.grouped_mm(dy_MO.t(), x_MI, offs=offsets_L)
    wide = accumulation_dtype(x_MI.dtype)
    dw_LOI = x_MI.new_zeros(offsets_L.numel(), dy_MO.shape[1], x_MI.shape[1], dtype=wide)
    _add_products(dw_LOI, dy_MO, x_MI, offsets_L)
    return dw_LOI


def _fast_weight_grad(x_MI: torch.Tensor, dy_MO: torch.Tensor) -> bool:
    """grouped_mm gives its inputs' type, so on a CPU, where FP32 costs no more, bfloat16 takes the loop."""
    wide_enough = x_MI.dtype == torch.float32 or (x_MI.is_cuda and x_MI.dtype == torch.bfloat16)
    return wide_enough and _aligned(x_MI) and _aligned(dy_MO)


def _add_products(
    buffer_LOI: torch.Tensor, dy_MO: torch.Tensor, x_MI: torch.Tensor, offsets_L: torch.Tensor
) -> None:
    ends = offsets_L.tolist()
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    rows = (dy_MO[: ends[-1]].split(sizes), x_MI[: ends[-1]].split(sizes))
    for size, buffer_OI, dy_RO, x_RI in zip(sizes, buffer_LOI.unbind(0), *rows, strict=True):
        if size:
            add_product_into(buffer_OI, dy_RO, x_RI)


def grouped_linear(
    x_MI: torch.Tensor,
    weight_LOI: torch.Tensor,
    offsets_L: torch.Tensor,
    slot: WeightGradSlot | None = None,
) -> torch.Tensor:
    """x W_e^T (M, O) for rows sorted by expert; offsets_L int32 are the row after each expert's last.

    Rows past the last offset come out undefined and get an undefined gradient: a padded buffer must mask them.
    With a slot the weight gradient goes there, and the weight's own gradient is None.
    """
    return _GroupedLinear.apply(x_MI, weight_LOI, offsets_L, slot)


class _GroupedLinear(torch.autograd.Function):
    """Saves x and the offsets."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: torch.Tensor,
        weight_LOI: torch.Tensor,
        offsets_L: torch.Tensor,
        slot: WeightGradSlot | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_MI, offsets_L)
        ctx.weight, ctx.slot = weight_LOI, slot
        return grouped_mm(x_MI, weight_LOI.transpose(1, 2), offsets_L)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dy_MO = grads[0].contiguous()
        x_MI, offsets_L = ctx.saved_tensors
        dw_LOI = None
        if ctx.slot is not None:
            ctx.slot.put(GroupedWeightGrad(ctx.weight, x_MI, dy_MO, offsets_L))
        elif ctx.needs_input_grad[1]:
            dw_LOI = grouped_weight_grad(dy_MO, x_MI, offsets_L).to(ctx.weight.dtype)
        dx_MI = grouped_mm(dy_MO, ctx.weight, offsets_L) if ctx.needs_input_grad[0] else None
        return dx_MI, dw_LOI, None, None
