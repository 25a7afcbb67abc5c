"""config.json of GLM-4-MoE: what a file leaves out is what transformers takes for it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention, Glm4MoeRotaryEmbedding

from k2train.checkpoint.hf_config import to_hf_config, to_model_config

FILE: dict[str, Any] = {
    "model_type": "glm4_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
}
ROPE = {"rope_type": "default", "rope_theta": 5e4}


def widths_of_transformers(file: dict[str, Any]) -> tuple[int, int]:
    """Features of a head, and how many of them transformers rotates."""
    config = Glm4MoeConfig(**{key: value for key, value in file.items() if key != "model_type"})
    pairs = len(Glm4MoeRotaryEmbedding(config).inv_freq)
    return Glm4MoeAttention(config, 0).head_dim, 2 * pairs


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"head_dim": 12},
        {"head_dim": 12, "partial_rotary_factor": 1.0},
        {"head_dim": 16, "rope_parameters": ROPE},
        {"head_dim": 16, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}},
        {
            "head_dim": 16,
            "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
            "partial_rotary_factor": 0.25,
        },
        {"head_dim": 16, "rope_theta": 1e6, "rope_scaling": None, "partial_rotary_factor": 0.25},
    ],
    ids=["neither", "no share", "share on top", "rope without share", "share in rope", "both", "version 4"],
)
def test_head_width_and_rotated_share_are_those_of_transformers(given: dict[str, Any]) -> None:
    file = {**FILE, **given}
    model = to_model_config(file)
    assert (model.head_dim, model.rotated_features) == widths_of_transformers(file)
    written = to_hf_config(model, "float32")
    assert widths_of_transformers(written) == widths_of_transformers(file)
    assert to_model_config(written) == model
