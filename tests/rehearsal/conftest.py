"""Rehearsals run in a process of their own: torch must not have been imported before the stub of
its device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run_rehearsal(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`k2train rehearse` with its report in `folder`/report.json."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "k2train",
        "rehearse",
        f"rehearse.json={folder / 'report.json'}",
    ]
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def rehearse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """A function that rehearses a config and returns its report."""
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("a rehearsal without CUDA needs a C++ compiler")
    pytest.importorskip("triton", reason="what is launched depends on triton")

    def report(*words: str) -> dict:
        folder = tmp_path_factory.mktemp("rehearsal")
        done = run_rehearsal(folder, *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return {**json.loads((folder / "report.json").read_text()), "text": done.stdout, "told": done.stderr}

    return report


@pytest.fixture(scope="session")
def rehearse_words() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_rehearsal`, for words that are refused."""
    return run_rehearsal
