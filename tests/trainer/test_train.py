"""What a run does besides learning: refusals, divergence, weights taken over from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from k2train.checkpoint import latest_checkpoint, open_checkpoint
from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.telemetry.metrics import read_metrics
from k2train.trainer.build import build_program


def test_a_run_directory_holds_what_the_design_says(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words, "telemetry.tensorboard=true"]) == 0
    run_dir = tmp_path / "run"
    assert {path.name for path in run_dir.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "loss.png",
    }
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["steps"] == 6
    printed = capsys.readouterr().out
    for word in (
        "Muon",
        "AdamW",
        "QK-Clip",
        "tokens per step",
        "bits per byte",
        "gzip -9",
        "loss.png",
        "metrics.jsonl",
    ):
        assert word in printed, word


def test_a_finished_run_is_left_as_it_is(words: list[str], tmp_path: Path) -> None:
    assert main(["train", *words]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(["train", *words]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_more_steps_continue_a_finished_run(words: list[str], tmp_path: Path) -> None:
    assert main(["train", *words]) == 0
    assert main(["train", *words, "train.steps=8"]) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))


def test_resuming_with_another_model_is_refused_and_harms_nothing(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words]) == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    assert main(["train", *words, "model.hidden_size=48"]) == 2
    assert "model.hidden_size=48" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_changed_settings_are_named_when_a_run_is_resumed(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words, "train.steps=4", "train.bias_update_rate=0.001"]) == 0
    assert main(["train", *words, "train.bias_update_rate=0.01"]) == 0
    assert "train.bias_update_rate: 0.001 -> 0.01" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_with_a_message_and_keeps_the_checkpoint(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words, "train.steps=2"]) == 0
    kept = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert kept is not None
    names = open_checkpoint(kept).names()
    # A learning rate that sends the weights beyond what float32 can square.
    wild = "optim.lr_phases=[{kind: constant, to: 1e30, fraction: 1}]"
    assert main(["train", *words, wild, "train.steps=6", "train.checkpoint_every_steps=0"]) == 1
    message = capsys.readouterr().err
    assert "not finite" in message
    assert "Traceback" not in message
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") == kept
    assert all(torch.isfinite(open_checkpoint(kept).load(name)).all() for name in names)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_compute_types_learn_too(dtype: str, words: list[str], tmp_path: Path) -> None:
    assert main(["train", *words, f"train.dtype={dtype}"]) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


@pytest.mark.parametrize(
    "changes",
    [
        ["optim=adamw", "optim.lr_phases=[{kind: constant, to: 3e-3, fraction: 1}]"],
        ["schedule=gpipe"],
        ["schedule=interleaved_1f1b", "layout.vpp=2"],
        ["layout.vpp=3"],
        ["model.q_lora_rank=null", "model.n_shared_experts=2"],
        ["model.first_k_dense_replace=3"],
        ["model.first_k_dense_replace=0", "model.n_group=4", "model.topk_group=2"],
    ],
)
def test_variations_of_the_run_learn(changes: list[str], words: list[str], tmp_path: Path) -> None:
    assert main(["train", *words, *changes]) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


def test_the_schedule_and_the_number_of_virtual_stages_do_not_change_the_result(
    words: list[str], tmp_path: Path
) -> None:
    wide = [*words, "train.dtype=float64", "telemetry.progress=none"]
    losses = {}
    for name, changes in {
        "k2": [],
        "1f1b": ["schedule=1f1b"],
        "vpp": ["layout.vpp=2"],
        "gpipe": ["schedule=gpipe"],
    }.items():
        assert main(["train", *wide, *changes, f"run_dir={tmp_path}/{name}"]) == 0
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
    for name, values in losses.items():
        assert values == pytest.approx(losses["k2"], rel=1e-12), name


def test_the_microbatch_size_does_not_change_the_result(words: list[str], tmp_path: Path) -> None:
    losses = {}
    for size in (1, 2, 4, 8):
        run_dir = tmp_path / f"size{size}"
        assert (
            main(
                [
                    "train",
                    *words,
                    "train.dtype=float64",
                    f"train.microbatch_size={size}",
                    f"run_dir={run_dir}",
                ]
            )
            == 0
        )
        losses[size] = [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl")]
    for size, values in losses.items():
        assert values == pytest.approx(losses[1], rel=1e-9), size


def test_a_run_can_start_from_the_weights_of_another(words: list[str], tmp_path: Path) -> None:
    assert main(["train", *words]) == 0
    source = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert main(["train", *words, f"train.init_from={source}", f"run_dir={tmp_path}/next"]) == 0
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")
    second = read_metrics(tmp_path / "next" / "metrics.jsonl")
    assert second[0]["loss"] < first[0]["loss"] - 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["layout=laptop", "world=single"], "world=single"),
        (["schedule=dualpipe"], "schedule.kind=dualpipe"),
        (["activations.routing=fp8"], "activations.routing=fp8"),
        (["train.init_from=nowhere"], "nowhere"),
        (["data.blend=[{prefix: nowhere}]"], "nowhere"),
        (["optim.host_adam=deepspeed"], "optim.states=host"),
        (["model.vocab_size=100"], "model.vocab_size"),
        (["run_dir=/proc/nothing"], "cannot be written"),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    changes: list[str], message: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words, *changes]) == 2
    assert message in capsys.readouterr().err


def test_a_layout_gives_a_validated_schedule() -> None:
    program = build_program(load_config(["layout.vpp=2"]))
    assert (program.layout.world, program.schedule.num_virtual_stages) == (1, 2)
    program = build_program(load_config(["experiment=laptop"]))
    schedule = program.schedule
    assert (program.layout.world, schedule.num_stages, schedule.num_virtual_stages) == (4, 2, 4)
