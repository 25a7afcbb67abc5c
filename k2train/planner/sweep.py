"""Several plans in one table: the points of a sweep, or schedules side by side on a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.estimate.parameters import model_parameters
from k2train.planner.plan import Plan, build_plan
from k2train.planner.text import count, fixed, gigabytes
from k2train.program import check_program
from k2train.schedule.spec import INTERLEAVED
from k2train.telemetry.tables import broken_heading, new_table

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
        labels,
        plan.program.layout.world,
        plan.program.schedule.num_microbatches,
        plan.step_seconds,
        plan.tokens_per_second,
        plan.mfu,
        plan.bubble_share,
        waits.ep,
        waits.pp,
        plan.slowest_update.data_parallel,
        waits.copy,
        plan.fullest.device,
        plan.fullest_host.node,
        plan.fits,
        model_parameters(plan.config.model).total,
        plan.busiest.busy_seconds,
    )


@dataclass(frozen=True)
class Refused:
    """A point that cannot be planned, and why."""

    labels: Mapping[str, str]
    refused: str


Point = tuple[Mapping[str, str], Config | ConfigError]


def plan_rows(points: Sequence[Point]) -> list[Row | Refused]:
    """Plan every point; one that is refused does not keep the others from being planned.

    Raises ConfigError where every point is refused, which is a mistake in what they share.
    """
    checked = [(labels, _checked(config)) for labels, config in points]
    faults = [config for _, config in checked if isinstance(config, ConfigError)]
    if len(faults) == len(checked):
        raise faults[0]
    return [_planned(labels, config) for labels, config in checked]


def _checked(config: Config | ConfigError) -> Config | ConfigError:
    """The config, or the mistake that is found in it without simulating anything."""
    if isinstance(config, ConfigError):
        return config
    try:
        check_program(config)
    except ConfigError as error:
        return error
    return config


def _planned(labels: Mapping[str, str], config: Config | ConfigError) -> Row | Refused:
    if isinstance(config, ConfigError):
        return Refused(labels, str(config))
    try:
        return summarise(build_plan(config, check=False), labels)
    except ConfigError as error:
        return Refused(labels, str(error))


def compared(config: Config) -> list[Point]:
    """The config under each schedule of `plan.compare`, with the switches of configs/schedule."""
    return [({"schedule": kind}, _with_schedule(config, kind)) for kind in config.plan.compare]


def _with_schedule(config: Config, kind: str) -> Config:
    preset: Config = load_config([f"schedule={kind}"])
    layout = config.layout
    if kind not in INTERLEAVED:
        layout = dataclasses.replace(layout, vpp=1, layers_per_virtual_stage=None)
    return dataclasses.replace(config, schedule=preset.schedule, layout=layout)


def sweep_table(title: str, rows: Sequence[Row | Refused]) -> tuple[Table, str]:
    """A row for each plan, labels first, and a note.

    Sizes that are alike everywhere move from the table to the note.
    """
    plans = [row for row in rows if isinstance(row, Row)]
    columns = _columns(plans)
    constant = {name for name in _MAY_MOVE if len(plans) > 1 and len(set(columns[name])) == 1}
    shown = [name for name in columns if name not in constant]
    labels = list(rows[0].labels)
    table = new_table(title, [broken_heading(name) for name in [*labels, *shown]], len(labels))
    table.padding, table.show_edge = (0, 0, 0, 0), False
    figures = iter(zip(*(columns[name] for name in shown), strict=True))
    for row in rows:
        cells = next(figures) if isinstance(row, Row) else ["-"] * (len(shown) - 1) + ["no"]
        bad = isinstance(row, Refused) or not row.fits
        table.add_row(*(row.labels[label] for label in labels), *cells, style="red" if bad else None)
    same = ", ".join(f"{columns[name][0]} {_MAY_MOVE[name]}" for name in _MAY_MOVE if name in constant)
    return table, (f"In every row: {same}.\n" if same else "") + SWEEP_NOTE + _refusals(rows)


def _refusals(rows: Sequence[Row | Refused]) -> str:
    """Why the rows without figures have none, a paragraph each."""
    return "".join(
        f"Cannot be planned: {' '.join(f'{key}={value}' for key, value in row.labels.items())}: {row.refused}\n"
        for row in rows
        if isinstance(row, Refused)
    )


def _columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Every column of figures by its name."""
    return {
        "params": [count(row.total_parameters) for row in rows],
        "GPUs": [str(row.world) for row in rows],
        "M": [str(row.num_microbatches) for row in rows],
        "step_s": [fixed(row.step_seconds) for row in rows],
        "tok/s": _tokens([row.tokens_per_second for row in rows]),
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


def _tokens(values: Sequence[float]) -> list[str]:
    """One unit for the whole column: millions only where every value has two digits of them."""
    if min(values) >= 1e5:
        return [f"{value / 1e6:.2f}M" for value in values]
    return [f"{value:,.0f}" for value in values]
