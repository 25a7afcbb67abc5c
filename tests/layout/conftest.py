"""The small model with twelve layers, on nodes of eight GPUs, in any layout."""

import dataclasses

import pytest

from k2train.config.model import ModelConfig
from k2train.config.sections import ClusterConfig, LayoutConfig
from k2train.layout.build import build_layout


@pytest.fixture
def model(small_model: ModelConfig):
    return dataclasses.replace(small_model, num_hidden_layers=12)


@pytest.fixture
def cluster(round_cluster: ClusterConfig):
    return dataclasses.replace(round_cluster, gpus_per_node=8)


@pytest.fixture
def make_layout(model, cluster):
    """make_layout(num_hidden_layers=..., **layout fields) -> Layout."""

    def make(num_hidden_layers: int = 12, cluster=cluster, **fields):
        return build_layout(
            LayoutConfig(**fields), cluster, dataclasses.replace(model, num_hidden_layers=num_hidden_layers)
        )

    return make
