"""`k2train report memory`: bytes a token and layer of every saved activation, predicted beside measured.

The same overrides as `k2train train`; `json=FILE` writes the figures for scripts.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from k2train.cli.plan import check_writable
from k2train.config.compose import load_config, parse_overrides
from k2train.config.schema import Config
from k2train.planner.tables import WIDTH, new_table

if TYPE_CHECKING:
    from k2train.trainer.memory_report import LayerMemory, MemoryReport, NameRow

JSON_KEY = "json"
COLUMNS = [
    "name",
    "policy",
    "\ncomputed",
    "device\npredicted",
    "device\nmeasured",
    "host\npredicted",
    "host\nmeasured",
    "stored at\nfull size",
]


def run(words: list[str]) -> int:
    """Measure what the overrides say and print it; returns 0. Raises ConfigError."""
    path, overrides = split_json(words)
    config: Config = load_config(overrides)
    if path is not None:
        check_writable(JSON_KEY, path)
    # As in cli/train.py: OpenMP's spinning threads are slow where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Imported here: torch takes seconds, and mistakes in the words do not need it.
    from k2train.trainer.memory_report import memory_report

    report = memory_report(config)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(heading(config, report))
    for layer in report.layers:
        console.print(layer_table(layer, report))
    console.print(verdict(report))
    if path is not None:
        Path(path).write_text(json.dumps(document(report), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
    return 0


def split_json(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of `json=` and the other words. Raises ConfigError for a word that is no override."""
    path, others = None, []
    for word, override in zip(words, parse_overrides(words), strict=True):
        if override.key_or_group == JSON_KEY:
            path = str(override.value())
        else:
            others.append(word)
    return path, others


def heading(config: Config, report: MemoryReport) -> str:
    """What was measured, and what stands beside it."""
    train = config.train
    widths = f" at 1/{report.divisor} of the widths" if report.divisor > 1 else ""
    return (f"Bytes a token and layer between forward and backward, {train.dtype}. Measured{widths}: one sequence of "
            f"{report.measured_tokens} tokens on {report.device.type}, all experts on one rank; predicted for the same. Full size: "
            f"predicted for the run's microbatch of {train.microbatch_size} x {train.seq_len} tokens, ep "
            f"{config.layout.ep}.\n")  # fmt: skip


def layer_table(layer: LayerMemory, report: MemoryReport) -> Table:
    """A row for each name, and their sums."""
    kind = "MoE layer" if layer.moe else "dense layer"
    scale = f", measured at 1/{report.divisor} of the widths, predicted for the same" * (report.divisor > 1)
    table = new_table(f"{kind}{scale}", COLUMNS, text_columns=2)
    table.padding = (0, 1, 0, 0)  # type: ignore[assignment]  # eight columns in 100 characters
    for row in layer.rows:
        table.add_row(row.predicted.name, row.predicted.policy, *_figures([row], report))
    table.add_section()
    table.add_row("all names", "", *_figures(layer.rows, report), style="bold")
    return table


def verdict(report: MemoryReport) -> str:
    """The one figure to read."""
    worst = report.difference
    text = "something is stored that was not predicted" if math.isinf(worst) else f"{100 * worst:.2g} %"
    return f"Largest difference between predicted and measured, of any name: {text}"


def document(report: MemoryReport) -> dict[str, Any]:
    """The figures as plain numbers: bytes of the measured microbatch, and of the run's own."""
    return {
        "divisor": report.divisor,
        "measured_tokens": report.measured_tokens,
        "full_tokens": report.full_tokens,
        "difference": report.difference,
        "layers": {
            "moe" if layer.moe else "dense": {row.predicted.name: _row(row) for row in layer.rows}
            for layer in report.layers
        },
    }


def _row(row: NameRow) -> dict[str, Any]:
    return {
        "policy": row.predicted.policy,
        "computed_bytes": row.predicted.full_bytes,
        "predicted_device_bytes": row.predicted.device_bytes,
        "measured_device_bytes": row.device_bytes,
        "predicted_host_bytes": row.predicted.host_bytes,
        "measured_host_bytes": row.host_bytes,
        "full_size_device_bytes": row.full_size.device_bytes,
        "full_size_host_bytes": row.full_size.host_bytes,
    }


def _figures(rows: Iterable[NameRow], report: MemoryReport) -> list[str]:
    rows = list(rows)
    small = [
        sum(row.predicted.full_bytes for row in rows),
        sum(row.predicted.device_bytes for row in rows),
        sum(row.device_bytes for row in rows),
        sum(row.predicted.host_bytes for row in rows),
        sum(row.host_bytes for row in rows),
    ]
    full = sum(row.full_size.stored_bytes for row in rows)
    return [
        *(f"{total / report.measured_tokens:,.0f}" for total in small),
        f"{full / report.full_tokens:,.0f}",
    ]
