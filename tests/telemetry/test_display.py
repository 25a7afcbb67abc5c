"""Progress lines, the loss picture and TensorBoard files."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from k2train.config.errors import ConfigError
from k2train.config.sections import TelemetryConfig
from k2train.telemetry.plot import draw_loss_curve
from k2train.telemetry.progress import LineProgress, Rhythm, duration, open_progress
from k2train.telemetry.sinks import open_sinks


@pytest.mark.parametrize("total", [1, 7, 40, 1000])
def test_plain_progress_of_a_quick_task_is_its_last_line(
    total: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_progress("auto", "export", total) as progress:
        for _ in range(total):
            progress.advance(1, "note")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith(f"  export {total}/{total}  note")


@pytest.mark.parametrize(
    ("seconds_a_step", "rhythm", "expected"),
    [
        (30.0, Rhythm(2, 60.0), [1, 2, 4, 6, 8, 10]),
        (100.0, Rhythm(2, 60.0), [*range(1, 11)]),
        (0.01, Rhythm(3, 60.0, every_units=4), [1, 2, 3, 4, 8, 10]),
        (0.01, Rhythm(0, 60.0), [10]),
    ],
)
def test_lines_come_at_the_first_steps_then_by_time_or_by_number(
    seconds_a_step: float, rhythm: Rhythm, expected: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    time = 0.0
    start = datetime.datetime(2026, 1, 2, 3, 4, 5)
    progress = LineProgress(
        "step", 10, 0, rhythm, lambda: time, lambda: start + datetime.timedelta(seconds=time)
    )
    for _ in range(10):
        time += seconds_a_step
        progress.advance(1, "loss 2.5")
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split("step ")[1].split("/")[0]) for line in lines] == expected
    assert all(line.startswith("2026-01-02 03:") and "loss 2.5" in line for line in lines)


def test_a_line_says_how_much_time_is_left_at_the_pace_of_this_start(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """100 of 110 steps were done before: the 9 left at 20 seconds each are 180 seconds."""
    time = 0.0
    progress = LineProgress("step", 110, 100, Rhythm(5), lambda: time)
    time += 20.0
    progress.advance(1, "")
    assert capsys.readouterr().out.rstrip().endswith("step 101/110  3 min 00 s left")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (200, "3 min 20 s"), (3900, "1 h 05 min"), (682_560, "7 d 21 h")],
)
def test_a_time_is_told_in_its_two_largest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_bar_prints_lines_above_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress("bar", "step", 3) as progress:
        progress.say("[a line]")
        progress.advance(3, "done")
    assert "[a line]" in capsys.readouterr().out


def test_tensorboard_gets_every_number_of_a_step(tmp_path: Path) -> None:
    (sink,) = open_sinks(TelemetryConfig(), tmp_path, {})
    sink.write({"step": 3, "loss": 2.5, "clipped_heads": 4, "note": "text is left out"})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "clipped_heads"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]


def test_a_sink_that_is_not_installed_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pip install"):
        open_sinks(TelemetryConfig(tensorboard=False, wandb_project="p"), tmp_path, {})


class StandInRun:
    """A run of Weights & Biases that takes nothing."""

    def __init__(self, run_id: str) -> None:
        self.id = run_id

    def log(self, metrics: dict[str, Any], step: int) -> None: ...

    def finish(self) -> None: ...


class StandInWandb:
    """Its `init` as far as it is used: a given id is taken, and a missing one is made."""

    def __init__(self) -> None:
        self.runs: list[StandInRun] = []

    def init(self, *, id: str | None, resume: str, **_: Any) -> StandInRun:
        assert resume == "allow"
        self.runs.append(StandInRun(id or f"made-{len(self.runs)}"))
        return self.runs[-1]


def test_a_resumed_run_goes_on_in_its_run_of_weights_and_biases(tmp_path: Path) -> None:
    wandb, telemetry = StandInWandb(), TelemetryConfig(tensorboard=False, wandb_project="p")
    for directory in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        directory.mkdir(exist_ok=True)
        (sink,) = open_sinks(telemetry, directory, {}, wandb)
        sink.close()
    assert [run.id for run in wandb.runs] == ["made-0", "made-0", "made-2"]


def test_the_loss_curve_is_a_picture(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 5.0 / step, "lr": 1e-3} for step in range(1, 30)]
    lines[-1]["eval_loss"] = 0.3
    draw_loss_curve(lines, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
