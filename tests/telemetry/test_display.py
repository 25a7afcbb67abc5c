"""Progress lines, the loss picture and TensorBoard files."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from k2train.config.errors import ConfigError
from k2train.config.sections import TelemetryConfig
from k2train.telemetry.plot import draw_loss_curve
from k2train.telemetry.progress import MAX_LINES, open_progress
from k2train.telemetry.sinks import open_sinks


@pytest.mark.parametrize("total", [1, 7, 40, 1000])
def test_plain_progress_is_a_bounded_number_of_lines_and_ends_with_the_last(
    total: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_progress("auto", "step", total) as progress:
        for _ in range(total):
            progress.advance(1, "note")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 2 * MAX_LINES
    assert lines[-1] == f"step {total}/{total}  note"


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


def test_the_loss_curve_is_a_picture(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 5.0 / step, "lr": 1e-3} for step in range(1, 30)]
    lines[-1]["eval_loss"] = 0.3
    draw_loss_curve(lines, tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
