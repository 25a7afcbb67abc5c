"""Small models on disk in Hugging Face's form, written with the safetensors library, not with our
own writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from k2train.checkpoint.hf_config import to_hf_config
from k2train.config.model import ModelConfig, YarnConfig
from k2train.layout.tensors import model_tensors

WriteHf = Callable[..., Path]


@pytest.fixture
def model() -> ModelConfig:
    """Three layers, one dense, four experts in two groups; no size is a multiple of another by
    chance."""
    return ModelConfig(
        vocab_size=37,
        hidden_size=20,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        intermediate_size=28,
        moe_intermediate_size=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=2,
        num_attention_heads=2,
        q_lora_rank=10,
        kv_lora_rank=9,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
        rope_theta=50000.0,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_scaling=YarnConfig(factor=4.0, original_max_position_embeddings=64, mscale_all_dim=1.0),
    )


@pytest.fixture
def weights(model: ModelConfig) -> dict[str, Tensor]:
    """BF16 weights, FP32 norms and FP32 correction biases: the mixture that published files
    have."""
    generator = torch.Generator().manual_seed(7)
    dtypes = {"bias": torch.float32, "norm": torch.float32}
    return {
        spec.name: torch.randn(spec.shape, generator=generator).to(dtypes.get(spec.role, torch.bfloat16))
        for spec in model_tensors(model)
    }


@pytest.fixture
def write_hf(tmp_path: Path, model: ModelConfig) -> WriteHf:
    """write_hf(tensors, files=1, config=None, name="hf") -> directory; files > 1 shards with an
    index."""

    def write(
        tensors: dict[str, Tensor], files: int = 1, config: dict | None = None, name: str = "hf"
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config or to_hf_config(model, "bfloat16")))
        if files == 1:
            save_file(tensors, directory / "model.safetensors")
            return directory
        names = sorted(tensors)
        shards = {f"model-{i + 1}-of-{files}.safetensors": names[i::files] for i in range(files)}
        for file, held in shards.items():
            save_file({name: tensors[name] for name in held}, directory / file)
        weight_map = {name: file for file, held in shards.items() for name in held}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory

    return write
