"""The program's edges: exit statuses, and messages instead of tracebacks."""

import subprocess
import sys

import pytest

from k2train.cli.main import COMMANDS, main, usage


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "k2train", *words], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_lists_every_command(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == usage()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "did you mean train?"),
        (["train", "train.stepz=3"], "did you mean train.steps?"),
        (["train", "model=k9"], "there is no configs/model/k9.yaml"),
        (["train", "layout.ep=5"], "must divide"),
        (["plan", "layout.pp=-1"], "must be at least 1"),
    ],
)
def test_a_users_mistake_exits_with_2_and_no_traceback(words: list[str], expected: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 4


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "usage: k2train" in capsys.readouterr().out
