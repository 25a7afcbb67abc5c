"""Grouped-query attention as data: a key and a value head serve a group of query heads.

Ainslie and others (arXiv 2305.13245); names of transformers' Glm4MoeAttention. Biases and norms of
queries and keys are not part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from k2train.architecture.heads import ClipRows, Heads
from k2train.architecture.tensors import TensorSpec, layer_prefix
from k2train.architecture.work import Op, Saved, Workload, product
from k2train.config.model import ModelConfig


@dataclass(frozen=True)
class GroupedQueryMixer:
    """Widths in features. groups: key and value heads, each for `copies` query heads."""

    hidden: int
    heads: Heads
    groups: int

    @classmethod
    def of(cls, model: ModelConfig) -> GroupedQueryMixer:
        """The mixer of a config."""
        assert model.head_dim is not None
        assert model.num_key_value_heads is not None
        heads = Heads(model.num_attention_heads, model.head_dim, model.head_dim, model.rotated_features)
        return cls(model.hidden_size, heads, model.num_key_value_heads)

    @property
    def copies(self) -> int:
        """Query heads that read one key and value head."""
        return self.heads.num // self.groups

    @property
    def queries(self) -> int:
        """Rows of the query projection, head after head, each [rotated | unrotated]."""
        return self.heads.num * self.heads.query

    @property
    def keys(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.groups * self.heads.query

    def tensors(self, layer: int) -> Iterator[TensorSpec]:
        """Of one layer, in the order of the computation."""
        prefix = f"{layer_prefix(layer)}.self_attn"
        for name, rows in (("q_proj", self.queries), ("k_proj", self.keys), ("v_proj", self.keys)):
            yield TensorSpec(f"{prefix}.{name}.weight", (rows, self.hidden), "matrix", layer)
        yield TensorSpec(f"{prefix}.o_proj.weight", (self.hidden, self.queries), "matrix", layer)

    def ops(self, w: Workload) -> list[Op]:
        """From the normed input to the output projection."""
        tokens, hidden, reads = w.tokens, self.hidden, "input_norm_output"
        return [
            product(w, "q_proj", tokens, hidden, self.queries, reads, "query"),
            product(w, "k_proj", tokens, hidden, self.keys, reads, "key_value"),
            product(w, "v_proj", tokens, hidden, self.keys, reads, "key_value"),
            *self.heads.ops(w),
            product(w, "o_proj", tokens, self.queries, hidden, "attention_output"),
        ]

    def saved(self, w: Workload) -> dict[str, Saved]:
        """Keys and values are saved as attention reads them, every query head with its copy."""
        return self.heads.saved(w)

    @property
    def clipped(self) -> Mapping[str, tuple[ClipRows, ...]]:
        """Rows of one head in the projections that QK-Clip touches, by the tensor's name in the
        mixer.

        A key that several heads share stays, as latent attention's rotated key does, and its
        queries take the whole of gamma. A key of one head takes its root.
        """
        width = self.heads.query
        if self.copies > 1:
            return {"q_proj": (ClipRows(width, "whole"),)}
        return {"q_proj": (ClipRows(width, "root"),), "k_proj": (ClipRows(width, "root"),)}

    def narrowed(self, model: ModelConfig, divisor: int) -> ModelConfig:
        """The config with key and value heads divided, at least 1, as many query heads a key."""
        groups = max(self.groups // divisor, 1)
        return dataclasses.replace(
            model, num_key_value_heads=groups, num_attention_heads=groups * self.copies
        )
