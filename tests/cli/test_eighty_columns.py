"""Every table of every command is whole at 80 columns: nothing is cut off, and no number of the
wide form is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from k2train.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
NUMBER = re.compile(r"\d[\d,.]*")
SMALL = ["layout=laptop", "train.global_batch_tokens=32768"]
COMMANDS = {
    "plan": ["plan", *SMALL],
    "plan of K2": ["plan", "experiment=k2", "train.global_batch_tokens=8388608"],
    "sweep": [
        "plan",
        "-m",
        "layout.edp=1,2",
        "model.n_routed_experts=8,16",
        "train.global_batch_tokens=32768",
    ],
    "schedules": ["plan", *SMALL, "plan.compare=[k2,1f1b]"],
    "report memory": ["report", "memory"],
    "doctor": ["doctor"],
}


def printed(
    words: Sequence[str], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(list(words)) == 0
    return capsys.readouterr().out


def check(narrow: str, wide: str) -> None:
    assert "…" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80
    assert set(NUMBER.findall(wide)) <= set(NUMBER.findall(narrow))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_whole_at_80_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = printed(COMMANDS[name], 100, monkeypatch, capsys)
    check(printed(COMMANDS[name], 80, monkeypatch, capsys), wide)


def test_the_report_of_a_run_is_whole_at_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {
        "tokens": 10**12,
        "loss": 2.3456789,
        "eval_loss": 2.4567891,
        "grad_norm": 0.123456789,
        "lr": 1.23456e-4,
        "max_logit": 99.87654,
        "load_violation": 0.0123456,
        "tokens_per_second": 1234567.8,
    }
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, **line}) + "\n" for step in range(1, 30))
    )
    monkeypatch.chdir(tmp_path)
    wide = printed(["report", "run_dir=."], 100, monkeypatch, capsys)
    narrow = printed(["report", "run_dir=."], 80, monkeypatch, capsys)
    check(narrow, wide)
    for number in (
        "1,000,000,000,000",
        "2.346",
        "2.457",
        "0.1235",
        "0.0001235",
        "99.88",
        "0.01235",
        "1,234,568",
    ):
        assert number in narrow


def test_all_tables_come_from_the_room_that_cuts_nothing_off() -> None:
    makers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "k2train").rglob("*.py")
        if re.search(r"(?<![A-Za-z_])Table\(", path.read_text())
    }
    assert makers == {"k2train/telemetry/tables.py"}
