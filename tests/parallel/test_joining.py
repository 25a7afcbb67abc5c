"""Joining a run of processes: it needs a launcher, and may take longer than a collective."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from k2train.cli.main import main
from k2train.config.errors import ConfigError
from k2train.parallel import processes
from k2train.parallel.processes import process_world

LATE_BY_RANK = """
import os, time
import torch
from k2train.parallel.processes import process_world
time.sleep(4 * int(os.environ["RANK"]))
with process_world("processes", torch.device("cpu"), timeout_seconds=2.0) as world:
    print(world.size)
"""


def test_a_rank_that_comes_later_than_a_collective_may_take_still_joins() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launched = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LATE_BY_RANK],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**launched, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in ranks:
        out, err = process.communicate(timeout=110)
        assert (process.returncode, out.strip()) == (0, "2"), err


def test_processes_that_nobody_launched_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE"), process_world("processes", torch.device("cpu")):
        pass


def test_a_rank_whose_others_never_come_says_so_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launched = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "JOIN_SECONDS", 1.0)
    words = [
        "train",
        "layout.edp=2",
        "world=processes",
        "train.microbatch_size=8",
        "train.timeout_seconds=1",
        "train.bind_cores=false",
    ]
    assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 1
    told = capsys.readouterr().err
    assert "rank 1 of 2: joining the run failed, which may take 1 s" in told
    assert "Start all of them again with the same words" in told
    assert not dist.is_initialized()
