"""Whole runs with states in host memory: the same bits, checkpoints that either mode resumes, and a
table that says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from k2train.checkpoint import open_checkpoint, step_directory
from k2train.cli.main import main
from k2train.telemetry.metrics import read_metrics
from k2train.update_rules.chosen import all_rules

# Threads: two stages, two expert-parallel ranks, two replicas of every expert.
LAYOUTS = {
    "one rank": [],
    "pp 2, ep 2, edp 2": ["layout.pp=2", "layout.ep=2", "layout.edp=2", "train.microbatch_size=1"],
}
OPTIMIZERS = [named.name for named in all_rules()]


def trained(words: Sequence[str], run_dir: Path) -> dict[str, torch.Tensor]:
    """Train to the end; everything in the last checkpoint."""
    assert main(["train", *words, f"run_dir={run_dir}"]) == 0
    steps = read_metrics(run_dir / "metrics.jsonl")[-1]["step"]
    checkpoint = open_checkpoint(step_directory(run_dir / "checkpoints", steps))
    return {name: checkpoint.load(name) for name in checkpoint.names()}


def assert_same_bits(mine: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_of_both_modes_are_bit_equal_and_resume_each_other(
    words: list[str], tmp_path: Path, optimizer: str, layout: str
) -> None:
    rules = [f"optim.name={optimizer}", "optim.newton_schulz_dtype=float32"]
    base = [*words, *rules, *LAYOUTS[layout], "train.checkpoint_every_steps=4"]
    device, host = (tmp_path / states for states in ("device", "host"))
    expected = trained([*base, "optim.states=device"], device)
    assert_same_bits(trained([*base, "optim.states=host"], host), expected)
    metrics = [read_metrics(run / "metrics.jsonl") for run in (device, host)]
    for mine, theirs in zip(*metrics, strict=True):
        assert (mine["loss"], mine["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    assert all(line["clipped_heads"] > 0 for line in metrics[0]) == (optimizer == "muonclip")
    crossed = {"device": "host", "host": "device"}
    for run, states in ((device, "device"), (host, "host")):
        step_directory(run / "checkpoints", 6).rename(tmp_path / f"end-{states}")
        assert_same_bits(trained([*base, f"optim.states={crossed[states]}"], run), expected)


def test_the_start_up_table_says_where_states_live(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for states, place in (("device", "on the device"), ("host", "in host memory")):
        run_dir = tmp_path / states
        assert main(["train", *words, "train.steps=1", f"optim.states={states}", f"run_dir={run_dir}"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert place in text
        assert "MB on rank 0" in text
