"""The program's edges: exit statuses, and messages instead of tracebacks."""

import subprocess
import sys
from pathlib import Path

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


def test_check_says_what_would_start_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [
        "train",
        "--check",
        "layout=laptop",
        "train.device=cpu",
        "train.microbatch_size=1",
        f"run_dir={tmp_path}/run",
    ]
    assert main(words) == 0
    assert "4 rank(s) on cpu as threads: pp 2 x edp 1 x ep 2" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_check_takes_the_number_of_ranks_from_the_launchers_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert main(["train", "--check", "layout=laptop", "train.device=cpu", "train.microbatch_size=1"]) == 0
    assert "8 rank(s) on cpu as processes: pp 2 x edp 2 x ep 2" in capsys.readouterr().out
    assert (
        main(
            [
                "train",
                "--check",
                "layout=laptop",
                "train.device=cpu",
                "train.microbatch_size=1",
                "layout.edp=1",
            ]
        )
        == 2
    )
    assert "the launcher started 8" in capsys.readouterr().err
