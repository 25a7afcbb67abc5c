"""The small model on the round cluster: layouts and estimators."""

import dataclasses

import pytest

from k2train.config.model import ModelConfig
from k2train.config.sections import ActivationsConfig, ClusterConfig, LayoutConfig, TrainConfig
from k2train.estimate.virtual_stage import build_estimator
from k2train.layout.build import build_layout

TRAIN = TrainConfig(seq_len=512, microbatch_size=2, global_batch_tokens=512 * 2 * 48, dtype="bfloat16")


@pytest.fixture
def model(small_model: ModelConfig):
    return small_model


@pytest.fixture
def cluster(round_cluster: ClusterConfig):
    return round_cluster


@pytest.fixture
def train():
    return TRAIN


@pytest.fixture
def make_layout(model, cluster):
    """make_layout(cluster=..., **layout fields) -> Layout."""
    return lambda cluster=cluster, **fields: build_layout(
        LayoutConfig(**fields), cluster, model, TRAIN.seq_len
    )


@pytest.fixture
def make_estimator(model, cluster):
    """make_estimator(policies, model=..., cluster=..., **layout fields) -> Estimator."""

    def make(policies=None, model=model, cluster=cluster, train=TRAIN, **fields):
        layout = build_layout(LayoutConfig(**fields), cluster, model, train.seq_len)
        return build_estimator(model, train, policies or ActivationsConfig(), layout, cluster)

    return make


@pytest.fixture
def policies():
    """policies(name=policy, ...) -> ActivationsConfig, everything else kept."""
    return lambda **changes: dataclasses.replace(ActivationsConfig(), **changes)
