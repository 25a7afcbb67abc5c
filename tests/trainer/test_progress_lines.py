"""What a run says while it goes on: lines by time, MFU as the plan reckons it, and the bar ahead of
an evaluation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.planner.plan import build_plan
from k2train.trainer.loop import ideal_seconds, rhythm_of, step_note

SMALL = [
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "model.intermediate_size=16",
    "model.first_k_dense_replace=1",
    "train.global_batch_tokens=256",
    "train.seq_len=16",
    "train.microbatch_size=4",
    "train.final_eval_tokens=64",
    "telemetry.tensorboard=false",
]


def test_mfu_is_the_plans_at_the_plans_pace() -> None:
    config = load_config(["layout=laptop", "cluster=h100", "train.global_batch_tokens=32768"])
    plan = build_plan(config)
    ideal = ideal_seconds(config, plan.program.layout.world, torch.device("cuda"))
    assert ideal is not None
    assert ideal / plan.step_seconds == pytest.approx(plan.mfu, rel=1e-12)
    assert ideal_seconds(config, plan.program.layout.world, torch.device("cpu")) is None


def test_a_note_names_mfu_where_it_is_known() -> None:
    line = {"loss": 2.5, "tokens_per_second": 12345.6}
    assert step_note(line) == "loss 2.5000  12,346 tokens/s"
    assert step_note({**line, "mfu": 0.381}) == "loss 2.5000  12,346 tokens/s  MFU 38.1 %"


def test_a_year_long_run_has_a_line_a_minute() -> None:
    config = load_config(["experiment=k2"])
    rhythm = rhythm_of(config)
    assert (rhythm.first, rhythm.every_seconds) == (10, 60.0)


def test_a_run_in_a_log_file_has_stamped_lines_and_ends_with_its_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        *SMALL,
        f"run_dir={tmp_path}",
        "train.steps=4",
        "telemetry.log_first_steps=2",
        "telemetry.log_every_steps=100",
    ]
    assert main(["train", *words]) == 0
    said = [
        line
        for line in capsys.readouterr().out.splitlines()
        if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line)
    ]
    steps = [re.search(r"step (\d)/4  loss [\d.]+  [\d,]+ tokens/s", line) for line in said]
    assert [found.group(1) for found in steps if found] == ["1", "2", "4"]
    assert "left" in said[0]
    assert "held-out loss" in said[-1], "the step is shown as done before its evaluation"
