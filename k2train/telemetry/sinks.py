"""Where metrics go besides metrics.jsonl. TensorBoard is written through its own event writer, which needs no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from k2train.config.errors import ConfigError
from k2train.config.sections import TelemetryConfig


class Sink(Protocol):
    """Takes the numbers of a step."""

    def write(self, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Scalars into `run_dir/tensorboard`, one tag a metric, at the training step."""

    def __init__(self, directory: Path) -> None:
        # Imported here: tensorboard takes a second to import, and plan and --help do not need it.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(directory))

    def write(self, metrics: Mapping[str, Any]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in metrics.items()
            if name != "step" and isinstance(value, (int, float))
        ]
        self._writer.add_event(self._event(step=int(metrics["step"]), summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """The same numbers to Weights & Biases."""

    def __init__(self, project: str, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=project, name=name, dir=str(directory), config=dict(config), resume="allow"
        )

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def close(self) -> None:
        self._run.finish()


def check_sinks(telemetry: TelemetryConfig) -> None:
    """Raise ConfigError for a sink that is asked for and not installed."""
    if telemetry.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        rule, remedy = (
            "needs the wandb package",
            "pip install 'k2train[wandb]', or telemetry.wandb_project=null",
        )
        raise ConfigError("telemetry.wandb_project", telemetry.wandb_project, rule, remedy)


def open_sinks(telemetry: TelemetryConfig, run_dir: Path, config: Mapping[str, Any]) -> list[Sink]:
    """The sinks that `telemetry` asks for. Raises ConfigError where one is not installed."""
    check_sinks(telemetry)
    sinks: list[Sink] = []
    if telemetry.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard"))
    if telemetry.wandb_project is not None:
        sinks.append(WandbSink(telemetry.wandb_project, run_dir.name, run_dir, config))
    return sinks
