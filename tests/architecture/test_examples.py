"""The examples run as they stand, in a folder of their own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from k2train.cli.main import main
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


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("new_schedule.py", "newest_first is proved; microbatches in flight: (8, 8, 8, 8)"),
        ("new_loss.py", "value and gradients are autograd's"),
        ("new_dataset.py", "100 documents, 18417 tokens"),
    ],
)
def test_an_example_of_something_new_runs(name: str, told: str, tmp_path: Path) -> None:
    assert told in run_example(name, tmp_path)


def test_every_example_is_run_by_a_test() -> None:
    text = Path(__file__).read_text()
    assert [path.name for path in (ROOT / "examples").glob("*.py") if f'"{path.name}"' not in text] == []


def indented(page: str, start: str) -> list[str]:
    """The words behind every command of a page that begins with `start`."""
    lines = re.findall(rf"^    {start} (.*)$", (ROOT / "docs" / page).read_text(), re.M)
    return [line.split("   #")[0] for line in lines if "--config-dir" not in line]


@pytest.mark.parametrize("words", indented("extending.md", "k2train train"))
def test_a_command_of_the_extending_page_can_start(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["train", "--check", "train.device=cpu", *shlex.split(words)]) == 0


def yaml_of_the_page() -> dict[str, str]:
    """The YAML files that the extending page shows, by the path in their first line."""
    page = (ROOT / "docs" / "extending.md").read_text()
    return dict(re.findall(r"```yaml\n# mine/(\S+)\n(.*?)```", page, re.S))


def test_the_config_files_of_the_extending_page_are_taken(tmp_path: Path) -> None:
    files = yaml_of_the_page()
    assert files
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    words = [f"{Path(name).parent}={Path(name).stem}" for name in files]
    checked = ["train", "--check", "--config-dir", str(tmp_path), "train.device=cpu", *words]
    assert main(checked) == 0
