"""Pictures, text timelines and traces."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.schedule import (
    Action,
    Costs,
    Kind,
    ScheduleSpec,
    Simulation,
    build_schedule,
    render_cells,
    render_comparison,
    render_text,
    render_timeline,
    render_window,
    simulate,
    uniform_costs,
    write_trace,
)
from k2train.schedule.colours import COLOURS, category
from k2train.schedule.render import steady_slots
from k2train.schedule.trace import Box, write_boxes

MakeCosts = Callable[..., Costs]


def _simulation(kind: str, pp: int, num_microbatches: int, vpp: int, moe_costs: MakeCosts) -> Simulation:
    schedule = build_schedule(ScheduleSpec.preset(kind, pp, num_microbatches, vpp))
    return simulate(schedule, moe_costs(schedule.num_virtual_stages), record=True)


def test_cells_show_what_starts_when() -> None:
    spec = ScheduleSpec(2, 3, "1f1b", split_weight_grad=True)
    simulation = simulate(build_schedule(spec), uniform_costs(2, 1, 2, 1), record=True)
    assert render_cells(simulation) == (
        "     0  F0 F1 .  .  I0 -  W0 F2 I1 -  W1 .  I2 -  W2\n"  # by hand
        "     1  .  F0 I0 -  W0 F1 I1 -  W1 F2 I2 -  W2 .  .\n"
    )


def test_a_text_timeline_has_a_line_for_each_stage_and_says_pairs_and_idle_time() -> None:
    simulation = simulate(
        build_schedule(ScheduleSpec.preset("k2", 4, 8, 1)), uniform_costs(4, 1, 1, 1), record=True
    )
    lines = render_text(simulation, width=60).splitlines()
    assert len(lines) == 5
    assert all(len(line) == 68 for line in lines)
    assert lines[0].startswith("     0  FF")
    assert {"F", "P", "I", "W", "."} == set("".join(line[8:] for line in lines[:4]))


@pytest.mark.parametrize(
    ("kind", "pp", "microbatches", "vpp"),
    [("k2", 2, 4, 2), ("k2", 1, 1, 1), ("gpipe", 3, 2, 1), ("dualpipe", 4, 8, 1), ("k2", 6, 60, 2)],
)
def test_a_timeline_is_drawn_for_small_and_crowded_steps(
    kind: str, pp: int, microbatches: int, vpp: int, moe_costs: MakeCosts, tmp_path: Path
) -> None:
    path = tmp_path / "timeline.png"
    render_timeline(_simulation(kind, pp, microbatches, vpp, moe_costs), path, dpi=40)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_windows_and_comparisons_are_drawn_without_offload_and_without_all_to_alls(tmp_path: Path) -> None:
    schedule = build_schedule(ScheduleSpec(2, 4, "1f1b"))
    simulation = simulate(schedule, uniform_costs(2), record=True)
    render_window(simulation, tmp_path / "window.svg", 2.0, 6.0, stages=(1,))
    render_comparison([("one", simulation), ("again", simulation)], tmp_path / "comparison.pdf")
    assert (tmp_path / "window.svg").stat().st_size > 1000
    assert (tmp_path / "comparison.pdf").read_bytes().startswith(b"%PDF")


def test_every_box_has_a_category_with_a_colour(moe_costs: MakeCosts) -> None:
    seen = {category(event) for event in _simulation("k2", 4, 12, 2, moe_costs).events()}
    assert seen == set(COLOURS)
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_the_steady_window_starts_with_a_pair_inside_the_steady_phase(moe_costs: MakeCosts) -> None:
    simulation = _simulation("k2", 4, 40, 2, moe_costs)
    start, end = steady_slots(simulation)
    assert simulation.steady_window[0] <= start < end <= simulation.steady_window[1]


def test_a_simulation_that_was_not_recorded_cannot_be_drawn_or_traced(tmp_path: Path) -> None:
    simulation = simulate(build_schedule(ScheduleSpec(1, 1)), uniform_costs(1))
    with pytest.raises(ValueError, match="record=True"):
        render_timeline(simulation, tmp_path / "x.png")
    with pytest.raises(ValueError, match="record=True"):
        write_trace(simulation, tmp_path / "x.json")


def test_a_trace_is_chrome_trace_json_with_a_process_for_each_stage(
    moe_costs: MakeCosts, tmp_path: Path
) -> None:
    simulation = _simulation("k2", 3, 6, 2, moe_costs)
    path = tmp_path / "trace.json"
    written = write_trace(simulation, path)
    events = json.loads(path.read_text())["traceEvents"]
    boxes = [event for event in events if event["ph"] == "X"]
    assert len(boxes) == written == len(list(simulation.events()))
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {0: "stage 0", 1: "stage 1", 2: "stage 2"}
    threads = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(box["pid"], box["tid"]) for box in boxes} <= threads
    assert max(box["ts"] + box["dur"] for box in boxes) == pytest.approx(simulation.makespan_seconds * 1e6)
    forward = next(box for box in boxes if box["name"] == "F0.0 attention")
    assert (forward["pid"], forward["ts"], forward["dur"]) == (0, 0, 3e6)
    assert forward["args"] == {"virtual_stage": 0, "microbatch": 0}


def test_boxes_of_one_trace_thread_never_overlap(moe_costs: MakeCosts, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(_simulation("k2", 4, 12, 2, moe_costs), path)
    ends: dict[tuple[int, int], float] = {}
    boxes = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    for box in sorted(boxes, key=lambda event: event["ts"]):
        thread = (box["pid"], box["tid"])
        assert box["ts"] >= ends.get(thread, 0.0)
        ends[thread] = box["ts"] + box["dur"]


@settings(deadline=None, max_examples=60)
@given(
    durations=st.lists(st.floats(0.0, 3e-6) | st.floats(0.0, 40.0), min_size=1, max_size=40),
    noise=st.lists(st.sampled_from([-1, 0, 1]), min_size=40, max_size=40),
)
def test_no_reader_sees_boxes_of_one_row_overlap(
    durations: list[float], noise: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Boxes that touch, but for the last bit of their seconds, must not overlap in whole
    nanoseconds.

    A reader multiplies microseconds by 1000 and cuts off or rounds, start and length each by
    itself.
    """
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    boxes, time = [], 0.0
    for duration, bit in zip(durations, noise, strict=False):
        start, time = time, time + duration
        end = time if bit == 0 else math.nextafter(time, math.inf * bit)
        boxes.append(Box(0, "compute", "x", "forward", start, max(start, end), Action(Kind.F, 0, 0)))
    write_boxes(path, 1, boxes)
    slices = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    for whole in (int, round):
        spans = [(whole(event["ts"] * 1000), whole(event["dur"] * 1000)) for event in slices]
        for (start, length), (following, _) in itertools.pairwise(spans):
            assert start + length <= following


