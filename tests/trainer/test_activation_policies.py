"""Activation policies inside whole runs: pairs, split weight gradients, interleaved stages, all-to-alls and ZeRO-1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from k2train.checkpoint import latest_checkpoint, open_checkpoint
from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.schedule.actions import Kind, Pair
from k2train.telemetry.metrics import read_metrics
from k2train.trainer.build import build_layouts

EXACT = ("loss", "grad_norm", "max_logit", "clipped_heads", "load_violation", "eval_loss")
LAYOUTS = {
    "one_rank": ["schedule=gpipe", "train.microbatch_size=1"],
    "one_rank_k2": ["schedule=k2", "layout.vpp=2", "train.microbatch_size=1"],
    "threads": ["schedule=k2", "layout.pp=2", "layout.vpp=2", "layout.ep=2", "train.microbatch_size=1"],
    "threads_1f1b": ["schedule=1f1b", "layout.pp=3", "layout.edp=2", "train.microbatch_size=1"],
    "threads_zb": ["schedule=zb_h1", "layout.pp=2", "layout.ep=2", "train.microbatch_size=1"],
}


def train(words: list[str], run_dir: Path) -> Path:
    assert main(["train", *words, f"run_dir={run_dir}"]) == 0
    return run_dir


def exact(run_dir: Path) -> list[dict[str, float]]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{name: line[name] for name in EXACT if name in line} for line in lines]


def assert_bit_equal(mine: Path, other: Path) -> None:
    assert exact(mine) == exact(other)
    checkpoints = [latest_checkpoint(run / "checkpoints") for run in (mine, other)]
    one, two = (open_checkpoint(found) for found in checkpoints if found is not None)
    assert set(one.names()) == set(two.names())
    for name in one.names():
        assert torch.equal(one.load(name), two.load(name)), name


@pytest.mark.parametrize("policies", ["recompute", "offload", "recompute_offload"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_recompute_and_offload_change_no_bit_of_a_run(words, tmp_path, layout, policies):
    words = [*words, *LAYOUTS[layout], "train.dtype=bfloat16", "train.steps=3"]
    plain = train(words, tmp_path / "plain")
    assert_bit_equal(train([*words, f"activations={policies}"], tmp_path / policies), plain)


def test_the_layouts_run_pairs_and_offloads(words):
    def steps(layout: str):
        schedule = build_layouts(load_config([*words, *LAYOUTS[layout], "activations=offload"]))[1]
        return [step for line in schedule.stages for step in line]

    assert any(isinstance(step, Pair) for step in steps("threads"))
    for layout in set(LAYOUTS) - {"one_rank_k2"}:
        kinds = [step.kind for step in steps(layout) if not isinstance(step, Pair)]
        assert Kind.OFFLOAD in kinds, layout
        assert kinds.count(Kind.OFFLOAD) == kinds.count(Kind.RELOAD)


@pytest.mark.parametrize("layout", ["one_rank", "threads"])
def test_fp8_storage_trains_nearly_the_same_and_offloading_it_changes_nothing_more(words, tmp_path, layout):
    """The forward of the first step is untouched. Gradients see E4M3's rounding, up to 2^-4 of an element and far less
    summed over many, so six steps stay within a few per cent of the loss."""
    words = [*words, *LAYOUTS[layout]]
    plain = exact(train(words, tmp_path / "plain"))
    fp8 = train([*words, "activations=recompute_fp8"], tmp_path / "fp8")
    assert exact(fp8)[0]["loss"] == plain[0]["loss"]
    assert exact(fp8)[0]["grad_norm"] != plain[0]["grad_norm"]
    assert exact(fp8)[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.03)
    assert_bit_equal(train([*words, "activations=k2"], tmp_path / "k2"), fp8)
