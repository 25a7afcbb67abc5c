"""docs/schedule.md says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from k2train.schedule import ScheduleError, ScheduleSpec, build_schedule, simulate, uniform_costs, validate

_PAGE = Path(__file__).parents[2] / "docs" / "schedule.md"
_STAGES, _MICROBATCHES = 16, 64
_ROWS = {
    "GPipe": ("gpipe", 1),
    "1F1B": ("1f1b", 1),
    "interleaved 1F1B, vpp 2": ("interleaved_1f1b", 2),
    "interleaved 1F1B, vpp 4": ("interleaved_1f1b", 4),
    "K2, vpp 1": ("k2", 1),
    "K2, vpp 2": ("k2", 2),
    "K2, vpp 4": ("k2", 4),
    "ZB-H1": ("zb_h1", 1),
    "DualPipe": ("dualpipe", 1),
    "DualPipeV": ("dualpipe_v", 1),
}


@pytest.mark.parametrize("name", _ROWS)
def test_the_comparison_table_is_what_the_simulator_says(name: str) -> None:
    kind, vpp = _ROWS[name]
    schedule = build_schedule(ScheduleSpec.preset(kind, _STAGES, _MICROBATCHES, vpp))
    report = validate(schedule)
    parts = 2 if kind == "dualpipe_v" else vpp
    part = 1.0 / parts
    makespan = simulate(
        schedule, uniform_costs(schedule.num_virtual_stages, part, part, part)
    ).makespan_seconds
    bubble = makespan - 3 * _MICROBATCHES
    in_flight, queue = max(report.peak_in_flight) / parts, max(report.peak_weight_queue) / parts
    copies = schedule.model_part.count(0)
    row = f"| {name} | {makespan:g} | {bubble:g} | {bubble / makespan:.1%} | {in_flight:g} | {queue:g} | {copies} |"
    assert row.replace("%", " %") in _PAGE.read_text()


def test_the_deadlock_on_the_page_is_the_validators() -> None:
    with pytest.raises(ScheduleError) as error:
        validate(
            build_schedule(ScheduleSpec.preset("k2", 16, 32, 2, extra_warmup_microbatches=0, offload=False))
        )
    page = " ".join(_PAGE.read_text().split())
    for line in (*error.value.lines, re.sub(r", \d+ steps.*", "", error.value.headline)):
        assert line in page


def test_every_picture_of_the_page_is_there_and_small() -> None:
    pictures = re.findall(r"\]\((pictures/[^)]+)\)", _PAGE.read_text())
    assert len(pictures) == 4
    for picture in pictures:
        assert 10_000 < (_PAGE.parent / picture).stat().st_size < 300_000
