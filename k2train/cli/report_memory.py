"""`k2train report memory`: bytes of every saved activation under the chosen policies, predicted
beside measured.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from k2train.cli.answers import answered
from k2train.config.compose import load_config
from k2train.config.schema import Config
from k2train.device.build import build_device
from k2train.estimate.activations import check_policies
from k2train.telemetry.tables import NumberTable, new_table, output_console
from k2train.trainer.memory_report import MemoryReport, NameBytes, measure_memory

USAGE = "k2train report memory [group=name ...] [key=value ...]"
NOT_READ = ("world", "run_dir", "data", "telemetry", "plan", "rehearse")
COLUMNS = ("computed", "planned", "predicted_device", "measured_device", "predicted_host", "measured_host")


def run(args: list[str]) -> int:
    """Measure the config's layers and print a table for each kind."""
    if answered(args, "Show what lives between forward and backward.", USAGE, load_config, NOT_READ):
        return 0
    config: Config = load_config(args)
    check_policies(config.activations)
    # But for what GPU kernels keep, bytes are the same wherever they are measured: a config made
    # for GPUs can be looked at without one.
    here = torch.device("cuda" if torch.cuda.is_available() and config.train.device != "cpu" else "cpu")
    report = measure_memory(config, build_device(here))
    console = output_console()
    for kind, rows in report.layers.items():
        console.print(memory_table(f"{kind} in {config.train.dtype}", report, rows))
    console.print(
        f"largest difference between predicted and measured: {100 * report.largest_difference:.2f} % of a name's bytes"
    )
    console.print(
        f"device, both layers and the model's ends: the store says {report.stored_bytes:,} bytes, alive are "
        f"{report.alive_bytes:,} for the microbatch"
    )
    return 0


def memory_table(what: str, report: MemoryReport, rows: Iterable[NameBytes]) -> NumberTable:
    """One layer's names, in the config's order, and their sums.

    what: the kind of layer and its type.
    """
    at = "the config's widths" if report.divisor == 1 else f"1/{report.divisor} of the widths"
    title = f"{what}, bytes a token: computed and kept as configured; plan against run at {at}"
    headings = ["name", "policy", "computed", "kept", "device: plan", "run", "host: plan", "run"]
    table = new_table(title, headings, text_columns=2)
    rows = list(rows)
    for row in rows:
        table.add_row(row.name, row.policy, *(_number(getattr(row, column)) for column in COLUMNS))
    sums = [sum(getattr(row, column) for row in rows) for column in COLUMNS]
    table.add_section()
    table.add_row("all names", "", *map(_number, sums), style="bold")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}"
