"""Several plans in one table: the points of a sweep, or schedules side by side on the same cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from k2train.config.compose import load_config
from k2train.config.schema import Config
from k2train.estimate.parameters import model_parameters
from k2train.planner.plan import Plan, build_plan
from k2train.planner.tables import new_table
from k2train.planner.text import count, fixed, gigabytes
from k2train.program import check_program
from k2train.schedule.spec import INTERLEAVED

SWEEP_NOTE = "M: microbatches. EP, PP, PCIe, DP: exposed seconds of the busiest stage. GPU and node: memory of the fullest.\n"
_MAY_MOVE = {"params": "parameters", "GPUs": "GPUs", "M": "microbatches", "PCIe_s": "s of PCIe exposed"}


@dataclass(frozen=True)
class Row:
    """The figures of one plan that a table of many shows; the plan itself may hold a gigabyte."""

    labels: Mapping[str, str]
    world: int
    num_microbatches: int
    step_seconds: float
    tokens_per_second: float
    mfu: float
    bubble_share: float
    exposed_ep: float
    exposed_pp: float
    exposed_dp: float
    exposed_pcie: float
    device_bytes: int
    node_bytes: int
    fits: bool
    total_parameters: int
    compute_seconds: float


def summarise(plan: Plan, labels: Mapping[str, str]) -> Row:
    """One plan as a row."""
    waits = plan.busiest.waits
    return Row(
        labels, plan.program.layout.world, plan.program.schedule.num_microbatches, plan.step_seconds,
        plan.tokens_per_second, plan.mfu, plan.bubble_share, waits.ep, waits.pp, plan.slowest_update.data_parallel,
        waits.copy, plan.fullest.device, plan.fullest_host.node, plan.fits, model_parameters(plan.config.model).total,
        plan.busiest.busy_seconds,
    )  # fmt: skip


def plan_rows(points: Sequence[tuple[Mapping[str, str], Config]]) -> list[Row]:
    """Plan every point. Raises ConfigError, before any of them is simulated, for a layout that cannot be."""
    for _, config in points:
        check_program(config)
    return [summarise(build_plan(config, check=False), labels) for labels, config in points]


def compared(config: Config) -> list[tuple[Mapping[str, str], Config]]:
    """The same config under each schedule of `plan.compare`, with the switches of configs/schedule."""
    return [({"schedule": kind}, _with_schedule(config, kind)) for kind in config.plan.compare]


def _with_schedule(config: Config, kind: str) -> Config:
    preset: Config = load_config([f"schedule={kind}"])
    layout = config.layout
    if kind not in INTERLEAVED:
        layout = dataclasses.replace(layout, vpp=1, layers_per_virtual_stage=None)
    return dataclasses.replace(config, schedule=preset.schedule, layout=layout)


def sweep_table(title: str, rows: Sequence[Row]) -> tuple[Table, str]:
    """A row for each plan, labels first, and a note. Sizes that are alike everywhere move from the table to the note."""
    columns = _columns(rows)
    constant = {name for name in _MAY_MOVE if len(rows) > 1 and len(set(columns[name])) == 1}
    shown = [name for name in columns if name not in constant]
    table = new_table(title, [_broken(name) for name in shown], len(rows[0].labels))
    table.padding, table.show_edge = (0, 0, 0, 0), False
    for index, row in enumerate(rows):
        table.add_row(*(columns[name][index] for name in shown), style=None if row.fits else "red")
    same = ", ".join(f"{columns[name][0]} {_MAY_MOVE[name]}" for name in _MAY_MOVE if name in constant)
    return table, (f"In every row: {same}.\n" if same else "") + SWEEP_NOTE


def _columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Every column of the table by its name."""
    columns = {label: [row.labels[label] for row in rows] for label in rows[0].labels}
    return columns | {
        "params": [count(row.total_parameters) for row in rows],
        "GPUs": [str(row.world) for row in rows],
        "M": [str(row.num_microbatches) for row in rows],
        "step_s": [fixed(row.step_seconds) for row in rows],
        "tok/s": [_tokens(row.tokens_per_second) for row in rows],
        "MFU_%": [f"{100 * row.mfu:.1f}" for row in rows],
        "bubble_%": [f"{100 * row.bubble_share:.1f}" for row in rows],
        "EP_s": [fixed(row.exposed_ep) for row in rows],
        "PP_s": [fixed(row.exposed_pp) for row in rows],
        "PCIe_s": [fixed(row.exposed_pcie) for row in rows],
        "DP_s": [fixed(row.exposed_dp) for row in rows],
        "GPU_GB": [gigabytes(row.device_bytes) for row in rows],
        "node_GB": [f"{row.node_bytes / 1e9:,.0f}" for row in rows],
        "fits": ["yes" if row.fits else "no" for row in rows],
    }


def _broken(key: str) -> str:
    """A name over several lines: a unit below its quantity, a long key broken behind underscores."""
    if key.count("_") == 1 and len(key) <= 8:
        return key.replace("_", "\n")
    lines = [""]
    for word in key.replace("_", "_ ").split():
        if lines[-1] and len(lines[-1] + word) > 10:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def _tokens(value: float) -> str:
    return f"{value / 1e6:.2f}M" if value >= 1e5 else f"{value:,.0f}"
