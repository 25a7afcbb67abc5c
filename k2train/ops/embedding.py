"""The gradient of an embedding's weight: every token's row of gradient, added to the row of the
weight that it looked up.

`index_add_` does that, but on CUDA in an order that changes from run to run where tokens are equal,
and from an FP32 copy of all gradients. There the rows of equal tokens are added up first, in the
order of the tokens, and then each row of the weight gets one addition. It is done some columns at a
time, so the FP32 values in between are 16 MB for 4096 tokens.

Letters: T tokens, D features, C columns at a time.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from k2train.ops.dtypes import accumulation_dtype, cast
from k2train.ops.weight_grad import GradientSink

COLUMNS = 1024


@dataclasses.dataclass(frozen=True)
class EmbeddingWeightGrad:
    """The put-off gradient of the embedding's rows."""

    weight: torch.Tensor
    tokens: torch.Tensor
    dx: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.tokens, self.dx)

    def accumulate(self, sink: GradientSink) -> None:
        if self.tokens.is_cuda or len(sink.runs(self.weight)) > 1:
            add_sums_of_equal_tokens(sink, self.weight, self.tokens, self.dx)
        else:
            wide = accumulation_dtype(self.weight.dtype)
            sink.add_rows(self.weight, self.tokens, cast(self.dx, wide))


def add_sums_of_equal_tokens(
    sink: GradientSink, weight: torch.Tensor, tokens_T: torch.Tensor, dx_TD: torch.Tensor
) -> None:
    """Add dx to the sums of the tokens' rows, each sum once and always in the same order. No wait
    for the device."""
    if not tokens_T.numel():
        return
    wide = accumulation_dtype(weight.dtype)
    sorted_T, order_T = torch.sort(tokens_T, stable=True)
    offsets_T = bags_of_equals(sorted_T)
    for column in range(0, dx_TD.shape[1], COLUMNS):
        wide_TC = dx_TD[:, column : column + COLUMNS].to(wide)
        sums_TC = F.embedding_bag(order_T, wide_TC, offsets_T, mode="sum")
        # A token that occurs again comes with a sum of zero, so the order of additions to its row
        # does not matter.
        sink.add_rows(weight, sorted_T, sums_TC, column)


def bags_of_equals(sorted_T: torch.Tensor) -> torch.Tensor:
    """Where each of T bags begins: the first of some equal numbers has a bag with all of them, the
    others an empty one."""
    place_T = torch.arange(sorted_T.numel(), device=sorted_T.device)
    first_T = torch.searchsorted(sorted_T, sorted_T)
    end_T = torch.searchsorted(sorted_T, sorted_T, right=True)
    return torch.where(first_T == place_T, place_T, end_T)
