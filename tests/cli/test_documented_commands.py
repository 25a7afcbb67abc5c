"""What the README tells a newcomer to type can start."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from k2train.cli.main import main

ROOT = Path(__file__).parents[2]
# Sweeps check their points themselves, and --help starts nothing.
COMMANDS = [
    match.group(1)
    for match in re.finditer(
        r"^    (?:torchrun \S+ -m )?k2train train ([^#\n]*)", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    if not match.group(1).startswith(("-m ", "--help"))
]


def test_the_readme_has_such_commands() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_readme_can_start(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["train", "--check", "train.device=cpu", *shlex.split(words)]) == 0


def test_the_torchrun_script_tells_a_mistake_on_a_machine_without_gpus(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    environment.pop("RANKS", None)
    done = subprocess.run(
        [ROOT / "launch" / "torchrun.sh", "experiment=laptop", "train.device=cpu", "train.stepz=1"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 2, done.stderr
    assert "did you mean train.steps?" in done.stderr
