"""What the README shows as output is what the program prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from k2train.cli.main import main

README = (Path(__file__).parents[2] / "README.md").read_text()


def shown(command: str) -> tuple[list[str], list[str]]:
    """Words and lines of output of the README's block of a command."""
    blocks = re.findall(r"^    \$ k2train (.*)\n((?:    .*\n|\n(?=    (?!\$)))*)", README, re.M)
    ((words, lines),) = [block for block in blocks if block[0].split()[0] == command]
    return shlex.split(words), [line.strip() for line in lines.splitlines() if line.strip()]


def assert_in_order(lines: list[str], printed: str) -> None:
    """Every line is printed, and after the one before it."""
    rest = iter([line.strip() for line in printed.splitlines()])
    assert [line for line in lines if line not in rest] == []


def numberless(line: str) -> str:
    """A line with a # for every number."""
    return re.sub(r"\d[\d,.]*", "#", line)


@pytest.mark.parametrize("command", ["plan", pytest.param("rehearse", marks=pytest.mark.slow)])
def test_what_is_shown_of_a_report_is_printed(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    words, lines = shown(command)
    assert len(lines) >= 3
    assert main(words if words[0] == command else [command, *words]) == 0
    assert_in_order(lines, capsys.readouterr().out)


def test_what_is_shown_of_a_run_has_the_form_of_its_lines(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Losses and seconds depend on the machine, so numbers are not compared."""
    _, lines = shown("train")
    words = ["experiment=tiny", "train.steps=2", "train.final_eval_tokens=1024", "train.device=cpu"]
    assert main(["train", *words, f"run_dir={tmp_path / 'run'}"]) == 0
    printed = {numberless(line) for line in capfd.readouterr().out.splitlines()}
    assert len(lines) >= 3
    assert [line for line in lines if numberless(line) not in printed] == []
