"""Grouped linear layer: rows sorted by expert, each expert's rows times its own matrix.

torch's `grouped_mm` where it applies, a loop over experts elsewhere: grouped_mm knows no float64,
and wants int32 offsets and rows that start on 16-byte boundaries. Letters: M rows, L local experts,
I input and O output features.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from k2train.ops.dtypes import accumulation_dtype
from k2train.ops.weight_grad import GradientSink, WeightGradSlot, add_product_into

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CUDA_GROUPED_DTYPES = (torch.bfloat16,)
_ALIGNMENT_BYTES = 16


class GroupedProduct(Protocol):
    """Whose kernels multiply: `grouped_mm`, or `te_grouped.TeGroupedMM`."""

    def __call__(
        self,
        x_MI: torch.Tensor,
        weight_LIO: torch.Tensor,
        offsets_L: torch.Tensor,
        rows_L: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Shapes as `grouped_mm`'s."""
        ...


def grouped_mm(
    x_MI: torch.Tensor, weight_LIO: torch.Tensor, offsets_L: torch.Tensor, rows_L: Sequence[int] | None = None
) -> torch.Tensor:
    """Rows offsets[e-1]:offsets[e] of x times weight[e] (M, O); rows past the last offset are left
    undefined.

    rows_L: each expert's number of rows, where the host knows them.
    """
    if _fast(x_MI, weight_LIO):
        return F.grouped_mm(x_MI, weight_LIO, offs=offsets_L)
    return grouped_mm_reference(x_MI, weight_LIO, offsets_L, rows_L)


def grouped_mm_reference(
    x_MI: torch.Tensor, weight_LIO: torch.Tensor, offsets_L: torch.Tensor, rows_L: Sequence[int] | None = None
) -> torch.Tensor:
    """The same as a loop over experts, for every type and width. Reads the offsets on the host
    where rows_L is None."""
    y_MO = x_MI.new_zeros(x_MI.shape[0], weight_LIO.shape[2])
    for expert, (start, end) in enumerate(_ranges(offsets_L) if rows_L is None else _ranges_of(rows_L)):
        if end > start:
            torch.mm(x_MI[start:end], weight_LIO[expert], out=y_MO[start:end])
    return y_MO


def _fast(x_MI: torch.Tensor, weight_LIO: torch.Tensor) -> bool:
    """Whether grouped_mm takes these: on CUDA 16 bits alone. The weight is a parameter or its
    transpose, so its widths are its strides."""
    size = x_MI.element_size()
    widths_fit = all(width * size % _ALIGNMENT_BYTES == 0 for width in weight_LIO.shape[1:])
    return widths_fit and _aligned(x_MI) and _begins_aligned(weight_LIO)


def _begins_aligned(t: torch.Tensor) -> bool:
    """Whether the tensor begins on a boundary: torch's allocators align every storage to 64 bytes
    or more."""
    return int(t.storage_offset()) * t.element_size() % _ALIGNMENT_BYTES == 0


def _aligned(x_MI: torch.Tensor) -> bool:
    row_bytes = x_MI.shape[1] * x_MI.element_size()
    return (
        x_MI.dtype in (_GROUPED_DTYPES if x_MI.device.type == "cpu" else _CUDA_GROUPED_DTYPES)
        and x_MI.device.type in ("cpu", "cuda")
        and x_MI.is_contiguous()
        and row_bytes % _ALIGNMENT_BYTES == 0
        and _begins_aligned(x_MI)
    )


def _ranges(offsets_L: torch.Tensor) -> list[tuple[int, int]]:
    """First and last row of every expert. Waits for the device."""
    ends = offsets_L.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _ranges_of(rows_L: Sequence[int]) -> list[tuple[int, int]]:
    """The same from the numbers of rows."""
    return list(itertools.pairwise(itertools.accumulate(rows_L, initial=0)))


