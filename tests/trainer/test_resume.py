"""A run that is killed and resumed is the run that was never interrupted: metrics and weights, bit
for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from k2train.checkpoint import latest_checkpoint, open_checkpoint
from k2train.cli.main import main
from k2train.telemetry.metrics import CLOCK_KEYS, read_metrics


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what the clock decides."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCK_KEYS} for line in lines]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    directory = latest_checkpoint(run_dir / "checkpoints")
    assert directory is not None
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.load(name) for name in checkpoint.names()}


def assert_same_run(left: Path, right: Path) -> None:
    assert numbers(left) == numbers(right)
    mine, theirs = tensors(left), tensors(right)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def whole_run(words: list[str], tmp_path: Path) -> Path:
    assert main(["train", *words]) == 0
    return tmp_path / "run"


def test_two_runs_of_one_seed_are_bit_equal_and_of_two_seeds_are_not(
    words: list[str], whole_run: Path, tmp_path: Path
) -> None:
    assert main(["train", *words, f"run_dir={tmp_path}/again"]) == 0
    assert_same_run(whole_run, tmp_path / "again")
    assert main(["train", *words, f"run_dir={tmp_path}/other", "train.seed=1"]) == 0
    assert numbers(whole_run)[0]["loss"] != numbers(tmp_path / "other")[0]["loss"]


def test_resuming_from_any_checkpoint_gives_the_uninterrupted_run(
    words: list[str], whole_run: Path, tmp_path: Path
) -> None:
    for step in (2, 4):
        cut = tmp_path / f"cut{step}"
        shutil.copytree(whole_run, cut)
        for later in (cut / "checkpoints").glob("step-*"):
            if int(later.name[5:]) > step:
                shutil.rmtree(later)
        assert main(["train", *words, f"run_dir={cut}"]) == 0
        assert_same_run(whole_run, cut)


def test_the_metrics_of_a_step_are_those_the_design_lists(whole_run: Path) -> None:
    lines = read_metrics(whole_run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for key in (
        "step",
        "tokens",
        "loss",
        "grad_norm",
        "lr",
        "max_logit",
        "clipped_heads",
        "load_violation",
        "tokens_per_second",
        "step_seconds",
        "data_wait_seconds",
        "peak_bytes",
    ):
        assert all(key in line for line in lines), key
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sum(line["clipped_heads"] for line in lines) > 0
    assert {line["step"] for line in lines if "eval_loss" in line} == {2, 4, 6}


def _start(words: list[str], run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "k2train", "train", *words, f"run_dir={run_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def _wait_for_steps(run_dir: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(run_dir / "metrics.jsonl")) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run takes no steps"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_from_outside_resumes_to_the_same_end(
    number: signal.Signals, words: list[str], tmp_path: Path
) -> None:
    longer = [*words, "train.steps=40", "train.eval_every_steps=10", "train.checkpoint_every_steps=5"]
    run_dir = tmp_path / "stopped"
    process = _start(longer, run_dir)
    _wait_for_steps(run_dir, 7, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    if number != signal.SIGKILL:
        assert process.returncode == 0, output
        assert f"stopped by {number.name} after step" in output
        assert "resume with: k2train train" in output
        done = len(read_metrics(run_dir / "metrics.jsonl"))
        assert latest_checkpoint(run_dir / "checkpoints") == run_dir / "checkpoints" / f"step-{done:06}"
        assert done < 40
    assert main(["train", *longer, f"run_dir={run_dir}"]) == 0
    assert main(["train", *longer, f"run_dir={tmp_path}/whole"]) == 0
    assert_same_run(tmp_path / "whole", run_dir)