@pytest.mark.parametrize("ticks", [1, 7, 1000, 123_457])
def test_a_moment_that_is_said_twice_is_one_moment_of_the_trace(ticks: int, tmp_path: Path) -> None:
    """Half-way between two ticks, an end above and a start below it by their last bit round
    apart."""
    middle = (ticks + 0.5) / 8e6
    above, below = middle * (1 + 1e-15), middle * (1 - 1e-15)
    spans = [(0.0, above), (below, 2 * middle)]
    boxes = [Box(0, "compute", "x", "forward", start, end, Action(Kind.F, 0, 0)) for start, end in spans]
    write_boxes(tmp_path / "trace.json", 1, boxes)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    first, second = (event for event in events if event["ph"] == "X")
    assert first["ts"] + first["dur"] == second["ts"]


def test_a_trace_of_a_window_holds_what_overlaps_it(moe_costs: MakeCosts, tmp_path: Path) -> None:
    simulation = _simulation("k2", 2, 6, 2, moe_costs)
    written = write_trace(simulation, tmp_path / "window.json", 50.0, 80.0)
    assert written == len(list(simulation.events(50.0, 80.0)))
    kinds = {event.action.kind for event in simulation.events(50.0, 80.0)}
    assert Kind.F in kinds


def test_the_room_imports_without_torch_and_without_matplotlib() -> None:
    code = "import sys, k2train.schedule; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
