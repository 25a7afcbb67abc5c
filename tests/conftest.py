"""What several rooms' tests start from, built without Hydra."""

from collections.abc import Callable

import pytest
import torch

from k2train.config.model import ModelConfig
from k2train.config.sections import ClusterConfig
from k2train.model.model import Model, build_model
from k2train.model.pieces import whole_model


@pytest.fixture
def small_model() -> ModelConfig:
    """A MoE model of six layers with K2's rules."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=6,
        first_k_dense_replace=1,
        intermediate_size=640,
        moe_intermediate_size=128,
        n_routed_experts=24,
        num_experts_per_tok=4,
        n_shared_experts=2,
        num_attention_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=24,
    )


@pytest.fixture
def round_cluster() -> ClusterConfig:
    """Nodes of four GPUs with round figures and no latencies."""
    return ClusterConfig(
        name="test",
        gpus_per_node=4,
        matmul_flops_per_second=1e15,
        matmul_efficiency=0.5,
        attention_efficiency=0.25,
        memory_bytes_per_second=2e12,
        memory_efficiency=0.5,
        intranode_bytes_per_second=2e11,
        intranode_efficiency=0.5,
        internode_bytes_per_second=5e10,
        internode_efficiency=0.5,
        host_link_bytes_per_second=4e10,
        host_link_efficiency=0.5,
        kernel_latency_seconds=0.0,
        intranode_latency_seconds=0.0,
        internode_latency_seconds=0.0,
        device_memory_bytes=8e10,
        host_memory_bytes=1e12,
    )


def lively_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Model:
    """A whole model whose weights make routing and attention matter.

    Matrices get deviation 1.25 / sqrt(inputs), so that every product keeps its input's scale and
    logits spread over several units; norms vary around 1; correction biases are as large as the
    scores' spread, so they change the choice.
    """
    model = build_model(config, whole_model(config), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for piece in model.pieces():
        tensor = piece.tensor
        values = torch.randn(tensor.shape, generator=generator)
        if not piece.trained:
            values = values * 0.2
        elif tensor.dim() == 1:
            values = 1 + 0.3 * values
        else:
            values = values * 1.25 / tensor.shape[1] ** 0.5
        tensor.copy_(values)
    return model


@pytest.fixture
def make_model() -> Callable[..., Model]:
    return lively_model
