"""Section 2: the tests marked gpu, spread over processes, since most of their time is compiling
kernels on the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .configs import ROOT
from .report import Report
from .setting import Setting

SPARE_SECONDS = 5.0
MOST_PROCESSES = 8


def run(report: Report, setting: Setting) -> None:
    files = marked_files()
    if setting.tiny:
        files = [file for file in files if file.parent.name == "parallel"]
    processes = 1 if setting.tiny else max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{index}.jsonl" for index in range(processes)]
        began = time.monotonic()
        shares = [start(files, index, processes, log) for index, log in enumerate(logs)]
        unfinished = wait(shares, setting.seconds_left - SPARE_SECONDS)
        tell(report, [line for log in logs for line in read(log)], unfinished, time.monotonic() - began)


def marked_files() -> list[Path]:
    """The files with tests for a GPU."""
    return [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in file.read_text()]


def start(files: list[Path], index: int, processes: int, log: Path) -> subprocess.Popen[bytes]:
    """A process that runs every `processes`-th of the tests, from `index` on."""
    command = [sys.executable, "-m", f"{__package__}.pytest_share", str(index), str(processes), str(log)]
    command += map(str, files)
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)


def wait(shares: list[subprocess.Popen[bytes]], seconds: float) -> int:
    """Wait for all of them, kill what is left when the time is over, and say how many those
    were."""
    ends_at = time.monotonic() + seconds
    unfinished = 0
    for share in shares:
        try:
            share.wait(max(0.1, ends_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            share.kill()
            share.wait()
            unfinished += 1
    return unfinished


def read(log: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def tell(report: Report, lines: list[dict[str, str]], unfinished: int, seconds: float) -> None:
    """Every failure's first line, and the counts."""
    counts = Counter(line["outcome"] for line in lines)
    for line in lines:
        if line["outcome"] == "failed":
            report.fail(line["test"], line["message"])
    report.fact(
        "outcomes",
        ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "no test ran",
    )
    report.figure(
        "tests that failed", counts["failed"], "tests", 0.0, sum(counts.values()), f"{seconds:.0f} s"
    )
    if unfinished:
        report.fail(
            "tests", f"{unfinished} processes were stopped at the limit; the tests they had left did not run"
        )
