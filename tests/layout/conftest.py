"""The small model with twelve layers, on nodes of eight GPUs, in any layout."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from k2train.config.model import ModelConfig
from k2train.config.sections import ClusterConfig, LayoutConfig
from k2train.layout.build import build_layout
from k2train.layout.layout import Layout


@pytest.fixture
def model(small_model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(small_model, num_hidden_layers=12)


@pytest.fixture
def cluster(round_cluster: ClusterConfig) -> ClusterConfig:
    return dataclasses.replace(round_cluster, gpus_per_node=8)


@pytest.fixture
def make_layout(model: ModelConfig, cluster: ClusterConfig) -> Callable[..., Layout]:
    """make_layout(num_hidden_layers=..., **layout fields) -> Layout."""

    def make(num_hidden_layers: int = 12, cluster: ClusterConfig = cluster, **fields: Any) -> Layout:
        return build_layout(
            LayoutConfig(**fields), cluster, dataclasses.replace(model, num_hidden_layers=num_hidden_layers)
        )

    return make
