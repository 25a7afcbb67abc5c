"""Small models of the families, and transformers' DeepseekV3 or Glm4Moe with the same weights:
oracles nobody here wrote."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from k2train.config.model import ModelConfig, YarnConfig
from k2train.model.model import Model

K2 = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    num_attention_heads=4,
    q_lora_rank=24,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=16,
    v_head_dim=10,
    routed_scaling_factor=2.827,
    rope_theta=50000.0,
    rope_scaling=YarnConfig(
        factor=32.0,
        original_max_position_embeddings=4096,
        beta_fast=1.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    max_position_embeddings=131072,
)
DEEPSEEK_V3 = dataclasses.replace(
    K2,
    num_hidden_layers=5,
    first_k_dense_replace=3,
    n_routed_experts=32,
    num_experts_per_tok=6,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    rope_theta=10000.0,
    rope_scaling=YarnConfig(
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
)
MOONLIGHT = dataclasses.replace(
    K2,
    q_lora_rank=None,
    n_shared_experts=2,
    num_experts_per_tok=3,
    routed_scaling_factor=2.446,
    rms_norm_eps=1e-5,
    rope_scaling=None,
)
# Nothing here is a multiple of 16 bytes, a power of two, or equal to its neighbour.
ODD = dataclasses.replace(
    K2,
    vocab_size=101,
    hidden_size=40,
    intermediate_size=54,
    moe_intermediate_size=13,
    n_routed_experts=7,
    num_experts_per_tok=3,
    num_attention_heads=3,
    q_lora_rank=11,
    kv_lora_rank=9,
    qk_nope_head_dim=5,
    qk_rope_head_dim=6,
    v_head_dim=7,
    rope_scaling=YarnConfig(
        factor=4.0,
        original_max_position_embeddings=16,
        beta_fast=8.0,
        beta_slow=2.0,
        mscale=0.7,
        mscale_all_dim=0.4,
    ),
)
GLM = dataclasses.replace(
    MOONLIGHT,
    mixer="grouped_query",
    kv_lora_rank=None,
    qk_nope_head_dim=None,
    qk_rope_head_dim=None,
    v_head_dim=None,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=12,
    partial_rotary_factor=0.5,
)
# As many key heads as query heads, all features rotated, and widths that are no power of two.
GLM_ODD = dataclasses.replace(
    GLM, hidden_size=40, num_attention_heads=3, num_key_value_heads=3, head_dim=14, partial_rotary_factor=None
)
FAMILIES = {
    "k2": K2,
    "deepseek_v3": DEEPSEEK_V3,
    "moonlight": MOONLIGHT,
    "odd": ODD,
    "glm": GLM,
    "glm_odd": GLM_ODD,
}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> ModelConfig:
    return FAMILIES[request.param]


@pytest.fixture
def families():
    return FAMILIES


def hf_config(config: ModelConfig, attention: str = "eager", experts: str = "eager"):
    """The DeepseekV3Config or Glm4MoeConfig with the same rules."""
    from transformers import DeepseekV3Config, Glm4MoeConfig

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope = {**rope, **dataclasses.asdict(config.rope_scaling), "rope_type": "yarn"}
    values = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    del values["rope_theta"]
    latent = values.pop("mixer") == "latent"
    if latent:
        values |= {"num_key_value_heads": config.num_attention_heads, "q_lora_rank": config.q_lora_rank}
        values.pop("rope_scaling", None)
    else:
        rope["partial_rotary_factor"] = values.pop("partial_rotary_factor", 1.0)
    return (DeepseekV3Config if latent else Glm4MoeConfig)(
        **values,
        rope_parameters=rope,
        attn_implementation=attention,
        experts_implementation=experts,
        num_mtp_layers=0,
        use_cache=False,
    )


def hf_view(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The tensor `name`, as on disk, inside transformers' in-memory state, where experts are
    fused."""
    if name in tensors:
        return tensors[name]
    prefix, rest = name.split(".experts.")
    expert, projection, _ = rest.split(".")
    if projection == "down_proj":
        return tensors[f"{prefix}.experts.down_proj"][int(expert)]
    gate_up = tensors[f"{prefix}.experts.gate_up_proj"][int(expert)]
    width = gate_up.shape[0] // 2
    return gate_up[:width] if projection == "gate_proj" else gate_up[width:]


@pytest.fixture
def make_oracle():
    """Builds transformers' model holding a k2train model's weights."""

    def make(model: Model, **options: str):
        from transformers import DeepseekV3ForCausalLM, Glm4MoeForCausalLM

        latent = model.config.mixer == "latent"
        oracle_class = DeepseekV3ForCausalLM if latent else Glm4MoeForCausalLM
        oracle = oracle_class(hf_config(model.config, **options)).to(model_dtype(model))
        state = oracle.state_dict()
        for piece in model.pieces():
            hf_view(state, piece.name).copy_(piece.tensor)
        return oracle

    return make


def model_dtype(model: Model) -> torch.dtype:
    return next(piece.parameter.dtype for piece in model.pieces())


@pytest.fixture
def oracle_gradient():
    """The gradient of a tensor by its on-disk name."""

    def gradient(oracle, name: str) -> torch.Tensor:
        return hf_view({n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}, name)

    return gradient
