"""A small MoE model, a cluster with round figures, and layouts, built without Hydra."""

import dataclasses

import pytest

from k2train.config.model import ModelConfig
from k2train.config.sections import ActivationsConfig, ClusterConfig, LayoutConfig, TrainConfig
from k2train.estimate.virtual_stage import build_estimator
from k2train.layout.build import build_layout

MODEL = ModelConfig(
    vocab_size=4096, hidden_size=256, num_hidden_layers=6, first_k_dense_replace=1, intermediate_size=640,
    moe_intermediate_size=128, n_routed_experts=24, num_experts_per_tok=4, n_shared_experts=2, num_attention_heads=4,
    q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24,
)  # fmt: skip
CLUSTER = ClusterConfig(
    name="test", gpus_per_node=4, matmul_flops_per_second=1e15, matmul_efficiency=0.5, attention_efficiency=0.25,
    memory_bytes_per_second=2e12, memory_efficiency=0.5, intranode_bytes_per_second=2e11, intranode_efficiency=0.5,
    internode_bytes_per_second=5e10, internode_efficiency=0.5, host_link_bytes_per_second=4e10,
    host_link_efficiency=0.5, kernel_latency_seconds=0.0, intranode_latency_seconds=0.0, internode_latency_seconds=0.0,
    device_memory_bytes=8e10, host_memory_bytes=1e12,
)  # fmt: skip
TRAIN = TrainConfig(seq_len=512, microbatch_size=2, global_batch_tokens=512 * 2 * 48, dtype="bfloat16")


@pytest.fixture
def model():
    return MODEL


@pytest.fixture
def cluster():
    return CLUSTER


@pytest.fixture
def train():
    return TRAIN


@pytest.fixture
def make_layout():
    """make_layout(cluster=..., **layout fields) -> Layout."""
    return lambda cluster=CLUSTER, **fields: build_layout(
        LayoutConfig(**fields), cluster, MODEL, TRAIN.seq_len
    )


@pytest.fixture
def make_estimator(make_layout):
    """make_estimator(policies, model=..., cluster=..., **layout fields) -> Estimator."""

    def make(policies=None, model=MODEL, cluster=CLUSTER, train=TRAIN, **fields):
        layout = build_layout(LayoutConfig(**fields), cluster, model, train.seq_len)
        return build_estimator(model, train, policies or ActivationsConfig(), layout, cluster)

    return make


@pytest.fixture
def policies():
    """policies(name=policy, ...) -> ActivationsConfig, everything else kept."""
    return lambda **changes: dataclasses.replace(ActivationsConfig(), **changes)
