"""Where metrics go besides metrics.jsonl.

TensorBoard is written through its own event writer, which needs no torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from k2train.config.errors import ConfigError
from k2train.config.sections import TelemetryConfig

WANDB_ID_FILE = "wandb-id"
"""In the run directory: the id of the run at Weights & Biases."""


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
    """The same numbers to Weights & Biases, in one run of theirs for a run of ours.

    Their run's id is kept in the run directory, so that a resumed run goes on there. Steps that
    were logged before and are taken again after a crash are dropped there, and are the same
    numbers.
    """

    def __init__(
        self, wandb: Any, project: str, name: str, directory: Path, config: Mapping[str, Any]
    ) -> None:
        """wandb: the module, or what stands in for it."""
        kept = directory / WANDB_ID_FILE
        run_id = kept.read_text().strip() if kept.exists() else None
        self._run = wandb.init(
            project=project,
            name=name,
            dir=str(directory),
            config=dict(config),
            id=run_id or None,
            resume="allow",
        )
        kept.write_text(f"{self._run.id}\n")

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def close(self) -> None:
        self._run.finish()


def check_sinks(telemetry: TelemetryConfig) -> None:
    """Raise ConfigError for a sink that is asked for and not installed."""
    if telemetry.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        rule = "needs the wandb package"
        remedy = "pip install 'k2train[wandb]', or telemetry.wandb_project=null"
        raise ConfigError("telemetry.wandb_project", telemetry.wandb_project, rule, remedy)


def open_sinks(
    telemetry: TelemetryConfig, run_dir: Path, config: Mapping[str, Any], wandb: Any = None
) -> list[Sink]:
    """The sinks that `telemetry` asks for. wandb: stands in for the package; None imports it.

    Raises ConfigError where a package is not installed.
    """
    if wandb is None:
        check_sinks(telemetry)
    sinks: list[Sink] = []
    if telemetry.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard"))
    if telemetry.wandb_project is not None:
        wandb = wandb or importlib.import_module("wandb")
        sinks.append(WandbSink(wandb, telemetry.wandb_project, run_dir.name, run_dir, config))
    return sinks
