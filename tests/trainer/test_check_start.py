"""`train --check` refuses what the start would refuse, in the same words, and leaves no trace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.trainer.check_start import check_start
from k2train.trainer.loop import prepare, train

REFUSED = [
    (["telemetry.wandb_project=mine"], "telemetry.wandb_project=mine: needs the wandb package"),
    (["data.blend=[{prefix: /nowhere/text}]"], r"data.blend\[0\].prefix=/nowhere/text: .*not found"),
    (["data.blend=[]", "data.stdlib=false"], r"data.blend=\[\]: this experiment takes no corpus by itself"),
    (["train.init_from=/nowhere"], "train.init_from=/nowhere: there is no such directory"),
    (
        ["data.tokenizer={kind: huggingface, path: /nowhere}"],
        "data.tokenizer.path=/nowhere: /nowhere not found",
    ),
    (["data.tokenizer={kind: tiktoken, path: /nowhere}"], "data.tokenizer.path=/nowhere: is neither a file"),
    (["model.vocab_size=200"], "model.vocab_size=200: is smaller than the 257 ids"),
    (["data.split='a,b'"], "data.split=a,b: must be numbers"),
    (["data.split='100,0.1,0'"], r"data.blend\[0\].prefix=.*: its valid documents hold"),
    (["run_dir=/proc/nothing"], "run_dir=/proc/nothing: cannot be written"),
    (["run_dir=/dev/null/run"], "run_dir=/dev/null/run: cannot be written: Not a directory"),
    (["optim.lr_phases=[{kind: constant, to: 0, fraction: 1}]"], "every rate is 0"),
]


@pytest.fixture
def checked(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    # An import that fails is how Python says that a package is not there, also where it is.
    monkeypatch.setitem(sys.modules, "wandb", None)
    return [*words, "train.device=cpu"]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_what_the_start_refuses_the_check_refuses(
    changed: list[str], message: str, checked: list[str], tmp_path: Path
) -> None:
    config = load_config([*checked, *changed])
    with pytest.raises(ConfigError, match=message) as found:
        check_start(config, prepare(config).program.layout)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError) as started:
        train(config)
    assert started.value.field == found.value.field


def test_a_run_that_can_start_passes_and_leaves_no_trace(checked: list[str], tmp_path: Path) -> None:
    assert main(["train", "--check", *checked]) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_corpus_is_not_built_by_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--check", "train.device=cpu"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--check", "train.device=cpu", "data.cache_dir=/proc/cache"]) == 2
    assert "data.cache_dir=/proc/cache: cannot be written" in capsys.readouterr().err


def test_a_run_that_would_go_on_is_checked_as_one(
    checked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *checked, "train.steps=2", "train.final_eval_tokens=0"]) == 0
    alone = ["train", "--check", f"run_dir={tmp_path}/run"]
    assert main(alone) == 0
    assert main([*alone, "model.hidden_size=64"]) == 2
    assert "model.hidden_size=64: the run in" in capsys.readouterr().err
    # Nothing is read from it where a checkpoint goes on.
    assert main([*alone, "train.init_from=/nowhere"]) == 0
    fresh = ["train", "--check", *checked, f"run_dir={tmp_path}/other"]
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert main([*fresh, f"train.init_from={newest}"]) == 0
    assert main([*fresh, f"train.init_from={newest}", "model.hidden_size=64"]) == 2
    assert "model.hidden_size=64: the checkpoint in" in capsys.readouterr().err


def test_a_stage_with_nothing_to_train_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layout.pp=3", "layout.layers_per_virtual_stage=[2,0,2]", "train.device=cpu"]
    assert main(["train", "--check", *words]) == 2
    assert "layout.pp=3: leaves stage 1 without parameters" in capsys.readouterr().err


def test_a_schedule_that_cannot_run_is_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    stuck = ["layout.pp=2", "layout.vpp=2", "train.microbatch_size=4", "train.device=cpu"]
    for command in (["plan"], ["train", "--check"], ["train"]):
        assert main([*command, *stuck, "schedule.extra_warmup_microbatches=0"]) == 2
        printed = capsys.readouterr().err
        assert "schedule.kind=k2: cannot run: deadlock" in printed
        assert "schedule.extra_warmup_microbatches=1" in printed
    assert main(["train", "--check", *stuck, "schedule.extra_warmup_microbatches=1"]) == 0
