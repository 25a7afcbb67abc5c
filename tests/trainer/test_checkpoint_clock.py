"""Checkpoints by time: one rank's clock decides, and all ranks save after the same step."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from k2train.cli.main import main
from k2train.trainer.checkpoint_clock import SAVE_NUMBER, CheckpointClock


class Now:
    """A clock that stands until it is moved, in seconds."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_checkpoint_is_asked_for_when_the_minutes_are_over() -> None:
    now = Now()
    clock = CheckpointClock(2.0, asks=True, now=now)
    now.seconds += 119
    assert clock.number(0) == 0
    now.seconds += 1
    assert clock.number(0) == SAVE_NUMBER
    # Until it has been written: the step that heard it may be a later one.
    assert clock.number(0) == SAVE_NUMBER
    clock.saved()
    assert clock.number(0) == 0


def test_only_the_rank_whose_clock_counts_asks_and_zero_minutes_never_do() -> None:
    now = Now()
    silent = [CheckpointClock(2.0, asks=False, now=now), CheckpointClock(0.0, asks=True, now=now)]
    now.seconds += 1e9
    assert [clock.number(0) for clock in silent] == [0, 0]


def test_a_signal_that_stops_wins_over_a_checkpoint_by_time() -> None:
    """The step takes the maximum over all ranks, so a save must be below every signal that stops a
    run."""
    clock = CheckpointClock(1e-9, asks=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        assert clock.number(number) == number > SAVE_NUMBER > 0


@pytest.mark.parametrize("layout", [[], ["layout=laptop", "train.microbatch_size=1"]])
def test_every_rank_saves_when_rank_0_s_clock_says_so(
    layout: list[str], words: list[str], tmp_path: Path
) -> None:
    """With a vanishing interval every step is followed by a checkpoint, on one rank as on four
    threads.

    Were the ranks to disagree, the first barrier of a save would meet another operation and name
    it.
    """
    changes = [
        "train.checkpoint_every_steps=0",
        "train.checkpoint_every_minutes=1e-9",
        "train.final_eval_tokens=0",
    ]
    assert main(["train", *words, *layout, "train.steps=3", "train.eval_every_steps=0", *changes]) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002", "step-000003"]


def test_without_an_interval_only_the_end_is_saved(words: list[str], tmp_path: Path) -> None:
    changes = ["train.checkpoint_every_steps=0", "train.final_eval_tokens=0", "train.eval_every_steps=0"]
    assert main(["train", *words, "train.steps=3", *changes]) == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
