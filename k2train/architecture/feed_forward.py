"""SwiGLU feed-forwards as data: down(silu(gate(x)) * up(x)); and the dense layer's channel.

Shazeer (arXiv 2002.05202). Gate and up are multiplied as one product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from k2train.architecture.tensors import TensorSpec, layer_prefix
from k2train.architecture.work import Op, Saved, Workload, elementwise, product
from k2train.config.model import ModelConfig


@dataclass(frozen=True)
class Swiglu:
    """One feed-forward for every token. kind begins the names of its activations: mlp or shared."""

    kind: str
    hidden: int
    width: int

    def tensors(self, prefix: str, layer: int, expert: int | None = None) -> Iterator[TensorSpec]:
        """Gate, up and down projection."""
        up, down = (self.width, self.hidden), (self.hidden, self.width)
        yield TensorSpec(f"{prefix}.gate_proj.weight", up, "matrix", layer, expert)
        yield TensorSpec(f"{prefix}.up_proj.weight", up, "matrix", layer, expert)
        yield TensorSpec(f"{prefix}.down_proj.weight", down, "matrix", layer, expert)

    def ops(self, w: Workload) -> list[Op]:
        """From the normed residual stream to the output of the down-projection."""
        kind, tokens, hidden, width = self.kind, w.tokens, self.hidden, self.width
        return [
            product(w, f"{kind}_up", tokens, hidden, 2 * width, "post_norm_output", f"{kind}_swiglu_input"),
            elementwise(w, f"{kind}_swiglu", 3 * tokens * width, f"{kind}_swiglu_output"),
            product(w, f"{kind}_down", tokens, width, hidden, f"{kind}_swiglu_output"),
        ]

    def saved(self, w: Workload) -> dict[str, Saved]:
        return {
            f"{self.kind}_swiglu_input": Saved(((w.tokens, 2 * self.width),)),
            f"{self.kind}_swiglu_output": Saved(((w.tokens, self.width),)),
        }


@dataclass(frozen=True)
class DenseChannel:
    """The channel of a dense layer: one feed-forward for every token."""

    mlp: Swiglu
    phase = "mlp"
    num_experts = 0

    @classmethod
    def of(cls, model: ModelConfig) -> DenseChannel:
        """The channel of a config's dense layers."""
        return cls(Swiglu("mlp", model.hidden_size, model.intermediate_size))

    def tensors(self, layer: int, experts: Iterable[int] | None = None) -> Iterator[TensorSpec]:
        """Of one layer; it has no experts to choose among."""
        yield from self.mlp.tensors(f"{layer_prefix(layer)}.mlp", layer)

    def attention_ops(self, w: Workload) -> list[Op]:
        """Nothing is done in the attention's phase."""
        return []

    def ops(self, w: Workload) -> list[Op]:
        """The feed-forward and its residual addition."""
        return [*self.mlp.ops(w), elementwise(w, "residual", 3 * w.tokens * self.mlp.hidden)]

    def saved(self, w: Workload) -> dict[str, Saved]:
        return self.mlp.saved(w)

    def gradient_numbers(self, w: Workload) -> int:
        """Numbers of gradients alive at once in the backward."""
        return w.tokens * (2 * self.mlp.hidden + 3 * self.mlp.width)
