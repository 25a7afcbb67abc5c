"""A user's own folder of config files: found by flag, by variable and beside where one stands, for
every group."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.config.convert import to_dict
from k2train.config.errors import ConfigError
from k2train.config.folders import (
    VARIABLE,
    config_dir,
    group_files,
    group_options,
    search_path,
    user_folder,
)

GROUPS = sorted(group_options())
DEFAULTS = {
    "model": "k2_tiny",
    "layout": "single",
    "schedule": "k2",
    "activations": "none",
    "optim": "muonclip",
    "data": "stdlib",
    "cluster": "cpu",
    "experiment": "tiny",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file `mine` in every group, a copy of the default's, from a working directory
    elsewhere."""
    folder = tmp_path / "it's a folder, mine"
    for group, name in DEFAULTS.items():
        (folder / group).mkdir(parents=True)
        text = (config_dir() / group / f"{name}.yaml").read_text()
        (folder / group / "mine.yaml").write_text(text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv(VARIABLE, raising=False)
    return folder


def by_flag(folder: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> object:
    with user_folder([word, f"--config-dir={folder}"]) as words:
        return load_config(words)


def by_two_words(folder: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> object:
    with user_folder(["--config-dir", str(folder), word]) as words:
        return load_config(words)


def by_variable(folder: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv(VARIABLE, str(folder))
    return load_config([word])


def by_place(folder: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> object:
    folder = folder.rename(folder.parent / "configs")
    monkeypatch.chdir(folder.parent)
    return load_config([word])


def test_the_default_of_every_group_is_known_here() -> None:
    assert sorted(DEFAULTS) == GROUPS


@pytest.mark.parametrize(
    ("group", "way"),
    [
        *((group, by_place) for group in GROUPS),
        ("model", by_flag),
        ("layout", by_two_words),
        ("optim", by_variable),
    ],
)
def test_a_file_of_a_user_s_folder_is_found(
    group: str, way: Callable[..., object], own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = to_dict(load_config([f"{group}={DEFAULTS[group]}"]))
    got = to_dict(way(own, f"{group}=mine", monkeypatch))
    if group == "model":
        assert (got.pop("name"), expected.pop("name")) == ("mine", "k2_tiny")
    assert got == expected


def test_the_program_takes_the_flag_before_or_behind_the_command(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--config-dir", str(own), "plan"], ["plan", f"--config-dir={own}"]):
        assert main([*words, "--print-config", "model=mine"]) == 0
        assert "name: mine" in capsys.readouterr().out
        assert VARIABLE not in os.environ
    assert main(["plan", "--help", "world", "model=mine"]) == 2
    assert "there is no configs/model/mine.yaml" in capsys.readouterr().err


def test_a_user_s_file_stands_before_the_package_s_of_the_same_name(own: Path) -> None:
    (own / "model" / "k2_tiny.yaml").write_text("defaults: [mine, _self_]\nhidden_size: 256\n")
    with user_folder([f"--config-dir={own}", "train.steps=3"]) as words:
        config = load_config(words)
    assert (config.model.hidden_size, config.train.steps) == (256, 3)
    assert load_config([]).model.hidden_size == 128


def test_another_program_s_configs_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "k2.yaml").write_text("layers: 3\n")
    (tmp_path / "configs" / "config.yaml").write_text("defaults: [{model: k2}]\ntrainer: lightning\n")
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert search_path() == [config_dir()]
    (tmp_path / "configs" / "config.yaml").write_text("defaults: [\n")
    assert search_path() == [config_dir()]


def test_a_clone_s_own_configs_are_not_searched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(config_dir().parent)
    assert search_path() == [config_dir()]


def test_an_empty_variable_switches_the_folder_off(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.rename(own.parent / "configs").parent)
    assert len(search_path()) == 2
    monkeypatch.setenv(VARIABLE, "")
    assert search_path() == [config_dir()]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ConfigError, match=r"--config-dir=.*: there is no such folder"),
        user_folder(["--config-dir", str(tmp_path / "nowhere")]),
    ):
        pass
    with pytest.raises(ConfigError, match="needs a folder"), user_folder(["--config-dir"]):
        pass
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=f"{VARIABLE}=.*: is not a folder"):
        load_config([])


def test_a_file_that_is_no_yaml_is_named_with_its_line(own: Path) -> None:
    (own / "model" / "bad.yaml").write_text("hidden_size: 3\nnum: [1\nother: {\n")
    with (
        user_folder([f"--config-dir={own}"]),
        pytest.raises(ConfigError, match=r"bad\.yaml, line 3.*no YAML") as told,
    ):
        load_config(["model=bad"])
    assert len(str(told.value).splitlines()) <= 2


def test_files_in_folders_of_a_group_have_both_names(own: Path) -> None:
    (own / "model" / "team").mkdir()
    (own / "model" / "team" / "a.yaml").write_text("defaults: [/model/mine, _self_]\n")
    assert "team/a" in group_files([own])["model"]
