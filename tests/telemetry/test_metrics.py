"""metrics.jsonl after kills and resumes."""

import json
from pathlib import Path

from k2train.telemetry.metrics import MetricsFile, read_metrics


def _write(path: Path, keep: int, steps: range) -> None:
    with MetricsFile(path, keep_steps=keep) as file:
        for step in steps:
            file.write({"step": step, "loss": 1.0 / step})


def test_resuming_leaves_the_lines_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    _write(whole, 0, range(1, 11))
    for keep in range(8):
        cut.unlink(missing_ok=True)
        _write(cut, 0, range(1, 8))
        _write(cut, keep, range(keep + 1, 11))
        assert cut.read_text() == whole.read_text()


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 0, range(1, 4))
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    _write(path, 3, range(4, 5))
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_lines_are_strict_json_even_where_a_number_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, keep_steps=0) as file:
        file.write({"step": 1, "loss": float("nan"), "max_logit": float("inf")})
    assert json.loads(path.read_text(), parse_constant=lambda word: 1 / 0) == {
        "step": 1,
        "loss": None,
        "max_logit": None,
    }
