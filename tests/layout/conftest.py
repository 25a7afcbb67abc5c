"""Small configs for layout tests, built without Hydra."""

import dataclasses

import pytest

from k2train.config.model import ModelConfig
from k2train.config.sections import ClusterConfig, LayoutConfig
from k2train.layout.build import build_layout

MODEL = ModelConfig(
    vocab_size=300, hidden_size=16, num_hidden_layers=12, first_k_dense_replace=1, intermediate_size=48,
    moe_intermediate_size=8, n_routed_experts=24, num_experts_per_tok=2, n_shared_experts=1, num_attention_heads=2,
    q_lora_rank=8, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4,
)  # fmt: skip
CLUSTER = ClusterConfig(
    name="test", gpus_per_node=8, matmul_flops_per_second=1e15, matmul_efficiency=0.5, attention_efficiency=0.5,
    memory_bytes_per_second=1e12, memory_efficiency=0.5, intranode_bytes_per_second=1e11,
    internode_bytes_per_second=1e10, intranode_efficiency=0.5, internode_efficiency=0.5, host_link_bytes_per_second=1e10, host_link_efficiency=0.5,
    kernel_latency_seconds=1e-6, intranode_latency_seconds=1e-6, internode_latency_seconds=1e-5,
    device_memory_bytes=8e10, host_memory_bytes=1e12,
)  # fmt: skip


@pytest.fixture
def model():
    return MODEL


@pytest.fixture
def cluster():
    return CLUSTER


@pytest.fixture
def make_layout():
    """make_layout(num_hidden_layers=..., **layout fields) -> Layout."""

    def make(num_hidden_layers=12, cluster=CLUSTER, **fields):
        return build_layout(LayoutConfig(**fields), cluster,
                            dataclasses.replace(MODEL, num_hidden_layers=num_hidden_layers))  # fmt: skip

    return make
