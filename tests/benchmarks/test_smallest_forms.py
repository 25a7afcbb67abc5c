"""Every benchmark runs to its end in its smallest form: what it imports is there, and its two sides
still agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NARROW = [
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.moe_intermediate_size=16",
    "model.n_routed_experts=4",
]
FORMS = {
    "activations": ["--rounds", "1", "--microbatches", "4", "--override", *NARROW],
    "fp8_quality": [
        "--steps",
        "1",
        "--every",
        "1",
        "--seeds",
        "0",
        "--tokens",
        "128",
        "--final-tokens",
        "128",
        "--picture",
        "quality.png",
        "--override",
        "train.global_batch_tokens=2048",
    ],
    "model": ["--only", "k2_tiny/8x256", "--pairs", "1", "--batch", "1", "--threads", "1"],
    "optimizer": ["--millions", "0.01", "--rounds", "1", "--experts", "4"],
    "pipeline": [
        "--rounds",
        "1",
        "--hidden",
        "8",
        "--microbatches",
        "4",
        "--tokens",
        "4",
        "--layers",
        "1",
        "--vocab",
        "16",
    ],
    "plan": ["--quick", "--repeats", "1", "--only", "k2, 512 nodes"],
}
OWN_TEST = {"gpu"}


def test_every_benchmark_has_a_smallest_form() -> None:
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == FORMS.keys() | OWN_TEST


@pytest.mark.parametrize("name", FORMS)
def test_a_benchmark_runs_in_its_smallest_form(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "k2train", "bench", name, *FORMS[name]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