@dataclasses.dataclass(frozen=True)
class GroupedWeightGrad:
    """The put-off weight gradient of one grouped layer. rows: those of each expert, where the host
    knows them already."""

    weight: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor
    offsets: torch.Tensor
    rows: tuple[int, ...] | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.x, self.dy, self.offsets)

    def accumulate(self, sink: GradientSink) -> None:
        """Expert by expert into the sums. Waits for the device where it must ask for the number of
        rows."""
        runs = sink.runs(self.weight)
        if not self.x.is_cuda and len(runs) > self.weight.shape[0]:
            # One addition a run: products of few rows are slow on a CPU.
            sink.add(self.weight, grouped_weight_grad(self.dy, self.x, self.offsets))
            return
        ranges = _ranges(self.offsets) if self.rows is None else _ranges_of(self.rows)
        for run in runs:
            start, end = ranges[run.matrix]
            if end > start:
                add_product_into(run.buffer, self.dy[start:end, run.first : run.last], self.x[start:end])


def grouped_weight_grad(dy_MO: torch.Tensor, x_MI: torch.Tensor, offsets_L: torch.Tensor) -> torch.Tensor:
    """Every expert's dy^T x (L, O, I), zero for an expert without rows; FP32 or FP64."""
    if x_MI.dtype == torch.float32 and _aligned(x_MI) and _aligned(dy_MO):
        return F.grouped_mm(dy_MO.t(), x_MI, offs=offsets_L)
    wide = accumulation_dtype(x_MI.dtype)
    dw_LOI = x_MI.new_zeros(offsets_L.numel(), dy_MO.shape[1], x_MI.shape[1], dtype=wide)
    for dw_OI, (start, end) in zip(dw_LOI.unbind(0), _ranges(offsets_L), strict=True):
        if end > start:
            add_product_into(dw_OI, dy_MO[start:end], x_MI[start:end])
    return dw_LOI


def grouped_linear(
    x_MI: torch.Tensor,
    weight_LOI: torch.Tensor,
    offsets_L: torch.Tensor,
    slot: WeightGradSlot | None = None,
    rows: tuple[int, ...] | None = None,
    product: GroupedProduct = grouped_mm,
) -> torch.Tensor:
    """x W_e^T (M, O) for rows sorted by expert; offsets_L int32 are the row after each expert's
    last.

    Rows past the last offset come out undefined and get an undefined gradient: a padded buffer must
    mask them. With a slot the weight gradient goes there, and the weight's own gradient is None.
    rows: how many rows each expert has, where the host knows; the weight gradient must otherwise
    wait for the device to learn it. product: whose kernels compute y and the gradient of x.
    """
    return _GroupedLinear.apply(x_MI, weight_LOI, offsets_L, slot, rows, product)


class _GroupedLinear(torch.autograd.Function):
    """Saves x and the offsets."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MI: torch.Tensor,
        weight_LOI: torch.Tensor,
        offsets_L: torch.Tensor,
        slot: WeightGradSlot | None,
        rows: tuple[int, ...] | None,
        product: GroupedProduct,
    ) -> torch.Tensor:
        ctx.save_for_backward(x_MI, offsets_L)
        ctx.weight, ctx.slot, ctx.rows, ctx.product = weight_LOI, slot, rows, product
        return product(x_MI, weight_LOI.transpose(1, 2), offsets_L, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dy_MO = grads[0].contiguous()
        x_MI, offsets_L = ctx.saved_tensors
        dw_LOI = None
        if ctx.slot is not None:
            ctx.slot.put(GroupedWeightGrad(ctx.weight, x_MI, dy_MO, offsets_L, ctx.rows))
        elif ctx.needs_input_grad[1]:
            dw_LOI = grouped_weight_grad(dy_MO, x_MI, offsets_L).to(ctx.weight.dtype)
        needed = ctx.needs_input_grad[0]
        dx_MI = ctx.product(dy_MO, ctx.weight, offsets_L, ctx.rows) if needed else None
        return dx_MI, dw_LOI, None, None, None, None
