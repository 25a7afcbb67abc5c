"""Joining a run of processes: it needs a launcher, and may take longer than a collective."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from k2train.config.errors import ConfigError
from k2train.parallel.processes import process_world

LATE_BY_RANK = """
import os, time
import torch
from k2train.parallel.processes import process_world
time.sleep(4 * int(os.environ["RANK"]))
with process_world("processes", torch.device("cpu"), timeout_seconds=2.0) as world:
    print(world.size)
"""


def test_a_rank_that_comes_later_than_a_collective_may_take_still_joins():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launched = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", LATE_BY_RANK], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, env={**launched, "RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        out, err = process.communicate(timeout=110)
        assert (process.returncode, out.strip()) == (0, "2"), err


def test_processes_that_nobody_launched_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE"), process_world("processes", torch.device("cpu")):
        pass
