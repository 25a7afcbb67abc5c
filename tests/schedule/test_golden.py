"""A dozen schedules as text, so that a change of order shows as a diff.

Write them anew with `python tests/schedule/test_golden.py`, look at the diff, and commit it with
the reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from k2train.schedule import ScheduleSpec, build_schedule, parse_schedule, validate

GOLDEN = Path(__file__).parent / "golden"

_preset = ScheduleSpec.preset
SPECS = {
    "gpipe_pp3_mb4": _preset("gpipe", 3, 4),
    "1f1b_pp4_mb6": _preset("1f1b", 4, 6),
    "1f1b_pp4_mb2_fewer_than_stages": _preset("1f1b", 4, 2),
    "1f1b_pp2_mb4_offload": _preset("1f1b", 2, 4, offload=True),
    "interleaved_pp2_vpp2_mb4_one_peer": _preset("interleaved_1f1b", 2, 4, 2),
    "interleaved_pp3_vpp2_mb7_uneven_groups": _preset("interleaved_1f1b", 3, 7, 2),
    "k2_pp1_mb3": _preset("k2", 1, 3),
    "k2_pp1_vpp2_mb3": _preset("k2", 1, 3, 2),
    "k2_pp2_vpp2_mb4": _preset("k2", 2, 4, 2),
    "k2_pp4_vpp2_mb8": _preset("k2", 4, 8, 2),
    "k2_pp4_vpp3_mb3_fewer_than_stages": _preset("k2", 4, 3, 3),
    "k2_pp4_vpp1_mb6_depth2": _preset("k2", 4, 6, 1, prefetch_depth=2),
    "zb_h1_pp4_mb6": _preset("zb_h1", 4, 6),
    "dualpipe_pp4_mb10": _preset("dualpipe", 4, 10),
    "dualpipe_v_pp3_mb7": _preset("dualpipe_v", 3, 7),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_schedule_is_the_one_on_file(name: str) -> None:
    schedule = build_schedule(SPECS[name])
    validate(schedule)
    text = (GOLDEN / f"{name}.txt").read_text()
    assert schedule.to_text() == text
    assert parse_schedule(text) == schedule


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(SPECS)


def _write() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, spec in SPECS.items():
        (GOLDEN / f"{name}.txt").write_text(build_schedule(spec).to_text())


if __name__ == "__main__":
    _write()
