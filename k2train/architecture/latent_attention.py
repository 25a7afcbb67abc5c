"""Multi-head latent attention as data: queries and keys-values through narrow latents.

One rotary key is shared by all heads. DeepSeek-V2 (arXiv 2405.04434, section 2.1); names of
transformers' DeepseekV3Attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from k2train.architecture.heads import ClipRows, Heads
from k2train.architecture.tensors import TensorSpec, layer_prefix
from k2train.architecture.work import Op, Saved, Workload, norm, product
from k2train.config.model import ModelConfig


@dataclass(frozen=True)
class LatentMixer:
    """Widths in features. query_latent: None projects queries directly."""

    hidden: int
    heads: Heads
    query_latent: int | None
    latent: int

    @classmethod
    def of(cls, model: ModelConfig) -> LatentMixer:
        """The mixer of a config."""
        nope, rope, value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
        assert nope is not None
        assert rope is not None
        assert value is not None
        assert model.kv_lora_rank is not None
        heads = Heads(model.num_attention_heads, nope + rope, value, rope)
        return cls(model.hidden_size, heads, model.q_lora_rank, model.kv_lora_rank)

    @property
    def queries(self) -> int:
        """Rows of the query projection, head after head, each [unrotated | rotated]."""
        return self.heads.num * self.heads.query

    @property
    def compressed(self) -> int:
        """Rows of the key-value down-projection: [latent | rotary key]."""
        return self.latent + self.heads.rotated

    @property
    def keys_values(self) -> int:
        """Rows of the key-value up-projection, head after head, each [unrotated key | value]."""
        return self.heads.num * (self.heads.unrotated + self.heads.value)

    def tensors(self, layer: int) -> Iterator[TensorSpec]:
        """Of one layer, in the order of the computation."""
        hidden, prefix = self.hidden, f"{layer_prefix(layer)}.self_attn"
        if self.query_latent is None:
            yield TensorSpec(f"{prefix}.q_proj.weight", (self.queries, hidden), "matrix", layer)
        else:
            rank = self.query_latent
            yield TensorSpec(f"{prefix}.q_a_proj.weight", (rank, hidden), "matrix", layer)
            yield TensorSpec(f"{prefix}.q_a_layernorm.weight", (rank,), "norm", layer)
            yield TensorSpec(f"{prefix}.q_b_proj.weight", (self.queries, rank), "matrix", layer)
        down, up = (self.compressed, hidden), (self.keys_values, self.latent)
        yield TensorSpec(f"{prefix}.kv_a_proj_with_mqa.weight", down, "matrix", layer)
        yield TensorSpec(f"{prefix}.kv_a_layernorm.weight", (self.latent,), "norm", layer)
        yield TensorSpec(f"{prefix}.kv_b_proj.weight", up, "matrix", layer)
        output = self.heads.num * self.heads.value
        yield TensorSpec(f"{prefix}.o_proj.weight", (hidden, output), "matrix", layer)

    def ops(self, w: Workload) -> list[Op]:
        """From the normed input to the output projection."""
        output = self.heads.num * self.heads.value
        projection = product(w, "o_proj", w.tokens, output, self.hidden, "attention_output")
        return [*self._queries(w), *self._keys_values(w), *self.heads.ops(w), projection]

    def _queries(self, w: Workload) -> list[Op]:
        hidden, rank = self.hidden, self.query_latent
        if rank is None:
            return [product(w, "q_proj", w.tokens, hidden, self.queries, "input_norm_output", "query")]
        return [
            product(w, "q_a_proj", w.tokens, hidden, rank, "input_norm_output", "q_latent"),
            norm(w, "q_a_norm", rank, "q_latent_norm_output"),
            product(w, "q_b_proj", w.tokens, rank, self.queries, "q_latent_norm_output", "query"),
        ]

    def _keys_values(self, w: Workload) -> list[Op]:
        hidden, rank = self.hidden, self.latent
        return [
            product(w, "kv_a_proj", w.tokens, hidden, self.compressed, "input_norm_output", "kv_latent"),
            norm(w, "kv_a_norm", rank, "kv_latent_norm_output"),
            product(w, "kv_b_proj", w.tokens, rank, self.keys_values, "kv_latent_norm_output", "key_value"),
        ]

    def saved(self, w: Workload) -> dict[str, Saved]:
        """Keys are saved as attention reads them, every head with its copy of the rotary part."""
        saved = {
            "kv_latent": Saved(((w.tokens, self.compressed),), w.norm_statistics),
            "kv_latent_norm_output": Saved(((w.tokens, self.latent),)),
            **self.heads.saved(w),
        }
        if self.query_latent is not None:
            latent = ((w.tokens, self.query_latent),)
            saved["q_latent"] = Saved(latent, w.norm_statistics)
            saved["q_latent_norm_output"] = Saved(latent)
        return saved

    @property
    def clipped(self) -> Mapping[str, tuple[ClipRows, ...]]:
        """Rows of one head in the projections that QK-Clip touches, by the tensor's name in the
        mixer.

        The rotated key is shared by all heads, so it stays and its queries take the whole of gamma.
        It is the tail of kv_a_proj_with_mqa.
        """
        nope = ClipRows(self.heads.unrotated, "root")
        query = "q_proj" if self.query_latent is None else "q_b_proj"
        return {
            query: (nope, ClipRows(self.heads.rotated, "whole")),
            "kv_b_proj": (nope, ClipRows(self.heads.value, "none")),
        }

    def narrowed(self, model: ModelConfig, divisor: int) -> ModelConfig:
        """The config with latents and number of heads divided, at least 1 each."""
        return dataclasses.replace(
            model,
            kv_lora_rank=max(self.latent // divisor, 1),
            num_attention_heads=max(self.heads.num // divisor, 1),
            q_lora_rank=self.query_latent and max(self.query_latent // divisor, 1),
        )
