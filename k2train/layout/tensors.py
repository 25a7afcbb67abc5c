"""The catalogue of a model's tensors: Hugging Face name, shape, layer, expert and role, from the config alone.

Parameter counts, optimizer ownership, checkpoints and the Hugging Face import all read this one list, and a test holds
it against the tensors the torch model really has. Names are those of transformers' DeepseekV3ForCausalLM on disk, where
every expert's projections are separate tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Literal

from k2train.config.model import ModelConfig

Role = Literal["matrix", "embedding", "head", "norm", "bias"]
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One named tensor of the model.

    layer is None for the embedding, the final norm and the head; expert is None for everything but routed experts.
    role `bias` is the router's correction bias: a buffer that no gradient touches.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def trained(self) -> bool:
        """Whether gradients and an optimizer apply to it."""
        return self.role != "bias"

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies: matrices, embedding and head, not the norms."""
        return len(self.shape) == 2


def model_tensors(model: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model, embedding first, head last, layers in order."""
    yield from embedding_tensors(model)
    for layer in range(model.num_hidden_layers):
        yield from layer_tensors(model, layer)
    yield from head_tensors(model)


def embedding_tensors(model: ModelConfig) -> Iterator[TensorSpec]:
    """What comes before the first layer."""
    yield TensorSpec(EMBEDDING, (model.vocab_size, model.hidden_size), "embedding")


def head_tensors(model: ModelConfig) -> Iterator[TensorSpec]:
    """What comes after the last layer."""
    yield TensorSpec(FINAL_NORM, (model.hidden_size,), "norm")
    yield TensorSpec(HEAD, (model.vocab_size, model.hidden_size), "head")


def layer_tensors(
    model: ModelConfig, layer: int, experts: Iterable[int] | None = None
) -> Iterator[TensorSpec]:
    """The tensors of one transformer layer, counted from 0; of its routed experts only `experts`, None for all."""
    prefix = f"model.layers.{layer}"
    hidden = (model.hidden_size,)
    yield TensorSpec(f"{prefix}.input_layernorm.weight", hidden, "norm", layer)
    yield from _attention_tensors(model, layer, f"{prefix}.self_attn")
    yield TensorSpec(f"{prefix}.post_attention_layernorm.weight", hidden, "norm", layer)
    if not model.is_moe(layer):
        yield from _mlp_tensors(f"{prefix}.mlp", model.hidden_size, model.intermediate_size, layer)
        return
    num_experts = model.n_routed_experts
    yield TensorSpec(f"{prefix}.mlp.gate.weight", (num_experts, model.hidden_size), "matrix", layer)
    yield TensorSpec(f"{prefix}.mlp.gate.e_score_correction_bias", (num_experts,), "bias", layer)
    for expert in range(num_experts) if experts is None else experts:
        width = model.moe_intermediate_size
        yield from _mlp_tensors(f"{prefix}.mlp.experts.{expert}", model.hidden_size, width, layer, expert)
    if model.n_shared_experts:
        width = model.moe_intermediate_size * model.n_shared_experts
        yield from _mlp_tensors(f"{prefix}.mlp.shared_experts", model.hidden_size, width, layer)


def part_tensors(
    model: ModelConfig, layers: Iterable[int], embedding: bool, head: bool, experts: Iterable[int]
) -> Iterator[TensorSpec]:
    """The tensors of one virtual stage. experts: the routed experts held of every layer.

    The whole model's catalogue has 70,000 entries for K2, too many to list on 256 ranks.
    """
    held = tuple(experts)
    if embedding:
        yield from embedding_tensors(model)
    for layer in layers:
        yield from layer_tensors(model, layer, held)
    if head:
        yield from head_tensors(model)


def _attention_tensors(model: ModelConfig, layer: int, prefix: str) -> Iterator[TensorSpec]:
    hidden, heads = model.hidden_size, model.num_attention_heads
    queries = heads * model.qk_head_dim
    if model.q_lora_rank is None:
        yield TensorSpec(f"{prefix}.q_proj.weight", (queries, hidden), "matrix", layer)
    else:
        yield TensorSpec(f"{prefix}.q_a_proj.weight", (model.q_lora_rank, hidden), "matrix", layer)
        yield TensorSpec(f"{prefix}.q_a_layernorm.weight", (model.q_lora_rank,), "norm", layer)
        yield TensorSpec(f"{prefix}.q_b_proj.weight", (queries, model.q_lora_rank), "matrix", layer)
    latent = model.kv_lora_rank
    yield TensorSpec(
        f"{prefix}.kv_a_proj_with_mqa.weight", (latent + model.qk_rope_head_dim, hidden), "matrix", layer
    )
    yield TensorSpec(f"{prefix}.kv_a_layernorm.weight", (latent,), "norm", layer)
    key_values = heads * (model.qk_nope_head_dim + model.v_head_dim)
    yield TensorSpec(f"{prefix}.kv_b_proj.weight", (key_values, latent), "matrix", layer)
    yield TensorSpec(f"{prefix}.o_proj.weight", (hidden, heads * model.v_head_dim), "matrix", layer)


def _mlp_tensors(
    prefix: str, hidden: int, width: int, layer: int, expert: int | None = None
) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.gate_proj.weight", (width, hidden), "matrix", layer, expert)
    yield TensorSpec(f"{prefix}.up_proj.weight", (width, hidden), "matrix", layer, expert)
    yield TensorSpec(f"{prefix}.down_proj.weight", (hidden, width), "matrix", layer, expert)
