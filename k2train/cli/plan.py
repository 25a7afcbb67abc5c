"""`k2train plan`: memory, step time and exposed communication of a config, before a device is
rented.

    k2train plan experiment=k2                                   one plan, in tables
    k2train plan experiment=k2 plan.json=plan.json               the same for scripts
    k2train plan -m experiment=k2 layout.nodes=32,64,128         a sweep, a row each
    k2train plan experiment=k2 plan.compare=[k2,zb_h1,dualpipe]  schedules side by side

The same keys as `k2train train`, so what is planned is what is trained.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from k2train.cli.answers import answered
from k2train.config.compose import expand_sweep, load_config, parse_overrides
from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.config.sections import PlanConfig
from k2train.config.sweep import is_multirun, without_flags
from k2train.planner.advice import Advice, advise, all_to_all_note
from k2train.planner.export import plan_document
from k2train.planner.plan import Plan, build_plan
from k2train.planner.sweep import Point, Refused, Row, compared, plan_rows, sweep_table
from k2train.planner.tables import plan_tables
from k2train.schedule.render import render_timeline
from k2train.schedule.trace import write_trace
from k2train.telemetry.tables import show

TITLE = "Predict memory, step time and exposed communication."
NOT_READ = ("world", "run_dir", "data", "telemetry", "rehearse")
USAGE = "k2train plan [-m] [key=value ...]"


def run(args: list[str]) -> int:
    """Plan what the overrides say and print it; 1 where nothing fits, else 0. Raises
    ConfigError."""
    if answered(args, TITLE, USAGE, load_config, NOT_READ):
        return 0
    words = without_flags(args)
    if is_multirun(args):
        return _sweep(words)
    config: Config = load_config(words)
    check_files(config.plan)
    if config.plan.compare:
        refuse_pictures(config.plan)
        return _compare(config)
    return _single(config)


def _single(config: Config) -> int:
    """One plan, its tables and its files; 0 where it fits, else 1."""
    pictures = config.plan.timeline is not None or config.plan.trace is not None
    plan = build_plan(config, record=pictures)
    advice = None if plan.fits else advise(plan)
    show(*plan_tables(plan, advice, all_to_all_note(plan)))
    for path in _write(plan, advice):
        print(f"wrote {path}")
    return 0 if plan.fits else 1


def _compare(config: Config) -> int:
    """`plan.compare`: the same model and cluster under several schedules."""
    rows = plan_rows(compared(config))
    world = next(row.world for row in rows if isinstance(row, Row))
    nodes = f"{config.name} on {world} devices ({config.cluster.name})"
    return _show_rows(f"Schedules side by side: {nodes}", rows, config.plan)


def _sweep(words: Sequence[str]) -> int:
    """`-m`: every point of the sweep, and under every schedule of `plan.compare` where that is
    given.
    """
    keys = swept_keys(words)
    points: list[Point] = []
    for overrides in expand_sweep(words):
        labels = {key.rsplit(".", 1)[-1]: _value(overrides, key) for key in keys}
        points += [({**labels, **more}, config) for more, config in _variants(overrides)]
    configs = [config for _, config in points if isinstance(config, Config)]
    if not configs:
        plan_rows(points)
    columns = {label: "" for labels, _ in points for label in labels}
    rows = plan_rows([({**columns, **labels}, config) for labels, config in points])
    return _show_rows(f"Sweep: {configs[0].name}", rows, configs[0].plan)


def _variants(overrides: Sequence[str]) -> list[Point]:
    """One point of a sweep under every schedule that is compared; the mistake in it where it has
    one."""
    try:
        config: Config = load_config(overrides)
    except ConfigError as error:
        return [({}, error)]
    check_files(config.plan)
    refuse_pictures(config.plan)
    return compared(config) if config.plan.compare else [({}, config)]


def _show_rows(title: str, rows: Sequence[Row | Refused], section: PlanConfig) -> int:
    """Print and write the rows; 0 where one of them fits, else 1."""
    show(*sweep_table(title, rows))
    if section.json is not None:
        _write_json(section.json, [dataclasses.asdict(row) for row in rows])
        print(f"wrote {section.json}")
    return 0 if any(isinstance(row, Row) and row.fits for row in rows) else 1


def swept_keys(words: Sequence[str]) -> list[str]:
    """The keys that take several values."""
    return [override.get_key_element() for override in parse_overrides(words) if override.is_sweep_override()]


def _value(overrides: Sequence[str], key: str) -> str:
    return next(word.split("=", 1)[1] for word in overrides if word.split("=", 1)[0] == key)


def check_files(section: PlanConfig) -> None:
    """Raise ConfigError for a file that cannot be written, before the planning that it would be
    written after.
    """
    for name in ("json", "timeline", "trace"):
        value = getattr(section, name)
        if value is not None:
            check_writable(f"plan.{name}", value)
    if section.timeline is not None and not section.timeline.endswith(".png"):
        raise ConfigError(
            "plan.timeline", section.timeline, "is drawn as PNG", "give a name that ends in .png"
        )


def refuse_pictures(section: PlanConfig) -> None:
    """Raise ConfigError where a timeline or a trace is asked of a table of many plans."""
    for name in ("timeline", "trace"):
        value = getattr(section, name)
        if value is not None:
            raise ConfigError(
                f"plan.{name}",
                value,
                "shows one plan, not a sweep or a comparison",
                "leave out -m and plan.compare, or this key",
            )


def check_writable(field: str, value: str) -> None:
    """Try to open a file for writing; leaves no trace where it did not exist."""
    path = Path(value)
    existed = os.path.lexists(path)
    try:
        with path.open("ab"):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            field,
            value,
            f"cannot be written: {reason}",
            "give a file in a directory that exists and that you may write to",
        ) from error
    if not existed:
        path.unlink()


def _write(plan: Plan, advice: Advice | None) -> list[str]:
    section, written = plan.config.plan, []
    if section.json is not None:
        _write_json(section.json, plan_document(plan, advice))
        written.append(section.json)
    title = f"{plan.config.name} on {plan.config.cluster.name}, {plan.config.schedule.kind} schedule"
    if section.timeline is not None:
        render_timeline(plan.simulation, section.timeline, title)
        written.append(section.timeline)
    if section.trace is not None:
        write_trace(plan.simulation, section.trace)
        written.append(section.trace)
    return written


def _write_json(path: str, document: object) -> None:
    Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
