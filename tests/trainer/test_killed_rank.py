"""A run of four processes that loses a rank ends by itself, says what it lost, and can go on
afterwards.

Started by torchrun, and by `k2train train` itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from k2train.checkpoint import checkpoint_problem, latest_checkpoint
from k2train.cli.main import main
from k2train.telemetry.metrics import read_metrics

WORLD = 4
TIMEOUT_SECONDS = 5
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    f"--nproc-per-node={WORLD}",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
]
LAUNCHERS = {"torchrun": TORCHRUN, "itself": []}
LAYOUT = ["layout.pp=2", "layout.ep=2", "layout.vpp=1", "world=processes", "train.microbatch_size=1"]


class Run:
    """The launching process and its ranks. Output goes to a file, so that nobody waits for us to
    read it."""

    def __init__(self, launcher: str, words: list[str], directory: Path) -> None:
        self.log = directory / "log"
        self.run_dir = directory / "run"
        self.ranks: list[int] = []
        command = [sys.executable, *LAUNCHERS[launcher], "-m", "k2train", "train", *words, *LAYOUT]
        self.output = self.log.open("w")
        self.process = subprocess.Popen(
            command, stdout=self.output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for_steps(self, count: int) -> None:
        wait_until(
            lambda: (
                self.process.poll() is not None or len(read_metrics(self.run_dir / "metrics.jsonl")) >= count
            )
        )
        assert self.process.poll() is None, self.text
        # Each rank has a session of its own, and they were started in order.
        self.ranks = sorted(pid for pid in descendants(self.process.pid) if os.getsid(pid) == pid)
        assert len(self.ranks) == WORLD

    def left(self) -> list[int]:
        """Ranks that still run."""
        return [rank for rank in self.ranks if is_running(rank)]

    def end(self) -> int:
        return self.process.wait(timeout=180)

    def kill_everything(self) -> None:
        for process in (*self.left(), self.process.pid):
            if is_running(process):
                os.kill(process, signal.SIGKILL)
        self.process.wait()
        self.output.close()


def descendants(process: int) -> list[int]:
    """Its children and theirs."""
    children = [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]


def is_running(process: int) -> bool:
    """Whether a process is there and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def long_words(words: list[str]) -> list[str]:
    return [
        *words,
        "train.steps=100000",
        "train.eval_every_steps=0",
        "train.checkpoint_every_steps=3",
        "train.keep_checkpoints=2",
        f"train.timeout_seconds={TIMEOUT_SECONDS}",
    ]


@pytest.fixture(params=LAUNCHERS)
def run(request: pytest.FixtureRequest, long_words: list[str], tmp_path: Path) -> Iterator[Run]:
    started = Run(request.param, long_words, tmp_path)
    yield started
    started.kill_everything()


def resume(words: list[str], run: Run) -> None:
    """Go on, on one rank, until there are two steps more than the lost run had written down."""
    steps = len(read_metrics(run.run_dir / "metrics.jsonl")) + 2
    assert main(["train", *words, f"train.steps={steps}"]) == 0
    lines = read_metrics(run.run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))


def assert_names_what_it_lost(text: str) -> None:
    """A line of a rank that names operation and group, and no traceback of ours."""
    told = [line for line in text.splitlines() if "k2train train: rank " in line and "was ended" not in line]
    assert told, text
    assert any(
        f" in group {name} (ranks " in line for line in told for name in ("world", "pp", "ep", "edp", "dp")
    ), told
    assert all("failed: " in line for line in told)
    assert "k2train/trainer" not in text, "a traceback reached the user"


def test_a_killed_rank_ends_the_others_with_the_operation_that_failed(
    run: Run, long_words: list[str]
) -> None:
    run.wait_for_steps(5)
    os.kill(run.ranks[3], signal.SIGKILL)
    assert run.end() != 0
    assert run.left() == []
    assert_names_what_it_lost(run.text)
    resume(long_words, run)


@pytest.mark.slow
def test_ranks_that_wait_for_a_stopped_one_run_into_the_timeout_and_say_where(
    run: Run, long_words: list[str]
) -> None:
    run.wait_for_steps(5)
    stopped = run.ranks[1]
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: "k2train train: rank " in run.text)
    # The launcher waits for the stopped rank to obey its SIGTERM, half a minute; that patience is
    # not ours to test.
    os.kill(stopped, signal.SIGKILL)
    assert run.end() != 0
    assert run.left() == []
    assert_names_what_it_lost(run.text)
    resume(long_words, run)


@pytest.mark.parametrize("run", [pytest.param("torchrun", marks=pytest.mark.slow), "itself"], indirect=True)
def test_sigterm_to_the_launcher_ends_every_rank_after_its_step_with_a_checkpoint(run: Run) -> None:
    run.wait_for_steps(5)
    os.kill(run.process.pid, signal.SIGTERM)
    status = run.end()
    assert run.left() == []
    done = len(read_metrics(run.run_dir / "metrics.jsonl"))
    assert f"stopped by SIGTERM after step {done}" in run.text
    assert latest_checkpoint(run.run_dir / "checkpoints") == run.run_dir / "checkpoints" / f"step-{done:06}"
    if "torch.distributed.run" not in run.process.args:  # which counts a signal as a failure
        assert status == 0
        assert "resume with: k2train train " in run.text


@pytest.mark.parametrize("run", ["itself"], indirect=True)
def test_ranks_whose_launcher_was_killed_stop_with_a_checkpoint(run: Run) -> None:
    run.wait_for_steps(5)
    os.kill(run.process.pid, signal.SIGKILL)
    wait_until(lambda: run.left() == [])
    done = len(read_metrics(run.run_dir / "metrics.jsonl"))
    assert latest_checkpoint(run.run_dir / "checkpoints") == run.run_dir / "checkpoints" / f"step-{done:06}"
    assert checkpoint_problem(run.run_dir / "checkpoints" / f"step-{done:06}") == ""
    assert "k2train train: rank" not in run.text
