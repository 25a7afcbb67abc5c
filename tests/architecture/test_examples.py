"""The examples run as they stand, in a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from k2train.telemetry.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def run_example(name: str, folder: Path) -> str:
    """What an example prints in a folder, run as a reader would run it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The notebook's output, and the folder of its run."""
    folder = tmp_path_factory.mktemp("notebook")
    return run_example("notebook.py", folder), folder / "runs" / "notebook"


def test_the_notebook_plans_draws_trains_and_reads(notebook: tuple[str, Path]) -> None:
    printed, run = notebook
    assert "planned step:" in printed
    assert (run / "schedule.png").stat().st_size > 10_000
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_the_notebook_prints_a_line_for_each_step(notebook: tuple[str, Path]) -> None:
    printed, run = notebook
    for line in read_metrics(run / "metrics.jsonl"):
        assert f"{line['step']} loss {line['loss']:.3f}" in printed
