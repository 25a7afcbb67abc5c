"""A mixture of experts as data: router, routed experts on the rows that arrive, shared experts.

DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; names of transformers' DeepseekV3MoE. Copies of
tokens are made and added up in the exchange, which the estimate counts apart. Routing is taken as
even: every rank gets as many rows as it sends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from k2train.architecture.feed_forward import Swiglu
from k2train.architecture.routing_tables import table_bytes
from k2train.architecture.tensors import TensorSpec, layer_prefix
from k2train.architecture.work import Op, Saved, Workload, accumulation_bytes, elementwise, product
from k2train.config.model import ModelConfig

NOT_REBUILDABLE = {
    "expert_input": "it comes from other ranks, by an all-to-all",
    "routing": "rows have already gone where it said, and a choice made again from rounded inputs "
    "could differ",
}
"""Activations that are not recomputed, and why."""
HOLDS_INDICES = ("routing",)
"""Activations that FP8 would destroy."""


@dataclass(frozen=True)
class ExpertsChannel:
    """The channel of a MoE layer. expert: one of `num_experts`; shared: None where there are
    none."""

    num_experts: int
    expert: Swiglu
    shared: Swiglu | None
    phase = "experts"

    @classmethod
    def of(cls, model: ModelConfig) -> ExpertsChannel:
        """The channel of a config's MoE layers."""
        hidden, width = model.hidden_size, model.moe_intermediate_size
        shared = model.n_shared_experts * width
        return cls(
            model.n_routed_experts,
            Swiglu("expert", hidden, width),
            Swiglu("shared", hidden, shared) if shared else None,
        )

    def router_tensors(self, layer: int) -> tuple[TensorSpec, TensorSpec]:
        """The gate and its correction bias."""
        prefix, shape = f"{layer_prefix(layer)}.mlp.gate", (self.num_experts, self.expert.hidden)
        return (
            TensorSpec(f"{prefix}.weight", shape, "matrix", layer),
            TensorSpec(f"{prefix}.e_score_correction_bias", shape[:1], "bias", layer),
        )

    def expert_tensors(self, layer: int, expert: int) -> Iterator[TensorSpec]:
        """Of one routed expert."""
        yield from self.expert.tensors(f"{layer_prefix(layer)}.mlp.experts.{expert}", layer, expert)

    def shared_tensors(self, layer: int) -> Iterator[TensorSpec]:
        """Of the shared experts, which are one feed-forward; of width 0 where there are none."""
        shared = self.shared or Swiglu("shared", self.expert.hidden, 0)
        yield from shared.tensors(f"{layer_prefix(layer)}.mlp.shared_experts", layer)

    def tensors(self, layer: int, experts: Iterable[int] | None = None) -> Iterator[TensorSpec]:
        """Of one layer; of its routed experts only `experts`, None for all."""
        yield from self.router_tensors(layer)
        for expert in range(self.num_experts) if experts is None else experts:
            yield from self.expert_tensors(layer, expert)
        if self.shared is not None:
            yield from self.shared_tensors(layer)

    def attention_ops(self, w: Workload) -> list[Op]:
        """The router, in the attention's phase, so that the exchange can begin after it."""
        return [self._router(w), elementwise(w, "top_k", 4 * w.tokens * self.num_experts)]

    def _router(self, w: Workload) -> Op:
        """Scores in the type of the sums.

        From BF16 their gradient is FP32 beside BF16 factors, so it is multiplied in parts: two,
        side by side, for the input gradient and three, one after another, for the weight gradient
        (ops.linear).
        """
        hidden, wide = self.expert.hidden, accumulation_bytes(w.dtype)
        reads, writes = "post_norm_output", "routing"
        op = product(w, "router", w.tokens, hidden, self.num_experts, reads, writes, gradient_bytes=wide)
        if w.dtype != "bfloat16":
            return op
        return dataclasses.replace(op, backward_flops=2 * op.flops, weight_passes=3)

    def ops(self, w: Workload) -> list[Op]:
        """Routed experts on the rows that arrived, shared experts on the rank's own tokens."""
        hidden, width, rows = self.expert.hidden, self.expert.width, w.rows
        local = self.num_experts // w.ep
        ops = [
            product(w, "experts_up", rows, hidden, 2 * width, "expert_input", "swiglu_input", local),
            elementwise(w, "swiglu", 3 * rows * width, "swiglu_output"),
            product(w, "experts_down", rows, width, hidden, "swiglu_output", copies=local),
        ]
        return ops + (self.shared.ops(w) if self.shared else [])

    def saved(self, w: Workload) -> dict[str, Saved]:
        hidden, width = self.expert.hidden, self.expert.width
        return {
            "routing": Saved((), self._routing_bytes(w)),
            "expert_input": Saved(((w.rows, hidden),)),
            "swiglu_input": Saved(((w.rows, 2 * width),)),
            "swiglu_output": Saved(((w.rows, width),)),
            **(self.shared.saved(w) if self.shared else {}),
        }

    def _routing_bytes(self, w: Workload) -> int:
        """Scores of all experts; of every (token, expert) pair its expert (8 bytes) and, at the
        expert, its weight; the tables of the route; the row after each local expert's last; with a
        balance loss, every sequence's loads."""
        experts, wide = self.num_experts, accumulation_bytes(w.dtype)
        loads = 8 * w.microbatch_size * experts if w.balance_loss else 0
        scores, choices = wide * w.tokens * experts, (8 + wide) * w.rows
        return scores + choices + table_bytes(w) + 4 * (experts // w.ep) + loads

    def gradient_numbers(self, w: Workload) -> int:
        """Numbers of gradients alive at once in the backward."""
        return w.rows * (2 * self.expert.hidden + 3 * self.expert.width)
