"""What the user writes wins: over the default experiment, over a chosen one, in a run and in a
sweep."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from k2train.config.compose import load_config, load_run
from k2train.config.convert import to_dict
from k2train.config.errors import ConfigError
from k2train.config.folders import config_dir, group_files
from k2train.config.schema import Config
from k2train.config.sweep import run_sweep

FILES = {group: files for group, files in group_files([config_dir()]).items() if group != "experiment"}
# One file a group that differs from what any experiment takes, and both optimizers.
CHOSEN = [
    "model=moonlight_16b_a3b",
    "layout=two_nodes",
    "schedule=1f1b",
    "activations=recompute",
    "optim=adamw",
    "optim=muonclip",
    "data=stdlib",
    "cluster=h200",
]


def written(path: Path) -> dict[str, Any]:
    """The keys of a file, as the YAML library reads them."""
    return {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "defaults"}


@pytest.mark.parametrize("experiment", [None, "k2", "laptop"])
@pytest.mark.parametrize("word", CHOSEN)
def test_a_group_that_the_user_names_is_its_file_and_nothing_else(word: str, experiment: str | None) -> None:
    group, name = word.split("=")
    words = [word] if experiment is None else [f"experiment={experiment}", word]
    extra = (
        ["train.seq_len=128", "train.steps=5", "layout=two_nodes"] if group == "model" else ["train.steps=5"]
    )
    section = getattr(load_config([*words, *extra]), group)
    keys = written(FILES[group][name])
    defaults = {
        f.name: f.default for f in dataclasses.fields(section) if f.default is not dataclasses.MISSING
    }
    for field in dataclasses.fields(section):
        got = to_dict(getattr(section, field.name))
        if field.name in keys and not isinstance(got, (list, dict)):
            want = keys[field.name]
            assert got == (float(want) if isinstance(got, float) else want), field.name
        elif field.name not in keys and field.name in defaults:
            assert got == to_dict(defaults[field.name]), field.name


def test_a_dotted_word_comes_after_the_group_in_any_order() -> None:
    for words in (["optim=adamw", "optim.weight_decay=0.3"], ["optim.weight_decay=0.3", "optim=adamw"]):
        optim = load_config(words).optim
        assert (optim.name, optim.weight_decay, optim.qk_clip_tau) == ("adamw", 0.3, None)


def test_an_experiment_s_nodes_do_not_outlive_its_layout() -> None:
    config = load_config(["experiment=k2", "model=deepseek_v3", "layout=sixteen_nodes"])
    assert (config.layout.pp, config.layout.nodes) == (8, None)
    assert config.name == "deepseek_v3"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "tiny"),
        (["experiment=k2"], "k2"),
        (["experiment=k2", "model=deepseek_v3"], "deepseek_v3"),
        (["model=deepseek_v3", "name=mine"], "mine"),
        (["cluster=h100"], "tiny"),
    ],
)
def test_a_run_is_called_after_the_model_where_it_is_not_the_experiment_s(
    words: list[str], name: str
) -> None:
    assert load_config(words).name == name


def test_a_sweep_s_jobs_get_what_one_run_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[Config] = []
    count = run_sweep(["optim=adamw,muonclip", "train.steps=7"], lambda config, _: seen.append(config))
    assert count == 2
    assert seen == [load_config([f"optim={name}", "train.steps=7"]) for name in ("adamw", "muonclip")]
    assert seen[0].optim.lr_phases[0].steps == 500


def test_what_a_job_of_a_sweep_raises_is_no_mistake_in_the_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def job(config: Config, output_dir: str) -> None:
        raise ValueError("a fault of the program")

    with pytest.raises(ValueError, match="a fault of the program"):
        run_sweep(["train.steps=1,2"], job)
    for word, message in (
        ("hydra/launcher=submitit_slurm", "k2train.slurm"),
        ("hydra/launcher=nope", "leave it out"),
        ("hydra.nope=3", "hydra.nope"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_sweep([word, "train.steps=1,2"], job)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's directory, of an experiment and some words."""
    config = load_config(
        ["experiment=laptop", "train.steps=7", "model.n_routed_experts=4", f"run_dir={tmp_path}"]
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    return tmp_path


def test_a_run_directory_alone_gives_the_run_s_own_config(run_dir: Path) -> None:
    config = load_run([f"run_dir={run_dir}"])
    assert (config.name, config.train.steps, config.model.n_routed_experts, config.layout.pp) == (
        "laptop",
        7,
        4,
        2,
    )
    assert load_config([f"run_dir={run_dir}"]).train.steps == 880


def test_words_change_a_run_s_own_config(run_dir: Path) -> None:
    config = load_run([f"run_dir={run_dir}", "train.steps=9", "layout=single", "optim.weight_decay=0.3"])
    assert (config.train.steps, config.layout.pp, config.optim.weight_decay) == (9, 1, 0.3)
    assert config.model.n_routed_experts == 4


def test_an_experiment_among_the_words_says_everything_anew(run_dir: Path) -> None:
    words = ["experiment=tiny", f"run_dir={run_dir}"]
    assert load_run(words) == load_config(words)


def test_a_new_run_directory_takes_the_words(tmp_path: Path) -> None:
    words = ["layout=laptop", "train.microbatch_size=4", f"run_dir={tmp_path}/new"]
    assert load_run(words) == load_config(words)
    assert load_run(["train.steps=3"]) == load_config(["train.steps=3"])
