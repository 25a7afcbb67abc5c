"""A word picks its rules, and a wrong word is refused by every command that reads the optimizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.update_rules.chosen import all_rules, chosen_rules
from k2train.update_rules.rule import MASTER, NamedRules

OPTIM = load_config(["experiment=tiny"]).optim
COMMANDS = (["train", "--check"], ["train"], ["plan"], ["report", "memory"])


@pytest.mark.parametrize("named", all_rules(), ids=lambda named: named.name)
def test_every_rule_has_a_config_of_its_name_and_names_its_states_once(named: NamedRules) -> None:
    rules = chosen_rules(load_config([f"optim={named.name}", f"optim.name={named.name}"]).optim)
    for rule in (rules.matrices, rules.others):
        names = [MASTER, *rule.states]
        assert len(set(names)) == len(names)
        assert not any("/" in name for name in names), "checkpoint names are <state>/<tensor>"
        assert (rule.matmul_flops((8, 4)) > 0) == rule.whole_matrices
    assert not rules.others.whole_matrices


def test_no_two_files_answer_to_one_word() -> None:
    names = [named.name for named in all_rules()]
    assert len(set(names)) == len(names)
    assert {"muonclip", "adamw"} <= set(names)


def test_a_word_that_is_no_rule_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"optim\.name=adamv: must be one of .*\n.*did you mean adamw"):
        chosen_rules(dataclasses.replace(OPTIM, name="adamv"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_refuses_an_optimizer_that_is_none(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "optim.name=adamv", f"run_dir={tmp_path}/run"]) == 2
    assert "optim.name=adamv: must be one of" in capsys.readouterr().err
