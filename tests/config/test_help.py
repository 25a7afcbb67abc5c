"""`--help` is made from the field declarations, so it can leave nothing out."""

import dataclasses
import re

import pytest
import yaml

from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.config.convert import from_dict, to_dict
from k2train.config.data import DataBuildConfig
from k2train.config.help import keys_of, render_help
from k2train.config.schema import Config


def _leaves(value: object, prefix: str = "") -> set[str]:
    if isinstance(value, dict):
        return {
            leaf
            for key, item in value.items()
            for leaf in _leaves(item, f"{prefix}.{key}" if prefix else key)
        }
    return {prefix}


def test_help_lists_every_key_a_config_can_hold() -> None:
    listed = {entry.name for entry in keys_of(Config)}
    composed = _leaves(to_dict(load_config(["model=k2"])))
    assert composed <= listed
    text = render_help(Config, "t", "u")
    assert all(name in text for name in composed)


def test_every_key_is_explained_and_every_quantity_has_a_unit() -> None:
    for root in (Config, DataBuildConfig):
        for entry in keys_of(root):
            assert entry.doc, entry.name
            if entry.name.endswith(
                ("_tokens", "_bytes", "_seconds", "_steps", ".steps", "_per_second", "seq_len")
            ):
                assert entry.unit, entry.name


def test_help_wraps_to_the_width_asked_for() -> None:
    text = render_help(Config, "t", "u", {"model": ["k2"]}, width=80)
    indented = [line for line in text.splitlines() if line.startswith("      ")]
    assert max(map(len, indented)) <= 80
    assert dataclasses.is_dataclass(Config)


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_help_shows_the_values_that_the_run_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert "train.steps  <int, in steps> = 880" in help_of(["train", "--help"], capsys)
    text = help_of(["train", "--help", "experiment=k2", "train.seq_len"], capsys)
    assert "train.seq_len  <int, in tokens> = 4096" in text


def test_help_shows_the_keys_asked_for_alone(capsys: pytest.CaptureFixture[str]) -> None:
    section = help_of(["train", "--help", "optim"], capsys)
    names = [
        line.split()[0].rstrip(":") for line in section.splitlines() if re.match(r"^  \w|^\w+(\.\w+)*:", line)
    ]
    assert names == [entry.name for entry in keys_of(Config) if re.match(r"optim\b", entry.name)]
    assert "ops.backend" not in section
    part = help_of(["plan", "--help", "checkpoint"], capsys)
    assert "train.checkpoint_every_minutes" in part
    assert "optim." not in part


def test_a_help_word_that_fits_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", "optin"]) == 2
    assert "did you mean optim" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("plan", ["world", "run_dir", "telemetry.progress", "rehearse.stage"]),
        ("rehearse", ["world", "run_dir", "plan.trace"]),
        ("train", ["plan.trace", "rehearse.stage"]),
    ],
)
def test_help_leaves_out_what_a_command_does_not_read(
    command: str, absent: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of([command, "--help"], capsys)
    assert "layout.nodes" in text
    assert not [name for name in absent if f"\n  {name}  <" in text]


@pytest.mark.parametrize("words", [[], ["experiment=k2"], ["optim=adamw", "train.steps=3"]])
def test_the_composed_config_can_be_printed_and_read_back(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = help_of(["train", "--print-config", *words], capsys)
    assert from_dict(Config, yaml.safe_load(printed)) == load_config(words)
