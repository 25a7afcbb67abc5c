"""`world=processes` without a launcher: who starts the ranks, and what becomes of their exit
statuses."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import SpawnProcess

import pytest

from k2train.cli.launch import is_wanted, passing_signals_to, wait
from k2train.config.compose import load_config


def start(*seconds_and_status: tuple[float, int]) -> list[SpawnProcess]:
    """Processes that end after some seconds with a status; a negative one is the signal they end
    themselves by."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=end_after, args=entry) for entry in seconds_and_status]
    for rank in ranks:
        rank.start()
    return ranks


def end_after(seconds: float, status: int) -> None:
    time.sleep(seconds)
    if status < 0:
        os.kill(os.getpid(), -status)
    sys.exit(status)


@pytest.mark.parametrize(
    ("words", "environment", "wanted"),
    [
        (["world=processes"], {}, True),
        (["world=processes"], {"WORLD_SIZE": "4"}, False),
        (["world=auto"], {}, False),
        (["world=threads"], {}, False),
    ],
)
def test_ranks_are_started_where_processes_are_asked_for_and_nobody_else_did(
    words: list[str], environment: dict[str, str], wanted: bool
) -> None:
    assert is_wanted(load_config(words), environment) == wanted


def test_all_that_end_well_give_0() -> None:
    assert wait(start((0, 0), (0.2, 0), (0, 0))) == 0


def test_the_first_failure_gives_the_status_and_stops_the_others() -> None:
    began = time.monotonic()
    ranks = start((600, 0), (0, 2), (600, 0))
    assert wait(ranks) == 2
    assert time.monotonic() - began < 60
    assert [rank.exitcode for rank in ranks] == [-signal.SIGTERM, 2, -signal.SIGTERM]


def test_a_rank_that_a_signal_ended_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert wait(start((600, 0), (0, -signal.SIGKILL))) == 1
    assert capsys.readouterr().err == "k2train train: rank 1 was ended by SIGKILL\n"


def test_a_signal_goes_to_every_rank_and_not_to_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = start((600, 0), (600, 0))
    with passing_signals_to(ranks):
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait(ranks) == 1
    assert [rank.exitcode for rank in ranks] == [-signal.SIGTERM, -signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_mistake_is_told_once_before_any_rank_starts() -> None:
    words = ["layout=laptop", "world=processes", "train.device=cpu", "layout.pp=3"]
    done = subprocess.run(
        [sys.executable, "-m", "k2train", "train", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("k2train train: ") == 1
    assert "Traceback" not in done.stderr
