"""The recorded timeline of an executed step says what the schedule says, in the format of the
planned one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.schedule import Pair
from k2train.trainer.build import build_program

K2_ON_TWO_STAGES = ["schedule=k2", "layout.pp=2", "layout.vpp=1", "layout.ep=2", "world=threads"]
LAYOUTS = {
    "two stages, paired": K2_ON_TWO_STAGES,
    "three stages, full backward": [
        "schedule=1f1b",
        "layout.pp=3",
        "layout.edp=1",
        "world=threads",
        "train.global_batch_tokens=256",
    ],
    "one rank": ["layout=single"],
}
TRAINED = ["train.steps=2", "telemetry.trace_step=2", "train.eval_every_steps=0", "train.microbatch_size=1"]


def boxes_by_stage(path: Path) -> dict[int, list[dict[str, Any]]]:
    """The boxes of a trace by process, in the order of their start."""
    found: dict[int, list[dict[str, Any]]] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X":
            found.setdefault(event["pid"], []).append(event)
    return {stage: sorted(boxes, key=lambda box: box["ts"]) for stage, boxes in found.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_recorded_actions_of_every_stage_are_the_schedules_in_order(
    name: str, words: list[str], tmp_path: Path
) -> None:
    all_words = [*words, *LAYOUTS[name], *TRAINED]
    assert main(["train", *all_words]) == 0
    schedule = build_program(load_config(all_words)).schedule
    recorded = boxes_by_stage(tmp_path / "run" / "trace.json")
    assert recorded.keys() == set(range(schedule.num_stages))
    for stage, steps in enumerate(schedule.stages):
        done = [box["name"] for box in recorded[stage] if not box["name"].startswith("wait ")]
        assert done == [str(step) for step in steps]
    if name == "two stages, paired":
        assert any(isinstance(step, Pair) for steps in schedule.stages for step in steps)
        assert any(box["name"].startswith("wait F") for box in recorded[1])


def test_an_executed_trace_has_the_shape_of_the_planned_one(words: list[str], tmp_path: Path) -> None:
    model = [word for word in words if word.startswith("model.")]
    planned = tmp_path / "planned.json"
    sizes = ["train.seq_len=32", "train.global_batch_tokens=256"]
    plan = [*model, *K2_ON_TWO_STAGES[:-1], *sizes, "train.microbatch_size=1", f"plan.trace={planned}"]
    assert main(["plan", *plan]) == 0
    assert main(["train", *words, *K2_ON_TWO_STAGES, *TRAINED]) == 0
    mine, theirs = (
        json.loads(path.read_text())["traceEvents"] for path in (tmp_path / "run" / "trace.json", planned)
    )
    # The same processes and threads under the same ids, so that both open in one Perfetto window
    # row by row.
    assert [e for e in mine if e["ph"] == "M"] == [e for e in theirs if e["ph"] == "M"]
    box, other = (next(e for e in events if e["ph"] == "X") for events in (mine, theirs))
    assert box.keys() == other.keys()
    assert box["args"].keys() == other["args"].keys()
    for kind in ("SEND_F", "SEND_B"):
        threads = [{e["tid"] for e in events if e["name"].startswith(kind)} for events in (mine, theirs)]
        assert threads[0] == threads[1] != set()


def test_boxes_of_one_thread_never_overlap_and_none_is_written_unasked(
    words: list[str], tmp_path: Path
) -> None:
    assert main(["train", *words, *K2_ON_TWO_STAGES, *TRAINED]) == 0
    trace = tmp_path / "run" / "trace.json"
    for boxes in boxes_by_stage(trace).values():
        ends: dict[int, float] = {}
        for box in boxes:
            assert box["dur"] >= 0
            assert box["ts"] >= ends.get(box["tid"], 0.0) - 0.01
            ends[box["tid"]] = box["ts"] + box["dur"]
    trace.unlink()
    again = [*words, *K2_ON_TWO_STAGES, *TRAINED, "telemetry.trace_step=null", "train.steps=3"]
    assert main(["train", *again]) == 0
    assert not trace.exists()
