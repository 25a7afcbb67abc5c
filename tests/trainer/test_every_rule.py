"""What every optimizer must be able to do in a whole run, for each file of update_rules/rules."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from k2train.checkpoint import open_checkpoint, step_directory
from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.planner.plan import build_plan
from k2train.update_rules.chosen import all_rules, chosen_rules
from k2train.update_rules.rule import MASTER

NAMES = [named.name for named in all_rules()]
FLOAT64 = ["train.dtype=float64", "optim.newton_schulz_dtype=float64", "train.microbatch_size=1"]
ELSEWHERE = ["layout.pp=2", "layout.ep=2", "layout.edp=2", "optim.states=host"]


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(step_directory(run_dir / "checkpoints", step))
    return {name: checkpoint.load(name) for name in checkpoint.names()}


def train(words: Sequence[str], run_dir: Path) -> None:
    assert main(["train", *words, f"run_dir={run_dir}"]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_on_another_layout_with_states_elsewhere(words, tmp_path: Path, name) -> None:
    """Float64: only the order of sums differs. A step's rounding, 1e-15 of a number, is amplified
    at most 485 times by Newton-Schulz and by AdamW's division where a gradient is tiny; six steps
    stay within 1e-9 of a tensor's largest entry.
    """
    base = [*words, *FLOAT64, f"optim.name={name}"]
    train(base, tmp_path / "straight")
    train([*base, *ELSEWHERE], tmp_path / "moved")
    for later in (4, 6):
        shutil.rmtree(step_directory(tmp_path / "moved" / "checkpoints", later))
    train(base, tmp_path / "moved")
    straight, moved = (tensors(tmp_path / run, 6) for run in ("straight", "moved"))
    assert straight.keys() == moved.keys()
    for tensor, expected in straight.items():
        atol = 1e-9 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(moved[tensor], expected, rtol=0, atol=atol, msg=tensor)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_holds_the_states_that_the_rules_name(
    words, tmp_path: Path, capsys: pytest.CaptureFixture[str], name
) -> None:
    train([*words, "train.steps=1", f"optim.name={name}"], tmp_path / "run")
    rules = chosen_rules(load_config([f"optim.name={name}"]).optim)
    both = (rules.matrices, rules.others)
    kinds = {kind.partition("/")[0] for kind in tensors(tmp_path / "run", 1)}
    assert kinds - {"model", "num_updates"} == {MASTER, *(state for rule in both for state in rule.states)}
    table = capsys.readouterr().out
    assert all(rule.label in table for rule in both)


@pytest.mark.parametrize("states", ["device", "host"])
@pytest.mark.parametrize("name", NAMES)
def test_the_plan_counts_bytes_and_seconds_of_every_rule(words, name, states: str) -> None:
    """One rank owns everything: the master and each state of every parameter, four bytes a
    number."""
    config = load_config([*words, f"optim.name={name}", f"optim.states={states}"])
    (of_stage,), (update,) = (build_plan(config).states, build_plan(config).updates)
    rules = chosen_rules(config.optim)
    kept = {rule.whole_matrices: 1 + len(rule.states) for rule in (rules.matrices, rules.others)}
    expected = of_stage.whole_elements * kept.get(True, 0) + of_stage.row_elements * kept[False]
    assert of_stage.optimizer_bytes == 4 * expected
    assert (
        of_stage.whole_elements + of_stage.row_elements == of_stage.dense_elements + of_stage.expert_elements
    )
    assert (of_stage.matmul_flops > 0) == rules.matrices.whole_matrices
    assert update.update > 0
