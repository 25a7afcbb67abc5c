"""`k2train report`: a finished or running run again, from its metrics.jsonl.

`k2train report memory` is in report_memory.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from k2train.config.compose import parse_overrides
from k2train.config.convert import from_dict
from k2train.config.errors import ConfigError
from k2train.config.fields import key
from k2train.config.help import render_help
from k2train.telemetry.metrics import read_metrics
from k2train.telemetry.plot import draw_loss_curve
from k2train.telemetry.tables import NumberTable, broken_heading, new_table, show

USAGE = """k2train report run_dir=DIR [rows=N]
       k2train report memory [key=value ...]   bytes of every saved activation of a config"""


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What `k2train report` reads."""

    run_dir: str = key("directory of the run")
    rows: int = key("steps shown, evenly spaced, the last included", unit="rows", default=20, minimum=2)


def run(args: list[str]) -> int:
    """Print a table of the run's steps and draw its loss curve anew; with the word memory first,
    report_memory."""
    if args[:1] == ["memory"]:
        from k2train.cli.report_memory import run as report_memory

        return report_memory(args[1:])
    if any(word in ("-h", "--help") for word in args):
        print(render_help(ReportConfig, "Show a run again.", USAGE))
        return 0
    report = from_dict(
        ReportConfig, {override.key_or_group: override.value() for override in parse_overrides(args)}
    )
    run_dir = Path(report.run_dir)
    metrics = read_metrics(run_dir / "metrics.jsonl")
    if not metrics:
        raise ConfigError(
            "run_dir",
            report.run_dir,
            "holds no metrics.jsonl with a finished step",
            "give the directory that `k2train train` printed",
        )
    show(metrics_table(metrics, report.rows))
    picture = run_dir / "loss.png"
    draw_loss_curve(metrics, picture, run_dir.name)
    print(f"loss curve: {picture}")
    return 0


def metrics_table(metrics: list[dict[str, float]], rows: int) -> NumberTable:
    """Evenly spaced steps of a run, the first and the last included."""
    columns = [
        "step",
        "tokens",
        "loss",
        "eval_loss",
        "grad_norm",
        "lr",
        "max_logit",
        "load_violation",
        "tokens_per_second",
    ]
    table = new_table("", [broken_heading(column) for column in columns])
    table.title = None
    count = min(rows, len(metrics))
    chosen = sorted({round(index * (len(metrics) - 1) / max(1, count - 1)) for index in range(count)})
    for line in (metrics[index] for index in chosen):
        table.add_row(*(_cell(line.get(column)) for column in columns))
    return table


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    )
