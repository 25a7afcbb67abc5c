"""What every mixer shares: heads that score, their causal attention as operations, and their rows
for QK-Clip.

Sources: FlashAttention (arXiv 2307.08691) for the backward's products; Kimi K2 report, section 2.1,
for QK-Clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from k2train.architecture.work import Op, Saved, Workload, accumulation_bytes, elementwise

TRITON_SPEED = 0.7
"""Of cuDNN's attention, whose share of the matrix rate the cluster file has.

Public figures for a forward on an H100 at 4096 positions and width 128, in TFLOP/s: cuDNN 609,
FlashAttention-3 590 to 638, Triton 389 to 458 (pytorch/benchmark, #2391).
"""

Share = Literal["root", "whole", "none"]


@dataclass(frozen=True)
class ClipRows:
    """Neighbouring rows of one head in a projection, and what QK-Clip multiplies them by.

    share: the root of gamma, where the other factor of the logit takes the other root; the whole of
    it, where the other factor is shared with heads that must not change; none, 1.
    """

    rows: int
    share: Share


@dataclass(frozen=True)
class Heads:
    """The heads as attention sees them: how many, and the features of each.

    rotated: of the query's and key's features, those that the rotary embedding turns.
    """

    num: int
    query: int
    value: int
    rotated: int

    @property
    def unrotated(self) -> int:
        """Features of a query or key that stay as they are."""
        return self.query - self.rotated

    def score_flops(self, seq_len: int) -> float:
        """Forward FLOPs of the scores and of their product with the values, for a token of a causal
        sequence.

        A token sees (seq_len + 1) / 2 positions on average, its own among them.
        """
        return (seq_len + 1) * self.num * (self.query + self.value)

    def ops(self, w: Workload) -> list[Op]:
        """Rotation, attention, and what is found of each row."""
        forward = w.tokens * self.score_flops(w.seq_len)
        # The backward rebuilds the scores and takes gradients of scores, values, queries and keys:
        # three products of the query-key width and two of the value width, where the forward has
        # one of each. The Triton kernels take queries and keys apart, and rebuild scores and their
        # gradients for each.
        twice = 1 if w.attention == "triton" else 0
        products = (3 + twice) * self.query + (2 + twice) * self.value
        attention = Op(
            "attention",
            "attention",
            w.element_bytes * w.tokens * self.num * (2 * self.query + 2 * self.value),
            forward,
            "attention_output",
            backward_flops=forward * products / (self.query + self.value),
            relative_speed=TRITON_SPEED if w.attention == "triton" else 1.0,
        )
        # Queries and keys are written once more, rotated and put together with their unrotated
        # part.
        rotary = elementwise(w, "rotary", 4 * w.tokens * self.num * self.query)
        return [rotary, attention, *([self._row_statistics(w)] if w.fused_attention else [])]

    def _row_statistics(self, w: Workload) -> Op:
        """A number of each row: forward the largest logit, backward the sum of output times
        gradient.

        The largest logits are the attention's own but for cuDNN's. There a kernel reads every row's
        log-sum-exp, and that is all while no head's passes QK-Clip's tau; wanted exactly whatever
        they are, they may need all scores once more.
        """
        rows = w.tokens * self.num
        outputs = 2 * w.element_bytes * rows * self.value
        scores = 0.0
        if w.attention == "cudnn" and w.exact_max_logits:
            share = self.query / (self.query + self.value)
            scores = share * w.tokens * self.score_flops(w.seq_len)
        return Op(
            "row_statistics",
            "attention" if scores else "elementwise",
            4.0 * rows,
            backward_flops=0.0,
            backward_bytes=outputs + 4.0 * rows,
            extra_flops=scores,
            relative_speed=TRITON_SPEED,
        )

    def saved(self, w: Workload) -> dict[str, Saved]:
        """Queries, keys and values as attention reads them, every head's, and its output."""
        rows = w.tokens * self.num
        statistics = accumulation_bytes(w.dtype) * rows if w.fused_attention else 0
        return {
            "query": Saved(((rows, self.query),)),
            "key_value": Saved(((rows, self.query), (rows, self.value))),
            "attention_output": Saved(((w.tokens, self.num * self.value),), statistics),
        }

    @property
    def gradient_numbers(self) -> int:
        """Numbers a token of the gradients of queries, keys, values and output, alive at once."""
        return self.num * (2 * self.query + 2 * self.value)
