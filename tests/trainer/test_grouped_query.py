"""Grouped-query attention through all of a run: pipeline, experts, policies, plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2train.architecture.layer import mixer_of
from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.device.cpu import CpuDevice
from k2train.planner.plan import build_plan
from k2train.telemetry.metrics import read_metrics
from k2train.trainer.memory_report import measure_memory

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "head_dim": 16,
}


@pytest.fixture
def grouped(words: list[str]) -> list[str]:
    """The small run with grouped-query attention for latent attention."""
    others = [word for word in words if not word.startswith("model.")]
    return ["model=glm_tiny", *(f"model.{key}={value}" for key, value in SMALL.items()), *others]


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(directory / "metrics.jsonl")]


@pytest.mark.parametrize("policies", ["none", "offload", "recompute", "k2"])
def test_it_learns_in_a_pipeline_with_experts_apart_and_heads_clipped(
    policies: str, grouped: list[str], tmp_path: Path
) -> None:
    layout = ["world=threads", "layout.pp=2", "layout.ep=2", f"activations={policies}"]
    assert main(["train", *grouped, *layout]) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert sum(line["clipped_heads"] for line in lines) > 0


@pytest.mark.parametrize("policies", ["offload", "recompute"])
def test_lossless_policies_and_layouts_change_no_loss(
    policies: str, grouped: list[str], tmp_path: Path
) -> None:
    """In float64, where sums in another order move a loss by some 1e-15 of it and routing does not
    flip; steps multiply that, so 1e-9."""
    alone = [*grouped, "train.dtype=float64"]
    assert main(["train", *alone, f"run_dir={tmp_path}/alone"]) == 0
    apart = [*alone, "world=threads", "layout.pp=2", "layout.ep=2", f"activations={policies}"]
    assert main(["train", *apart, f"run_dir={tmp_path}/apart"]) == 0
    assert losses(tmp_path / "apart") == pytest.approx(losses(tmp_path / "alone"), rel=1e-9)


@pytest.mark.parametrize("policies", ["none", "k2"])
def test_every_saved_tensor_has_the_bytes_that_were_planned(policies: str) -> None:
    report = measure_memory(load_config(["model=glm_tiny", f"activations={policies}"]), CpuDevice())
    assert report.largest_difference == 0
    assert report.stored_bytes > 0


def test_it_is_planned_with_its_own_operations_and_bytes() -> None:
    """Queries of 4 heads, keys and values of 2, each a product; no latent has a name."""
    config = load_config(["model=glm_tiny", "layout.pp=2", "layout.ep=2", "train.microbatch_size=8"])
    estimator = build_plan(config).program.estimator
    products = {op.name: op.flops for op in mixer_of(config.model).ops(estimator.workload)}
    per_head = 2.0 * estimator.workload.tokens * config.model.hidden_size * 32
    assert [products[f"{name}_proj"] / per_head for name in "qkvo"] == [4, 2, 2, 4]
    names = {tensor.name for costs in estimator.layers.values() for tensor in costs.saved}
    assert {"query", "key_value", "attention_output"} <= names
    assert not {"q_latent", "kv_latent", "kv_latent_norm_output"} & names
